"""The registered ops ``hyperformer_fast::*``: schema, implementation and fake kernel of each side by side, followed by
the autograd formulas.

These ops are called under ``torch.compile`` and ``torch.export`` and with tensor subclasses. They choose the backend
when they run. op.py says how an op is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend
from ..layout import AdapterLayout, AdapterSpec, Folded, Saved, accumulator_dtype
from .checks import check_adapter, check_fold, check_generate, check_hyper_adapter, check_task_range
from .gradients import generator_gradients, refuse_second_derivative, site_generator_gradients
from .op import Op


def _backend(op: str, like: Tensor, dtype: torch.dtype, layout: AdapterLayout, impl: str | None) -> Backend:
    return backends.serving(op, like.device.type, dtype, layout.d, layout.b, impl)


def request_dtype(dtype: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """The dtype for which a backend is chosen. It is float64 if the weights are, because the sums then must be float64;
    otherwise it is the dtype of x."""
    return torch.float64 if weights == torch.float64 else dtype


generate = Op("generate_weights", "Tensor E, Tensor G, Tensor g0", "Tensor packed")


@generate.implement
def _(E: Tensor, G: Tensor, g0: Tensor, impl: str | None) -> Tensor:
    check_generate(E, G, g0)
    return backends.serving("generate_weights", E.device.type, E.dtype, impl=impl).generate_weights(E, G, g0)


@generate.fake
def _(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    check_generate(E, G, g0)
    return E.new_empty(E.shape[0], E.shape[1], G.shape[1])


fold = Op("fold", "Tensor packed, {layout}, ScalarType dtype", "{folded}")


@fold.implement
def _(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype, impl: str | None) -> Folded:
    check_fold(packed, layout, dtype)
    backend = _backend("fold", packed, request_dtype(dtype, packed.dtype), layout, impl)
    return backend.fold(packed, layout, dtype)


@fold.fake
def _fake_fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    check_fold(packed, layout, dtype)
    table = Folded.table(layout, packed.shape[:-1], dtype, accumulator_dtype(dtype, packed.dtype))
    return Folded(*(part.empty(packed) for part in table))


forward = Op(
    "adapter_forward",
    "Tensor x, Tensor packed, {folded}, Tensor? task_index, {spec}, bool save",
    "Tensor out, {saved}",
)


@forward.implement
def _(
    x: Tensor,
    packed: Tensor,
    folded: Folded,
    task_index: Tensor | None,
    spec: AdapterSpec,
    save: bool,
    impl: str | None,
) -> tuple[Tensor, Saved]:
    check_adapter(x, packed, folded, spec.layout, task_index)
    check_task_range(task_index, packed.shape[0])
    backend = _backend("adapter_forward", x, request_dtype(x.dtype, packed.dtype), spec.layout, impl)
    return backend.adapter_forward(x, folded, spec, task_index, save)


@forward.fake
def _fake_forward(
    x: Tensor, packed: Tensor, folded: Folded, task_index: Tensor | None, spec: AdapterSpec, save: bool
) -> tuple[Tensor, Saved]:
    check_adapter(x, packed, folded, spec.layout, task_index)
    return x.new_empty(x.shape), Saved.empty(x, spec.layout, save)


backward = Op(
    "adapter_backward",
    "Tensor g, Tensor x, {saved}, Tensor packed, {folded}, Tensor? task_index, {spec}, bool need_dx, bool need_dpacked",
    "Tensor dx, Tensor dpacked",
)


@backward.implement
def _(
    g: Tensor,
    x: Tensor,
    saved: Saved,
    packed: Tensor,
    folded: Folded,
    task_index: Tensor | None,
    spec: AdapterSpec,
    need_dx: bool,
    need_dpacked: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    check_adapter(x, packed, folded, spec.layout, task_index, g, saved)
    check_task_range(task_index, packed.shape[0])
    backend = _backend("adapter_backward", x, request_dtype(x.dtype, packed.dtype), spec.layout, impl)
    return backend.adapter_backward(g, x, saved, packed, folded, spec, task_index, need_dx, need_dpacked)


@backward.fake
def _(
    g: Tensor,
    x: Tensor,
    saved: Saved,
    packed: Tensor,
    folded: Folded,
    task_index: Tensor | None,
    spec: AdapterSpec,
    need_dx: bool,
    need_dpacked: bool,
) -> tuple[Tensor, Tensor]:
    check_adapter(x, packed, folded, spec.layout, task_index, g, saved)
    return x.new_empty(x.shape if need_dx else (0,)), packed.new_empty(packed.shape if need_dpacked else (0,))


hyper = Op(
    "hyper_adapter",
    "Tensor x, Tensor E, Tensor G, Tensor g0, Tensor? task_index, {spec}, bool save",
    "Tensor out, {saved}, Tensor packed, {folded}",
)


@hyper.implement
def _(
    x: Tensor,
    E: Tensor,
    G: Tensor,
    g0: Tensor,
    task_index: Tensor | None,
    spec: AdapterSpec,
    save: bool,
    impl: str | None,
) -> tuple[Tensor, Saved, Tensor, Folded]:
    check_hyper_adapter(x, E, G, g0, spec.layout, task_index)
    check_task_range(task_index, E.shape[0])
    backend = _backend("hyper_adapter", x, request_dtype(x.dtype, E.dtype), spec.layout, impl)
    return backend.hyper_adapter(x, E, G, g0, spec, task_index, save)


@hyper.fake
def _(
    x: Tensor, E: Tensor, G: Tensor, g0: Tensor, task_index: Tensor | None, spec: AdapterSpec, save: bool
) -> tuple[Tensor, Saved, Tensor, Folded]:
    check_hyper_adapter(x, E, G, g0, spec.layout, task_index)
    packed = E.new_empty(E.shape[0], spec.layout.numel)
    folded = _fake_fold(packed, spec.layout, x.dtype)
    out, saved = _fake_forward(x, packed, folded, task_index, spec, save)
    return out, saved, packed, folded


def _generate_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _generate_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    E, G = ctx.saved_tensors
    return generator_gradients(g, E, G, ctx.needs_input_grad)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, packed, folded, task_index, ctx.spec, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], packed, *folded, task_index)


def _forward_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(g)
    need_dx, need_dpacked = ctx.needs_input_grad[:2]
    dx, dpacked = _call_backward(ctx, g, ctx.saved_tensors, need_dx, need_dpacked)
    return dx if need_dx else None, dpacked if need_dpacked else None


def _hyper_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, E, G, _, task_index, ctx.spec, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(E, G, x, *output[1:], task_index)


def _hyper_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(g)
    E, G, *saved = ctx.saved_tensors
    need_dx, *needs = ctx.needs_input_grad[:4]
    dx, dpacked = _call_backward(ctx, g, saved, need_dx, any(needs))
    return dx if need_dx else None, *site_generator_gradients(dpacked, E, G, needs)


def _call_backward(
    ctx: Any, g: Tensor, saved: Sequence[Tensor], need_dx: bool, need_dpacked: bool
) -> tuple[Tensor, Tensor]:
    op = torch.ops.hyperformer_fast.adapter_backward
    dx, dpacked = op(g, *saved, *ctx.spec.arguments, need_dx, need_dpacked, impl=ctx.impl)
    return dx, dpacked


generate.differentiate(_generate_setup, _generate_backward)
forward.differentiate(_forward_setup, _forward_backward)
hyper.differentiate(_hyper_setup, _hyper_backward)
