"""The public functions of a T5's attention and of its loss, which take the three paths of public.py as those of
pieces.py do."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox
from .. import t5_reference as plain
from ..layout import NO_DROPOUT, Dropout
from . import functorch
from . import pieces_eager as eager
from .pieces_checks import check_attention, check_cross_entropy, check_label_range, check_softmax
from .pieces_registered import piece_backend
from .public import traced


def _as_bias(bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Make a mask that is to get a gradient part of the bias, because only this has one."""
    if mask is None or not mask.requires_grad:
        return bias, mask
    return mask if bias is None else bias + mask, None


def softmax_dropout(
    scores: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    *,
    impl: str | None = None,
) -> Tensor:
    """The weights of an attention: ``dropout(softmax(scores + bias + mask))``, summed in float32.

    Args:
        scores: [B, H, Lq, Lk].
        bias: of a floating dtype, and of a shape that can be broadcast to that of scores.
        mask: likewise; or bool, where False masks out.
        dropout: the dropout of the probabilities, from ``philox.draw``.
        impl: the name of the backend to use, as in :func:`ops.adapter`.

    Returns:
        A new tensor of scores' shape and dtype. A row that is masked out wholly by -inf or by False is 0, as in
        PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    bias, mask = _as_bias(bias, mask)
    if dropout is not NO_DROPOUT:
        dropout = philox.rounded(dropout)
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_softmax(scores, bias, mask, dropout)
        functorch.refuse_kernels("softmax_dropout_forward", impl)
        return plain.softmax_dropout(scores, bias, mask, dropout)[0]
    save = torch.is_grad_enabled() and (scores.requires_grad or (bias is not None and bias.requires_grad))
    if traced(scores, *(t for t in (bias, mask) if t is not None)):
        op = torch.ops.hyperformer_fast.softmax_dropout_forward
        out: Tensor = op(scores, bias, mask, *dropout, save, impl=impl)[0]
        return out
    check_softmax(scores, bias, mask, dropout)
    forward = piece_backend("softmax_dropout_forward", scores, impl)
    if not save:
        return forward.softmax_dropout_forward(scores, bias, mask, dropout, False)[0]
    backward = piece_backend("softmax_dropout_backward", scores, impl)
    return eager.softmax_dropout(scores, bias, mask, dropout, forward, backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    *,
    impl: str | None = None,
) -> Tensor:
    """Attention of several heads: ``dropout(softmax(scaling * q k^T + bias + mask)) v``.

    Args:
        q: [B, H, Lq, dk].
        k: [B, H, Lk, dk].
        v: [B, H, Lk, dv].
        bias: of a floating dtype, and of a shape that can be broadcast to [B, H, Lq, Lk].
        mask: likewise; or bool, where False masks out.
        scaling: the factor of the scores; 1 in a T5.
        dropout: the dropout of the probabilities, from ``philox.draw``.
        impl: the name of the backend to use, as in :func:`ops.adapter`.

    Returns:
        [B, H, Lq, dv] in q's dtype, which lies in memory as [B, Lq, H, dv]. Rows that are masked out wholly are as in
        :func:`softmax_dropout`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    bias, mask = _as_bias(bias, mask)
    if dropout is not NO_DROPOUT:
        dropout = philox.rounded(dropout)
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_attention(q, k, v, bias, mask, dropout)
        functorch.refuse_kernels("attention_forward", impl)
        with torch.autocast(q.device.type, enabled=False):
            return plain.attention(q, k, v, bias, mask, scaling, dropout)
    needs = q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    save = torch.is_grad_enabled() and needs
    if traced(q, k, v, *(t for t in (bias, mask) if t is not None)):
        op = torch.ops.hyperformer_fast.attention_forward
        out: Tensor = op(q, k, v, bias, mask, scaling, *dropout, save, impl=impl)[0]
        return out
    check_attention(q, k, v, bias, mask, dropout)
    forward = piece_backend("attention_forward", q, impl)
    if not save:
        return forward.attention_forward(q, k, v, bias, mask, scaling, dropout, False)[0]
    backward = piece_backend("attention_backward", q, impl)
    return eager.attention(q, k, v, bias, mask, scaling, dropout, forward, backward)


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    *,
    impl: str | None = None,
) -> Tensor:
    """The cross-entropy of each row: ``(1 - s) * nll + s * mean(-log p)`` with the label smoothing s.

    Args:
        logits: [N, V].
        labels: int64 [N].
        label_smoothing: from 0 to 1.
        ignore_index: the label of the rows whose loss is 0.
        impl: the name of the backend to use, as in :func:`ops.adapter`.

    Returns:
        The float32 losses [N].

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, a label on the CPU is out of range, or ``impl`` is
            unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_cross_entropy(logits, labels, label_smoothing)
            check_label_range(labels, logits.shape[1], ignore_index)
        functorch.refuse_kernels("cross_entropy_forward", impl)
        return plain.cross_entropy(logits, labels, label_smoothing, ignore_index)
    save = torch.is_grad_enabled() and logits.requires_grad
    if traced(logits, labels):
        op = torch.ops.hyperformer_fast.cross_entropy_forward
        loss: Tensor = op(logits, labels, label_smoothing, ignore_index, save, impl=impl)[0]
        return loss
    check_cross_entropy(logits, labels, label_smoothing)
    check_label_range(labels, logits.shape[1], ignore_index)
    backend = piece_backend("cross_entropy_forward", logits, impl)
    if not save:
        return backend.cross_entropy_forward(logits, labels, label_smoothing, ignore_index, False)[0]
    return eager.cross_entropy(logits, labels, label_smoothing, ignore_index, backend)
