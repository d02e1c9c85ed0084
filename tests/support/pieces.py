"""The pieces of a T5 written once more, as a T5 computes them in any dtype, and one way to hold a backend to them.

The dropout's mask comes from philox.py, as a tensor of zeros and factors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperformer_fast import backends, ops, philox
from hyperformer_fast.layout import NO_DROPOUT, Dropout
from support.rounding import Rounding, act_rounding, attention_rounding, cross_entropy_rounding, softmax_rounding
from support.tolerance import assert_accurate

#: The backends that the tests try where they serve. Triton's interpreter has a process of its own (tests/interpreted).
BACKENDS = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ("reference", "cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LAYOUTS: dict[str, Callable[[Sequence[int], torch.dtype], Tensor]] = {
    "contiguous": lambda shape, dtype: torch.randn(*shape).to(dtype),
    "strided rows": lambda shape, dtype: torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., : shape[-1]],
    "every other column": lambda shape, dtype: torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2],
    "turned around": lambda shape, dtype: torch.randn(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape)))),
    "one row for all": lambda shape, dtype: torch.randn(*[1] * (len(shape) - 1), shape[-1]).to(dtype).expand(*shape),
    "one number for all": lambda shape, dtype: torch.randn(*[1] * len(shape)).to(dtype).expand(*shape),
    "off by one": lambda shape, dtype: torch.randn(torch.Size(shape).numel() + 1).to(dtype)[1:].view(*shape),
}


def dropout_of(p: float, seed: int = 0x0123456789ABCDEF, stream: int = 0) -> Dropout:
    """A dropout with a fixed seed."""
    return Dropout(p, torch.tensor([seed]), stream) if philox.threshold(p) else NO_DROPOUT


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x) in x's dtype."""
    if dropout.p == 0:
        return x
    return torch.where(philox.kept(dropout, x.shape), x * philox.scale(dropout.p), 0.0)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' T5LayerNorm, but with float64 statistics of a float64 x."""
    exact = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    x = x * torch.rsqrt(x.to(exact).pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else x)


ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def softmax(scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout) -> Tensor:
    total = scores
    if bias is not None:
        total = total + bias.to(scores.dtype)
    if mask is not None:
        total = total.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else total + mask.to(scores.dtype)
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    closed = (total == -torch.inf).all(-1, keepdim=True)
    weights = F.softmax(total.masked_fill(closed, 0.0).to(exact), -1).masked_fill(closed, 0.0).to(scores.dtype)
    return dropped(weights, dropout)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scaling: float, dropout: Dropout
) -> Tensor:
    return softmax(q @ k.mT * scaling, bias, mask, dropout) @ v


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(exact), labels, reduction="none", label_smoothing=label_smoothing)


