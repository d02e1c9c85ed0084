"""The registered ops of a T5's pieces: schema, implementation and fake kernel of each side by side, followed by the
autograd formulas. registered.py has those of the adapters, attention_registered.py those of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..activations import ACTIVATIONS
from ..backends import Backend
from ..layout import AdapterSpec, Dropout, Folded, Saved, accumulator_dtype, normed_dtype
from . import pieces_gradients as gradients
from .checks import check_adapter, check_task_range
from .op import Op
from .pieces_checks import (
    check_act_dropout,
    check_gradient,
    check_residual,
)

_OPS = torch.ops.hyperformer_fast


def piece_backend(op: str, x: Tensor, impl: str | None, weight: Tensor | None = None) -> Backend:
    """The backend that serves ``op`` for x. float64 anywhere is a request for float64."""
    dtype = x.dtype
    if weight is not None and weight.dtype == torch.float64:
        dtype = torch.float64
    return backends.serving_piece(op, x.device, dtype, impl)


residual_forward = Op(
    "residual_forward",
    "Tensor? hidden, Tensor y, Tensor? weight, {dropout}, float eps, bool save",
    "Tensor out, Tensor normed, Tensor rstd",
)


@residual_forward.implement
def _(
    hidden: Tensor | None,
    y: Tensor,
    weight: Tensor | None,
    dropout: Dropout,
    eps: float,
    save: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_residual(hidden, y, dropout, weight)
    backend = piece_backend("residual_forward", y, impl, weight)
    out, normed, rstd = backend.residual_forward(hidden, y, dropout, weight, eps, save)
    if weight is None:  # the dtype of what is not wanted may be any that suits the backend, but not for a compiler
        return out, y.new_empty(0), y.new_empty(0, dtype=accumulator_dtype(y.dtype))
    return out, normed, rstd


@residual_forward.fake
def _fake_residual(
    hidden: Tensor | None, y: Tensor, weight: Tensor | None, dropout: Dropout, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_residual(hidden, y, dropout, weight)
    out = y.new_empty((0,) if hidden is None else y.shape)
    if weight is None:
        return out, y.new_empty(0), y.new_empty(0, dtype=accumulator_dtype(y.dtype))
    rstd = y.new_empty(y.shape[:-1] if save else (0,), dtype=accumulator_dtype(y.dtype, weight.dtype))
    return out, y.new_empty(y.shape, dtype=normed_dtype(y.dtype, weight.dtype)), rstd


residual_backward = Op(
    "residual_backward",
    "Tensor? g_out, Tensor? g_normed, Tensor? out, Tensor? weight, Tensor? rstd, {dropout}, bool need_dy, "
    "bool need_dweight",
    "Tensor dhidden, Tensor dy, Tensor dweight",
)


def _check_residual_backward(
    g_out: Tensor | None,
    g_normed: Tensor | None,
    out: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    dropout: Dropout,
) -> Tensor:
    """Check the arguments, and return the tensor whose shape and dtype the gradients have."""
    if g_normed is None:
        if g_out is None:
            raise ValueError("pass the gradient of out, or of normed, or both")
        check_act_dropout(g_out, None, dropout)
        return g_out
    if out is None or weight is None or rstd is None:
        raise ValueError("the gradient of normed needs out, weight and rstd")
    check_residual(out, out, dropout, weight, "out")
    check_gradient(g_out, "g_out", out, out.dtype)
    check_gradient(g_normed, "g_normed", out, normed_dtype(out.dtype, weight.dtype))
    if rstd.shape != out.shape[:-1]:
        raise ValueError(f"rstd must be {list(out.shape[:-1])}, got {list(rstd.shape)}")
    return out


@residual_backward.implement
def _(
    g_out: Tensor | None,
    g_normed: Tensor | None,
    out: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    dropout: Dropout,
    need_dy: bool,
    need_dweight: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = _check_residual_backward(g_out, g_normed, out, weight, rstd, dropout)
    backend = piece_backend("residual_backward", like, impl, weight)
    dhidden, dy, dweight = backend.residual_backward(g_out, g_normed, out, weight, rstd, dropout, need_dy, need_dweight)
    if g_normed is None:
        return like.new_empty(0), dy, like.new_empty(0, dtype=accumulator_dtype(like.dtype))
    return dhidden, dy, dweight


@residual_backward.fake
def _(
    g_out: Tensor | None,
    g_normed: Tensor | None,
    out: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    dropout: Dropout,
    need_dy: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    like = _check_residual_backward(g_out, g_normed, out, weight, rstd, dropout)
    dy = like.new_empty(like.shape if need_dy and dropout.p > 0 else (0,))
    if g_normed is None:
        return like.new_empty(0), dy, like.new_empty(0, dtype=accumulator_dtype(like.dtype))
    assert weight is not None
    return like.new_empty(like.shape), dy, weight.new_empty(weight.shape if need_dweight else (0,))


act_dropout_forward = Op("act_dropout_forward", "Tensor a, Tensor? c, int activation, {dropout}", "Tensor out")


@act_dropout_forward.implement
def _(a: Tensor, c: Tensor | None, activation: int, dropout: Dropout, impl: str | None) -> Tensor:
    check_act_dropout(a, c, dropout)
    backend = piece_backend("act_dropout_forward", a, impl)
    return backend.act_dropout_forward(a, c, ACTIVATIONS[activation], dropout)


@act_dropout_forward.fake
def _(a: Tensor, c: Tensor | None, activation: int, dropout: Dropout) -> Tensor:
    check_act_dropout(a, c, dropout)
    return a.new_empty(a.shape)


act_dropout_backward = Op(
    "act_dropout_backward",
    "Tensor g, Tensor a, Tensor? c, int activation, {dropout}",
    "Tensor da, Tensor dc",
)


@act_dropout_backward.implement
def _(
    g: Tensor, a: Tensor, c: Tensor | None, activation: int, dropout: Dropout, impl: str | None
) -> tuple[Tensor, Tensor]:
    check_act_dropout(a, c, dropout)
    check_gradient(g, "g", a, a.dtype)
    backend = piece_backend("act_dropout_backward", a, impl)
    return backend.act_dropout_backward(g, a, c, ACTIVATIONS[activation], dropout)


@act_dropout_backward.fake
def _(g: Tensor, a: Tensor, c: Tensor | None, activation: int, dropout: Dropout) -> tuple[Tensor, Tensor]:
    check_act_dropout(a, c, dropout)
    check_gradient(g, "g", a, a.dtype)
    return a.new_empty(a.shape), a.new_empty((0,) if c is None else a.shape)


adapter_residual_forward = Op(
    "adapter_residual_forward",
    "Tensor hidden, Tensor y, Tensor packed, Tensor? weight, {folded}, Tensor? task_index, {spec}, {dropout}, "
    "float eps, bool save",
    "Tensor out, {saved}, Tensor normed, Tensor rstd",
)


def adapter_residual_backends(
    y: Tensor, packed: Tensor, weight: Tensor | None, spec: AdapterSpec, impl: str | None, save: bool
) -> tuple[Backend, Backend | None, bool]:
    """The backend that serves the adapter of ``adapter_residual``; that of its backward, if it is to be kept; and
    whether both serve the residual, too, in the same calls."""
    dtype = torch.float64 if packed.dtype == torch.float64 else y.dtype
    device, layout = y.device.type, spec.layout
    adapter = backends.serving("adapter_forward", device, dtype, layout.d, layout.b, impl)
    # A backend without kernels for the pieces may be asked for by name: it then serves the adapter alone.
    whole = _serves(adapter, "adapter_residual_forward", y, weight, impl)
    if not save:
        return adapter, None, whole
    backward = backends.serving("adapter_backward", device, dtype, layout.d, layout.b, impl)
    return adapter, backward, whole and _serves(backward, "residual_backward", y, weight, impl)


def _serves(backend: Backend, op: str, y: Tensor, weight: Tensor | None, impl: str | None) -> bool:
    return op in backend.serves and piece_backend(op, y, of_piece(op, y, weight, impl), weight) is backend


def of_piece(op: str, y: Tensor, weight: Tensor | None, impl: str | None) -> str | None:
    """``impl``, the name of an adapter's backend, or None if that does not serve this piece."""
    if impl is None:
        return None
    try:
        piece_backend(op, y, impl, weight)
    except backends.BackendError:
        return None
    return impl


