"""The checks of the arguments of a T5's pieces. Implementations and fake kernels call the same ones.

Decoding calls some thirty pieces for every token, so a check of arguments that fit is one condition. Arguments that do
not are looked at one by one, to say what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Dropout
from ..philox import MOST_ROWS
from .checks import _floating, _require, is_batched


def check_residual(hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, name: str = "y") -> None:
    """Check the arguments of ``residual``: hidden like y [..., n], and weight [n]. ValueError otherwise."""
    shape, dtype, device = y.shape, y.dtype, y.device
    if not (
        dtype.is_floating_point
        and shape
        and (weight is not None if hidden is None else _like(hidden, shape, dtype, device))
        and (weight is None or (weight.shape == shape[-1:] and weight.device == device and weight.is_floating_point()))
        and (dropout.p == 0 or (hidden is not None and _drops(dropout, y)))
    ):
        _explain_residual(hidden, y, dropout, weight, name)


def _explain_residual(hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, name: str) -> None:
    _rows(name, y)
    if hidden is not None:
        _alike("hidden", hidden, name, y)
    elif weight is None:
        raise ValueError("pass hidden, to add y to it, or weight, to norm y, or both")
    elif dropout.p != 0:
        raise ValueError("there is no dropout without hidden: pass NO_DROPOUT")
    if weight is not None:
        _require(
            weight.shape == y.shape[-1:],
            lambda: f"weight must be [{y.shape[-1]}], the last dimension of {name}, got {list(weight.shape)}",
        )
        _floating("weight", weight)
        _on("weight", weight, name, y)
    _explain_dropout(dropout, y, name)


def check_act_dropout(a: Tensor, c: Tensor | None, dropout: Dropout) -> None:
    """Check the arguments of ``act_dropout``: c like a [..., n]. ValueError otherwise."""
    shape, dtype = a.shape, a.dtype
    if not (
        dtype.is_floating_point
        and shape
        and (c is None or _like(c, shape, dtype, a.device))
        and (dropout.p == 0 or _drops(dropout, a))
    ):
        _rows("a", a)
        if c is not None:
            _alike("c", c, "a", a)
        _explain_dropout(dropout, a, "a")


def check_softmax(scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout) -> None:
    """Check the arguments of ``softmax_dropout``: scores [B, H, Lq, Lk], bias and mask that can be broadcast to it.
    ValueError otherwise."""
    shape = scores.shape
    if not (
        len(shape) == 4
        and scores.is_floating_point()
        and (dropout.p == 0 or _drops(dropout, scores))
        and (bias is None or _adds(bias, shape, scores))
        and (mask is None or _adds(mask, shape, scores, also_bool=True))
    ):
        _four("scores", scores, "B, H, Lq, Lk")
        _floating("scores", scores)
        _explain_added(bias, mask, scores, shape)
        _explain_dropout(dropout, scores, "scores")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout
) -> None:
    """Check the arguments of ``attention``: q [B, H, Lq, dk], k [B, H, Lk, dk], v [B, H, Lk, dv], and bias and mask
    that can be broadcast to [B, H, Lq, Lk]. ValueError otherwise."""
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if len(of_q) == len(of_k) == len(of_v) == 4:
        shape = (*of_q[:3], of_k[2])
        if (
            of_k == (*of_q[:2], of_k[2], of_q[3])
            and of_v[:3] == of_k[:3]
            and q.is_floating_point()
            and q.dtype == k.dtype == v.dtype
            and q.device == k.device == v.device
            and (dropout.p == 0 or _drops(dropout, q))
            and (bias is None or _adds(bias, shape, q))
            and (mask is None or _adds(mask, shape, q, also_bool=True))
        ):
            return
    _explain_attention(q, k, v, bias, mask, dropout)


def _explain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout
) -> None:
    _four("q", q, "B, H, Lq, dk")
    _four("k", k, "B, H, Lk, dk")
    _four("v", v, "B, H, Lk, dv")
    _floating("q", q)
    for name, t in (("k", k), ("v", v)):
        _require(t.dtype == q.dtype, lambda: f"{name} must have q's dtype {q.dtype}, got {t.dtype}")
        _on(name, t, "q", q)
        _require(
            t.shape[:2] == q.shape[:2],
            lambda: f"{name} must have q's batch and heads {list(q.shape[:2])}, got {list(t.shape[:2])}",
        )
    _require(k.shape[3] == q.shape[3], lambda: f"k must have q's width dk = {q.shape[3]}, got {k.shape[3]}")
    _require(v.shape[2] == k.shape[2], lambda: f"v must have k's length Lk = {k.shape[2]}, got {v.shape[2]}")
    _explain_added(bias, mask, q, (*q.shape[:3], k.shape[2]))
    _explain_dropout(dropout, q, "q")


def check_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
    """Check the arguments of ``cross_entropy_rows``, except for the values of labels. ValueError otherwise."""
    _require(logits.dim() == 2, lambda: f"logits must be [N, V], got {list(logits.shape)}")
    _floating("logits", logits)
    _require(
        labels.shape == logits.shape[:1],
        lambda: f"labels must be [{logits.shape[0]}], one per row of logits, got {list(labels.shape)}",
    )
    _require(labels.dtype == torch.int64, lambda: f"labels must be int64, got {labels.dtype}")
    _on("labels", labels, "logits", logits)
    _require(0 <= label_smoothing <= 1, lambda: f"label_smoothing must be from 0 to 1, got {label_smoothing}")


def check_label_range(labels: Tensor, V: int, ignore_index: int) -> None:
    """Check that every label is ignored or one of 0 .. V-1. ValueError otherwise.

    Labels on a GPU are not checked, because reading them would wait for the GPU.
    """
    if labels.device.type != "cpu" or labels.numel() == 0 or is_batched(labels):
        return
    used = labels[labels != ignore_index]
    if used.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(used))
    if low < 0 or high >= V:
        raise ValueError(
            f"labels must be from 0 to {V - 1}, or {ignore_index} (ignored), got {low if low < 0 else high}"
        )


def check_gradient(g: Tensor | None, name: str, like: Tensor, dtype: torch.dtype) -> None:
    """Check a gradient of the shape of ``like`` and of ``dtype``. ValueError otherwise."""
    if g is None:
        return
    _require(g.shape == like.shape, lambda: f"{name} must be {list(like.shape)}, got {list(g.shape)}")
    _require(g.dtype == dtype, lambda: f"{name} must be in {dtype}, got {g.dtype}")
    _on(name, g, "the inputs", like)


def _like(t: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    return t.shape == shape and t.dtype == dtype and t.device == device


def _drops(dropout: Dropout, x: Tensor) -> bool:
    """Whether ``dropout`` can be that of x [..., n]."""
    p, seed, stream = dropout
    return (
        0 < p <= 1
        and seed is not None
        and seed.dtype == torch.int64
        and seed.shape == (1,)
        and seed.device == x.device
        and -(2**63) <= stream < 2**63
        and (x.numel() <= MOST_ROWS or x.shape[-1] == 0 or x.numel() // x.shape[-1] <= MOST_ROWS)
    )


def _explain_dropout(dropout: Dropout, x: Tensor, name: str) -> None:
    """ValueError unless ``dropout`` can be that of x [..., n]."""
    p, seed, stream = dropout
    if p == 0:
        return
    _require(0 < p <= 1, lambda: f"the dropout's p must be from 0 to 1, got {p}")
    if seed is None:
        raise ValueError(f"a dropout with p = {p} needs a seed: make it with hyperformer_fast.philox.draw")
    _require(
        seed.dtype == torch.int64 and seed.shape == (1,),
        lambda: f"the dropout's seed must be int64 [1], got {seed.dtype} {list(seed.shape)}",
    )
    _on("seed", seed, name, x)
    _require(-(2**63) <= stream < 2**63, lambda: f"the dropout's stream must be a 64-bit integer, got {stream}")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    _require(rows <= MOST_ROWS, lambda: f"dropout takes at most {MOST_ROWS} rows, got {name} with {rows}")


def _rows(name: str, x: Tensor) -> None:
    _floating(name, x)
    _require(x.dim() >= 1, lambda: f"{name} must be [..., n], got a scalar")


def _four(name: str, t: Tensor, dims: str) -> None:
    _require(t.dim() == 4, lambda: f"{name} must be [{dims}], got {list(t.shape)}")


def _on(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    _require(
        t.device == first.device,
        lambda: f"{name} must be on the device {first.device} of {first_name}, got {t.device}",
    )


def _alike(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    _require(
        t.shape == first.shape,
        lambda: f"{name} must have the shape {list(first.shape)} of {first_name}, got {list(t.shape)}",
    )
    _require(t.dtype == first.dtype, lambda: f"{name} must have the dtype {first.dtype} of {first_name}, got {t.dtype}")
    _on(name, t, first_name, first)


def _adds(t: Tensor, shape: Sequence[int], like: Tensor, also_bool: bool = False) -> bool:
    """Whether t, a bias or mask, can be added to scores of this shape [B, H, Lq, Lk]."""
    return (
        _broadcasts(t.shape, shape)
        and t.device == like.device
        and (t.is_floating_point() or (also_bool and t.dtype == torch.bool))
    )


def _broadcasts(have: Sequence[int], want: Sequence[int]) -> bool:
    if len(have) != 4:
        if len(have) > 4:
            return False
        have = (*(1,) * (4 - len(have)), *have)
    (b, h, q, k), (of_b, of_h, of_q, of_k) = have, want  # written out: a loop takes several times as long
    return (k == of_k or k == 1) and (q == of_q or q == 1) and (h == of_h or h == 1) and (b == of_b or b == 1)


def _explain_added(bias: Tensor | None, mask: Tensor | None, like: Tensor, shape: Sequence[int]) -> None:
    for name, t in (("bias", bias), ("mask", mask)):
        if t is None:
            continue
        floating = t.is_floating_point()
        if name == "bias":
            _floating(name, t)
        else:
            _require(
                floating or t.dtype == torch.bool, lambda: f"mask must be bool or of a floating dtype, got {t.dtype}"
            )
        _on(name, t, "the scores", like)
        _require(
            _broadcasts(t.shape, shape),
            lambda: f"{name} must be one that can be broadcast to {list(shape)}, got {list(t.shape)}",
        )