@dataclasses.dataclass
class Case:
    """One call of a piece.

    Args:
        mine: the op, of the leaves; it returns one or more tensors.
        eager: the same, as a T5 computes it.
        leaves: the floating inputs. Each gets a gradient unless it is in ``frozen``.
        gradients: the gradients of the results.
        names: what the leaves are called.
        frozen: the indices of leaves that need no gradient.
        ops: the ops that a backend must serve.
        heads: B and H, where the tolerance rule's rows are the heads of tensors [B, H, L, n]. One query's gradients of
            k are multiples of one number each, which may cancel to any accuracy.
        broadcast: the index of a leaf that is broadcast, with the shape: its gradient is a sum of many.
        rounding: of the leaves and the first gradient in float64: how far rounding moves a result, by its name.
    """

    mine: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]
    names: Sequence[str]
    ops: Sequence[str]
    frozen: Sequence[int] = ()
    heads: tuple[int, int] | None = None
    broadcast: tuple[int, Sequence[int]] | None = None
    rounding: Callable[..., dict[str, Rounding]] | None = None

    def slack(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """How far rounding may move a result, by its name."""
        if self.rounding is None:
            return {}
        found = self.rounding(*(t.detach().double() for t in (*self.leaves, self.gradients[0])))
        return {name: each.slack(dtype) for name, each in found.items()}

    def terms(self) -> dict[str, Tensor]:
        """Of the gradient that is a sum: the sum of the absolute values, by the name of the leaf."""
        if self.broadcast is None or self.broadcast[0] in self.frozen:
            return {}
        which, shape = self.broadcast
        leaves = [t.detach().double() for t in self.leaves]
        whole = leaves[which].expand(*shape).clone().requires_grad_()
        out = self.eager(*leaves[:which], whole, *leaves[which + 1 :])
        (each,) = torch.autograd.grad(out, whole, self.gradients[0].double())
        return {self.names[which]: each.abs().sum_to_size(leaves[which].shape)}

    def run(self, apply: Callable[..., Tensor | tuple[Tensor, ...]], convert: Callable[[Tensor], Tensor]) -> list:
        """The results and the gradients, with the leaves and gradients converted."""
        leaves = [convert(t.detach()) for t in self.leaves]
        wanted = [i for i in range(len(leaves)) if i not in self.frozen]
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        out = apply(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        if not wanted:
            return [t.detach() for t in out]
        gradients = [convert(g).to(t.dtype) for g, t in zip(self.gradients, out)]
        found = torch.autograd.grad(out, [leaves[i] for i in wanted], gradients, materialize_grads=True)
        return [*(t.detach() for t in out), *found]


def serves(backend: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether ``backend`` has kernels for all ops of the case."""
    return all(backends.explain(op, dtype=dtype, impl=backend).chosen == backend for op in case.ops)


def use_or_skip(backend: str, *ops: str, dtype: torch.dtype = torch.float32) -> backends.use_backend:
    """Choose a backend for the ops named, or skip the test."""
    for op in ops:
        if backends.explain(op, dtype=dtype, impl=backend).chosen != backend:
            pytest.skip(f"backend {backend} has no kernels for {op} here")
    return backends.use_backend(backend)


RESIDUAL = ("residual_forward", "residual_backward")
ACT = ("act_dropout_forward", "act_dropout_backward")
SOFTMAX = ("softmax_dropout_forward", "softmax_dropout_backward")
ATTENTION = ("attention_forward", "attention_backward")


def check(case: Case, dtype: torch.dtype, backend: str = "auto") -> None:
    """Outputs and gradients within the tolerance rule, and two runs bit-equal."""
    same = lambda t: t  # noqa: E731
    with backends.use_backend(backend):
        mine, again = (case.run(case.mine, same) for _ in range(2))
    eager, wide, truth = (
        case.run(case.eager, convert) for convert in (same, lambda t: t.float(), lambda t: t.double())
    )
    count = len(mine) - len([i for i in range(len(case.leaves)) if i not in case.frozen])
    names = [*(f"result {i}" for i in range(count))]
    names += [f"the gradient of {case.names[i]}" for i in range(len(case.leaves)) if i not in case.frozen]
    terms = {f"the gradient of {name}": size for name, size in case.terms().items()}
    slack = case.slack(dtype)
    for name, k, a, e, e32, t in zip(names, mine, again, eager, wide, truth):
        assert torch.equal(k, a) or k.isnan().any(), f"{name}: two runs differ"
        size, off = terms.get(name, t), slack.get(name, torch.zeros_like(t))
        if case.heads is not None and k.dim() == 4 and k.shape[:2] == case.heads:
            k, e, e32, t, size, off = (tensor.flatten(2) for tensor in (k, e, e32, t, size, off))
        assert_accurate(k, e, t, name, e32, dtype, size, off)


def residual_case(
    hidden: Tensor, y: Tensor, weight: Tensor | None, dropout: Dropout, eps: float = 1e-6, frozen: Sequence[int] = ()
) -> Case:
    def eager(hidden, y, weight=None):
        out = hidden + dropped(y, dropout)
        return out if weight is None else (out, layer_norm(out, weight, eps))

    leaves = [hidden, y] if weight is None else [hidden, y, weight]
    gradients = [torch.randn(*y.shape).to(y.dtype) for _ in range(len(leaves) - 1)]
    mine = lambda hidden, y, weight=None: ops.residual(hidden, y, dropout, weight, eps)  # noqa: E731
    names = ("hidden", "y", "weight")
    return Case(mine, eager, leaves, gradients, names, RESIDUAL, frozen)


def rms_norm_case(x: Tensor, weight: Tensor, eps: float = 1e-6, frozen: Sequence[int] = ()) -> Case:
    return Case(
        lambda x, w: ops.rms_norm(x, w, eps),
        lambda x, w: layer_norm(x, w, eps),
        [x, weight],
        [torch.randn(*x.shape).to(x.dtype)],
        ("x", "weight"),
        RESIDUAL,
        frozen,
    )


def act_dropout_case(
    a: Tensor, c: Tensor | None, activation: str, dropout: Dropout, frozen: Sequence[int] = ()
) -> Case:
    act = ACTIVATE[activation]
    eager = lambda a, c=None: dropped(act(a) if c is None else act(a) * c, dropout)  # noqa: E731
    mine = lambda a, c=None: ops.act_dropout(a, activation, c, dropout)  # noqa: E731
    leaves = [a] if c is None else [a, c]

    def rounding(a, *others):
        factor = dropped(torch.ones_like(a), dropout)
        return act_rounding(act, a, others[0] if len(others) > 1 else None, factor, others[-1])

    gradients = [torch.randn(*a.shape).to(a.dtype)]
    return Case(mine, eager, leaves, gradients, ("a", "c"), ACT, frozen, rounding=None if act is F.relu else rounding)


def softmax_case(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, frozen: Sequence[int] = ()
) -> Case:
    leaves = [scores] if bias is None else [scores, bias]

    def rounding(scores, *others):
        bias = others[0] if len(others) > 1 else None
        p = softmax(scores, bias, mask, NO_DROPOUT)
        return softmax_rounding(p, scores, bias, dropped(torch.ones_like(p), dropout), others[-1])

    return Case(
        lambda scores, bias=None: ops.softmax_dropout(scores, bias, mask, dropout),
        lambda scores, bias=None: softmax(scores, bias, mask, dropout),
        leaves,
        [torch.randn(*scores.shape).to(scores.dtype)],
        ("scores", "bias"),
        SOFTMAX,
        frozen,
        broadcast=None if bias is None else (1, scores.shape),
        rounding=rounding,
    )


def attention_case(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout: Dropout,
    frozen: Sequence[int] = (),
) -> Case:
    leaves = [q, k, v] if bias is None else [q, k, v, bias]

    def rounding(q, k, v, *others):
        bias = others[0] if len(others) > 1 else None
        p = softmax(q @ k.mT * scaling, bias, mask, NO_DROPOUT)
        return attention_rounding(p, q, k, v, bias, scaling, dropped(torch.ones_like(p), dropout), others[-1])

    return Case(
        lambda q, k, v, bias=None: ops.attention(q, k, v, bias, mask, scaling, dropout),
        lambda q, k, v, bias=None: attention(q, k, v, bias, mask, scaling, dropout),
        leaves,
        [torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)],
        ("q", "k", "v", "bias"),
        ATTENTION,
        frozen,
        (q.shape[0], q.shape[1]),
        None if bias is None else (3, (*q.shape[:3], k.shape[2])),
        rounding,
    )


def cross_entropy_case(logits: Tensor, labels: Tensor, label_smoothing: float) -> Case:
    return Case(
        lambda logits: ops.cross_entropy_rows(logits, labels, label_smoothing),
        lambda logits: cross_entropy(logits, labels, label_smoothing),
        [logits],
        [torch.rand(len(labels)) + 0.5],
        ("logits",),
        ("cross_entropy_forward",),
        rounding=lambda logits, g: cross_entropy_rounding(logits, labels, label_smoothing, g),
    )