@adapter_residual_forward.implement
def _(
    hidden: Tensor,
    y: Tensor,
    packed: Tensor,
    weight: Tensor | None,
    folded: Folded,
    task_index: Tensor | None,
    spec: AdapterSpec,
    dropout: Dropout,
    eps: float,
    save: bool,
    impl: str | None,
) -> tuple[Tensor, Saved, Tensor, Tensor]:
    check_adapter(y, packed, folded, spec.layout, task_index)
    check_task_range(task_index, packed.shape[0])
    check_residual(hidden, y, dropout, weight)
    backend, _, whole = adapter_residual_backends(y, packed, weight, spec, impl, False)
    if whole:
        return backend.adapter_residual_forward(hidden, y, folded, spec, task_index, dropout, weight, eps, save)
    adapted, saved = backend.adapter_forward(y, folded, spec, task_index, save)
    of_residual = of_piece("residual_forward", y, weight, impl)
    residual_backend = piece_backend("residual_forward", y, of_residual, weight)
    out, normed, rstd = residual_backend.residual_forward(hidden, adapted, dropout, weight, eps, save)
    return out, saved, normed, rstd


@adapter_residual_forward.fake
def _(
    hidden: Tensor,
    y: Tensor,
    packed: Tensor,
    weight: Tensor | None,
    folded: Folded,
    task_index: Tensor | None,
    spec: AdapterSpec,
    dropout: Dropout,
    eps: float,
    save: bool,
) -> tuple[Tensor, Saved, Tensor, Tensor]:
    check_adapter(y, packed, folded, spec.layout, task_index)
    out, normed, rstd = _fake_residual(hidden, y, weight, dropout, eps, save)
    return out, Saved.empty(y, spec.layout, save), normed, rstd


