"""The public functions of a T5's pieces: what lies between its matrix products, each in one pass over its input.

A call takes one of the three paths of public.py. What the pieces compute is written in ``t5_reference``.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .. import t5_reference as plain
from ..activations import ACTIVATIONS, canonical_activation
from ..layout import NO_DROPOUT, AdapterLayout, Dropout, Folded
from ..philox import threshold
from . import functorch
from . import pieces_eager as eager
from .checks import check_adapter, check_task_range
from .pieces_checks import (
    check_act_dropout,
    check_attention,
    check_cross_entropy,
    check_label_range,
    check_residual,
    check_softmax,
)
from .pieces_registered import adapter_residual_backends, of_piece, piece_backend
from .public import adapter, fold, spec_of, traced

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def _rounded(dropout: Dropout) -> Dropout:
    """The dropout, or ``NO_DROPOUT`` if its p rounds to 0. ValueError unless p is from 0 to 1."""
    return dropout if threshold(dropout.p) else NO_DROPOUT


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, impl: str | None = None) -> Tensor:
    """T5's layer norm: ``weight * x / sqrt(mean(x^2) + eps)``.

    Args:
        x: [..., n].
        weight: [n].
        eps: added to the mean of the squares.
        impl: the name of the backend to use, as in :func:`ops.adapter`.

    Returns:
        The result, with transformers' rule for its dtype: that of the weight if this is half precision, float32
        otherwise.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_residual(None, x, NO_DROPOUT, weight, "x")
        functorch.refuse_kernels("residual_forward", impl)
        return plain.rms_norm(x, weight, eps)
    save = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if traced(x, weight):
        op = torch.ops.hyperformer_fast.residual_forward
        normed: Tensor = op(None, x, weight, *NO_DROPOUT, eps, save, impl=impl)[1]
        return normed
    check_residual(None, x, NO_DROPOUT, weight, "x")
    forward = piece_backend("residual_forward", x, impl, weight)
    if not save:
        return forward.residual_forward(None, x, NO_DROPOUT, weight, eps, False)[1]
    backward = piece_backend("residual_backward", x, impl, weight)
    normed = eager.residual(None, x, weight, NO_DROPOUT, eps, forward, backward)
    return normed


