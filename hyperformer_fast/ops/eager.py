"""The ops in eager mode, as autograd functions that call a backend directly.

Calling a registered op whose autograd formula is written in Python takes several times as long (docs/design.md). The
compiled libraries have autograd functions in C++ (csrc/autograd), which take less of the host's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..layout import AdapterSpec, Folded, Saved
from .gradients import generator_gradients, refuse_second_derivative, site_generator_gradients


class _Generate(torch.autograd.Function):
    """The autograd function of ``generate_weights``."""

    @staticmethod
    def forward(ctx: Any, E: Tensor, G: Tensor, g0: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(E, G)
        return backend.generate_weights(E, G, g0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        E, G = ctx.saved_tensors
        return *generator_gradients(g, E, G, ctx.needs_input_grad), None


class _Adapter(torch.autograd.Function):
    """The autograd function of ``adapter``.

    The backend of the backward is chosen together with that of the forward, because the backward may run in another
    thread, which ``use_backend`` does not affect.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        folded: Folded,
        spec: AdapterSpec,
        task_index: Tensor | None,
        forward: Backend,
        backward: Backend,
    ) -> Tensor:
        out, saved = forward.adapter_forward(x, folded, spec, task_index, True)
        ctx.save_for_backward(x, *saved, packed, *folded, task_index)
        ctx.spec, ctx.backend = spec, backward
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(g)
        need_dx, need_dpacked = ctx.needs_input_grad[:2]
        dx, dpacked = _gradients(ctx, g, ctx.saved_tensors, need_dx, need_dpacked)
        return dx if need_dx else None, dpacked if need_dpacked else None, None, None, None, None, None


class _HyperAdapter(torch.autograd.Function):
    """The autograd function of ``hyper_adapter``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        E: Tensor,
        G: Tensor,
        g0: Tensor,
        spec: AdapterSpec,
        task_index: Tensor | None,
        forward: Backend,
        backward: Backend,
    ) -> Tensor:
        out, saved, packed, folded = forward.hyper_adapter(x, E, G, g0, spec, task_index, True)
        ctx.save_for_backward(E, G, x, *saved, packed, *folded, task_index)
        ctx.spec, ctx.backend = spec, backward
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(g)
        E, G, *saved = ctx.saved_tensors
        need_dx, *needs = ctx.needs_input_grad[:4]
        dx, dpacked = _gradients(ctx, g, saved, need_dx, any(needs))
        return dx if need_dx else None, *site_generator_gradients(dpacked, E, G, needs), None, None, None, None


def _gradients(ctx: Any, g: Tensor, kept: Any, need_dx: bool, need_dpacked: bool) -> tuple[Tensor, Tensor]:
    x, z, r, pre_mean, pre_rstd, packed, *folded, task_index = kept
    backend: Backend = ctx.backend
    saved = Saved(z, r, pre_mean, pre_rstd)
    return backend.adapter_backward(g, x, saved, packed, Folded(*folded), ctx.spec, task_index, need_dx, need_dpacked)


generate_weights: Callable[..., Tensor] = _Generate.apply
_adapter: Callable[..., Tensor] = _Adapter.apply
_hyper_adapter: Callable[..., Tensor] = _HyperAdapter.apply


def adapter(
    x: Tensor,
    packed: Tensor,
    folded: Folded,
    spec: AdapterSpec,
    task_index: Tensor | None,
    forward: Backend,
    backward: Backend,
) -> Tensor:
    """``ops.adapter`` with a gradient, by the backends of its forward and of its backward."""
    if forward is backward and (nodes := forward.nodes):
        return nodes.adapter(x, packed, folded, spec, task_index)
    return _adapter(x, packed, folded, spec, task_index, forward, backward)


def hyper_adapter(
    x: Tensor,
    E: Tensor,
    G: Tensor,
    g0: Tensor,
    spec: AdapterSpec,
    task_index: Tensor | None,
    forward: Backend,
    backward: Backend,
) -> Tensor:
    """``ops.hyper_adapter`` with a gradient, by the backends of its forward and of its backward."""
    if forward is backward and (nodes := forward.nodes):
        out = nodes.hyper_adapter(x, E, G, g0, spec, task_index)
        if out is not None:
            return out
    return _hyper_adapter(x, E, G, g0, spec, task_index, forward, backward)