def keep_dropout(ctx: Any, dropout: Dropout) -> None:
    ctx.p, ctx.stream = dropout.p, dropout.stream


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, y, weight, dropout, _, _ = inputs
    out, _, rstd = output
    ctx.set_materialize_grads(False)
    keep_dropout(ctx, dropout)
    ctx.summed, ctx.normed = hidden is not None, weight is not None
    kept = () if weight is None else (y if hidden is None else out, weight, rstd)
    ctx.save_for_backward(dropout.seed, *kept)


def _residual_gradients(
    g_out: Tensor | None,
    g_normed: Tensor | None,
    kept: Sequence[Any],
    dropout: Dropout,
    need_dy: bool,
    need_dweight: bool,
    impl: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    for g in (g_out, g_normed):
        gradients.refuse(g, "residual")

    def call(*arguments: Any) -> Any:
        *tensors, dropout, need_dy, need_dweight = arguments
        return _OPS.residual_backward(*tensors, *dropout, need_dy, need_dweight, impl=impl)

    return gradients.residual(call, (g_out, g_normed), kept, dropout, need_dy, need_dweight)


def _residual_backward(ctx: Any, g_out: Tensor | None, g_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    seed, *kept = ctx.saved_tensors
    need_hidden, need_y, need_weight = ctx.needs_input_grad[:3]
    dropout = Dropout(ctx.p, seed, ctx.stream)
    dhidden, dy, dweight = _residual_gradients(
        g_out if ctx.summed else None,
        g_normed if ctx.normed else None,
        kept,
        dropout,
        need_y,
        need_weight,
        ctx.impl,
    )
    return dhidden if need_hidden else None, dy if need_y else None, dweight


def _act_dropout_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, c, ctx.activation, dropout = inputs
    keep_dropout(ctx, dropout)
    ctx.save_for_backward(a, c, dropout.seed)


def _act_dropout_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gradients.refuse(g, "act_dropout")
    a, c, seed = ctx.saved_tensors
    da, dc = _OPS.act_dropout_backward(g, a, c, ctx.activation, ctx.p, seed, ctx.stream, impl=ctx.impl)
    need_a, need_c = ctx.needs_input_grad[:2]
    return da if need_a else None, dc if need_c else None


def _adapter_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, y, packed, weight, folded, task_index, ctx.spec, dropout, _, _ = inputs
    out, *saved, _, rstd = output
    ctx.set_materialize_grads(False)
    keep_dropout(ctx, dropout)
    ctx.normed = weight is not None
    kept = () if weight is None else (out, weight, rstd)
    ctx.save_for_backward(dropout.seed, y, *saved, packed, *folded, task_index, *kept)


def _adapter_residual_backward(ctx: Any, g_out: Tensor | None, g_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    seed, *of_adapter = ctx.saved_tensors[:14]
    need_hidden, need_y, need_packed, need_weight = ctx.needs_input_grad[:4]
    needed = need_y or need_packed
    kept = ctx.saved_tensors[14:]
    dhidden, g, dweight = _residual_gradients(
        g_out,
        g_normed if ctx.normed else None,
        kept,
        Dropout(ctx.p, seed, ctx.stream),
        needed,
        need_weight,
        of_piece("residual_backward", of_adapter[0], kept[1] if ctx.normed else None, ctx.impl),
    )
    dy = dpacked = None
    if needed and g is not None:
        dy, dpacked = _OPS.adapter_backward(g, *of_adapter, *ctx.spec.arguments, need_y, need_packed, impl=ctx.impl)
    return (
        dhidden if need_hidden else None,
        dy if need_y else None,
        dpacked if need_packed else None,
        dweight,
    )


residual_forward.differentiate(_residual_setup, _residual_backward, 1)
act_dropout_forward.differentiate(_act_dropout_setup, _act_dropout_backward)
adapter_residual_forward.differentiate(_adapter_residual_setup, _adapter_residual_backward, 5)