@overload
def residual(
    hidden: Tensor,
    y: Tensor,
    dropout: Dropout = NO_DROPOUT,
    weight: None = None,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> Tensor: ...


@overload
def residual(
    hidden: Tensor,
    y: Tensor,
    dropout: Dropout,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def residual(
    hidden: Tensor,
    y: Tensor,
    dropout: Dropout = NO_DROPOUT,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> Any:
    """Add to the residual stream, and norm the sum for the next sublayer in the same pass.

    Args:
        hidden: [..., n], the residual stream.
        y: like hidden. If their dtypes differ, as under autocast, both are promoted to the wider one.
        dropout: the dropout of y, from ``philox.draw``.
        weight: [n], the weight of the layer norm that follows; None: there is none.
        eps: the epsilon of the norm.
        impl: as in :func:`rms_norm`.

    Returns:
        ``hidden + dropout(y)``; with ``weight`` this and its :func:`rms_norm`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if hidden.dtype != y.dtype:
        dtype = torch.promote_types(hidden.dtype, y.dtype)
        hidden, y = hidden.to(dtype), y.to(dtype)
    if dropout is not NO_DROPOUT:
        dropout = _rounded(dropout)
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_residual(hidden, y, dropout, weight)
        functorch.refuse_kernels("residual_forward", impl)
        out, normed = plain.residual(hidden, y, dropout, weight, eps)
        return out if weight is None else (out, normed)
    save = torch.is_grad_enabled() and (
        hidden.requires_grad or y.requires_grad or (weight is not None and weight.requires_grad)
    )
    if traced(hidden, y) or (weight is not None and traced(weight)):
        op = torch.ops.hyperformer_fast.residual_forward
        out, normed, _ = op(hidden, y, weight, *dropout, eps, save, impl=impl)
        return out if weight is None else (out, normed)
    check_residual(hidden, y, dropout, weight)
    forward = piece_backend("residual_forward", y, impl, weight)
    if not save:
        out, normed, _ = forward.residual_forward(hidden, y, dropout, weight, eps, False)
        return out if weight is None else (out, normed)
    backward = piece_backend("residual_backward", y, impl, weight)
    return eager.residual(hidden, y, weight, dropout, eps, forward, backward)


def act_dropout(
    a: Tensor,
    activation: str,
    c: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    *,
    impl: str | None = None,
) -> Tensor:
    """The middle of a feed-forward layer: ``dropout(act(a))``, or ``dropout(act(a) * c)`` if it is gated.

    Args:
        a: [..., n].
        activation: ``gelu_new``, ``gelu``, ``relu`` or ``silu``.
        c: like a. If their dtypes differ, both are promoted to the wider one.
        dropout: the dropout of the result, from ``philox.draw``.
        impl: as in :func:`rms_norm`.

    Returns:
        A new tensor of a's shape and dtype, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``activation`` or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if activation not in _CODES:
        activation = canonical_activation(activation)
    if c is not None and c.dtype != a.dtype:
        dtype = torch.promote_types(a.dtype, c.dtype)
        a, c = a.to(dtype), c.to(dtype)
    if dropout is not NO_DROPOUT:
        dropout = _rounded(dropout)
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            check_act_dropout(a, c, dropout)
        functorch.refuse_kernels("act_dropout_forward", impl)
        return plain.act_dropout(a, c, activation, dropout)
    if traced(a) or (c is not None and traced(c)):
        op = torch.ops.hyperformer_fast.act_dropout_forward
        out: Tensor = op(a, c, _CODES[activation], *dropout, impl=impl)
        return out
    check_act_dropout(a, c, dropout)
    forward = piece_backend("act_dropout_forward", a, impl)
    if not (torch.is_grad_enabled() and (a.requires_grad or (c is not None and c.requires_grad))):
        return forward.act_dropout_forward(a, c, activation, dropout)
    backward = piece_backend("act_dropout_backward", a, impl)
    return eager.act_dropout(a, c, activation, dropout, forward, backward)


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
        impl: as in :func:`rms_norm`.

    Returns:
        A new tensor of scores' shape and dtype. A row that is masked out wholly by -inf or by False is 0, as in
        PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    bias, mask = _as_bias(bias, mask)
    if dropout is not NO_DROPOUT:
        dropout = _rounded(dropout)
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
        impl: as in :func:`rms_norm`.

    Returns:
        [B, H, Lq, dv] in q's dtype, which lies in memory as [B, Lq, H, dv]. Rows that are masked out wholly are as in
        :func:`softmax_dropout`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    bias, mask = _as_bias(bias, mask)
    if dropout is not NO_DROPOUT:
        dropout = _rounded(dropout)
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
        impl: as in :func:`rms_norm`.

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


def adapter_residual(
    hidden: Tensor,
    y: Tensor,
    packed: Tensor,
    layout: AdapterLayout,
    activation: str,
    folded: Folded | None = None,
    task_index: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> Any:
    """The end of an adapted sublayer: ``residual(hidden, adapter(y), dropout, weight, eps)``, in one pass where the
    backend can.

    Args:
        hidden: [..., d], the residual stream.
        y: like hidden, the sublayer's output before its dropout.
        packed: as in :func:`ops.adapter`, as are ``layout``, ``activation``, ``folded`` and ``task_index``.
        layout: the layout of ``packed``.
        activation: the adapter's.
        folded: ``fold(packed, layout, y.dtype)``.
        task_index: the task of each sample.
        dropout: as in :func:`residual`, as are ``weight`` and ``eps``.
        weight: the weight of the layer norm that follows.
        eps: the epsilon of the norm.
        impl: the backend of the adapter. The residual follows it if the backend has kernels for that.

    Returns:
        As :func:`residual`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``activation`` or ``impl`` is unknown.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if hidden.dtype != y.dtype or functorch.in_force():
        adapted = adapter(y, packed, layout, activation, folded, task_index, impl=impl)
        return residual(hidden, adapted, dropout, weight, eps)
    spec = spec_of(layout, activation)
    if dropout is not NO_DROPOUT:
        dropout = _rounded(dropout)
    if folded is None:
        folded = fold(packed, layout, y.dtype, impl=impl)
    tensors = (hidden, y, packed) if weight is None else (hidden, y, packed, weight)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if traced(*tensors):
        op = torch.ops.hyperformer_fast.adapter_residual_forward
        out, *_, normed, _ = op(
            hidden, y, packed, weight, *folded, task_index, *spec.arguments, *dropout, eps, save, impl=impl
        )
        return out if weight is None else (out, normed)
    forward, backward, whole = adapter_residual_backends(y, packed, weight, spec, impl, save)
    if not whole:
        adapted = adapter(y, packed, layout, activation, folded, task_index, impl=impl)
        of_residual = of_piece("residual_backward" if save else "residual_forward", y, weight, impl)
        return residual(hidden, adapted, dropout, weight, eps, impl=of_residual)
    check_adapter(y, packed, folded, layout, task_index)
    check_task_range(task_index, packed.shape[0])
    check_residual(hidden, y, dropout, weight)
    if backward is None:
        out, _, normed, _ = forward.adapter_residual_forward(
            hidden, y, folded, spec, task_index, dropout, weight, eps, False
        )
        return out if weight is None else (out, normed)
    return eager.adapter_residual(hidden, y, packed, weight, folded, spec, task_index, dropout, eps, forward, backward)
