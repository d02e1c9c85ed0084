"""The public functions of a T5's pieces: what lies between its matrix products, each in one pass over its input.

A call takes one of the three paths of public.py. What the pieces compute is written in ``t5_reference``. Those of
attention and the loss are in attention_public.py.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .. import philox
from .. import t5_reference as plain
from ..activations import ACTIVATIONS, canonical_activation
from ..layout import NO_DROPOUT, AdapterLayout, Dropout, Folded
from . import functorch
from . import pieces_eager as eager
from .checks import check_adapter, check_task_range
from .pieces_checks import check_act_dropout, check_residual
from .pieces_registered import adapter_residual_backends, of_piece, piece_backend
from .public import adapter, fold, spec_of, traced

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


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
        dropout = philox.rounded(dropout)
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
        dropout = philox.rounded(dropout)
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
        dropout = philox.rounded(dropout)
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
