"""The adapters of a whole stack: what is done once for all of them, and how their gradients come together.

A backend may run a stack in a way of its own (``Backend.stack``). All its adapters then read one tensor, the *token*, a
view of the stack's packed weights, and the backward of an adapter returns no gradient for it: it leaves what it has
with the backend. The token's own backward runs once in a backward pass, after every adapter that takes part in the
pass, and makes the gradient of all packed weights. No unfinished number reaches autograd, its hooks or anomaly
detection.

Otherwise each adapter is called by itself with its part of the packed weights, which a single ``unbind`` takes apart:
indexing site by site would fill a tensor of zeros as large as all of them for each site.

Letters: S sites, T tasks, P packed numbers per adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.base import BackendError, StackKernels
from ..backends.choice import chosen
from ..layout import NO_DROPOUT, AdapterLayout, Dropout, Folded
from . import functorch
from .checks import check_adapter, check_task_range
from .gradients import refuse_second_derivative
from .pieces import residual
from .public import adapter, backend_for, checked_adapter, fold, spec_of, traced

#: The kernels, the site, the task index, and what raises where the arguments do not fit together.
_Call = tuple[StackKernels, int, "Tensor | None", Callable[[], None]]

_UNKNOWN: Any = object()


class Stack:
    """The adapters of one stack in one forward.

    Args:
        packed: [S, T, P], the packed weights.
        layout: the layout of an adapter.
        activation: of the adapters.
    """

    def __init__(self, packed: Tensor, layout: AdapterLayout, activation: str):
        self.layout, self.activation = layout, activation
        self._packed, self._whole = packed, packed.detach()
        self._sites: Sequence[Tensor] = ()
        self._differentiable = False  # whether gradients were on when ``_sites`` were made
        self._folded: dict[torch.dtype, list[Folded]] = {}
        self._chosen: dict[Any, StackKernels | None] = {}
        self._kernels: dict[Any, StackKernels | None] = {}
        self._tokens: dict[StackKernels, Tensor] = {}
        self._passed: set[Any] = set()  #: shapes, dtypes and devices that passed ``check_adapter``
        self._in_range: tuple[Tensor | None, int] = None, 0  #: tasks that were checked, and their version

    def __len__(self) -> int:
        return self._packed.shape[0]

    @property
    def trains(self) -> bool:
        """Whether a backward is to reach the packed weights. torch.func has gradients of its own."""
        return torch.is_grad_enabled() and self._packed.requires_grad and not functorch.in_force()

    @property
    def packed(self) -> Tensor:
        """[S, T, P], the packed weights."""
        return self._packed

    def adapter(self, x: Tensor, site: int, task_index: Tensor | None) -> Tensor:
        """``ops.adapter`` of one site, for x [..., d]."""
        if traced(x, self._packed) or functorch.in_force():
            packed, folded = self._of_site(site, x.dtype)
            return adapter(x, packed, self.layout, self.activation, folded, task_index)
        save = torch.is_grad_enabled() and (x.requires_grad or self._packed.requires_grad)
        choice = chosen(), x.dtype, x.device, save
        kernels = self._chosen.get(choice, _UNKNOWN)
        if kernels is _UNKNOWN:
            kernels = self._chosen[choice] = self._kernels_for(x, save)
        if kernels is None:
            return self._alone(x, site, task_index, save)

        def check() -> None:
            check_adapter(x, self._packed[site], None, self.layout, task_index)

        if task_index is not None:
            self._check_range(task_index)
        if not save:
            out: Tensor = kernels.forward(x, site, task_index, False, check)[0]
            return out
        token = self._tokens.get(kernels)
        if token is None:
            token = self._tokens[kernels] = _token(self._packed, kernels)
        return _adapter(x, token, (kernels, site, task_index, check))

    def adapter_residual(
        self,
        y: Tensor,
        hidden: Tensor,
        site: int,
        task_index: Tensor | None,
        dropout: Dropout = NO_DROPOUT,
        weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Any:
        """``ops.adapter_residual`` of one site, for y and hidden [..., d]."""
        return residual(hidden, self.adapter(y, site, task_index), dropout, weight, eps)

    def _kernels_for(self, x: Tensor, save: bool) -> StackKernels | None:
        """The stack of the backend that serves x, if it has a way of its own."""
        packed = self._packed
        if x.device != packed.device or not x.is_floating_point():
            return None  # to be refused
        try:
            backend = backend_for("adapter_forward", x, packed, self.layout, None)
            if save and backend_for("adapter_backward", x, packed, self.layout, None) is not backend:
                return None
        except BackendError:
            return None
        key = backend.name, x.dtype
        if key not in self._kernels:
            self._kernels[key] = backend.stack(self._whole, spec_of(self.layout, self.activation), x.dtype)
        return self._kernels[key]

    def _check_range(self, task_index: Tensor) -> None:
        """``check_task_range``, once for the tasks of all sites."""
        if task_index.device.type != "cpu":
            return
        before, version = self._in_range
        now = -1 if task_index.is_inference() else task_index._version  # inference tensors do not count their versions
        if task_index is not before or now != version or now < 0:
            check_task_range(task_index, self._packed.shape[1])
            self._in_range = task_index, now

    def _alone(self, x: Tensor, site: int, task_index: Tensor | None, save: bool) -> Tensor:
        """``ops.adapter`` with the packed weights of the site, and shapes checked once for all sites."""
        packed, folded = self._of_site(site, x.dtype)
        tasks = None if task_index is None else (task_index.shape, task_index.dtype, task_index.device)
        key = x.shape, x.dtype, x.device, tasks
        if key not in self._passed:
            check_adapter(x, packed, folded, self.layout, task_index)
            self._passed.add(key)
        if task_index is not None:
            self._check_range(task_index)
        return checked_adapter(x, packed, folded, spec_of(self.layout, self.activation), task_index, save)

    def _of_site(self, site: int, dtype: torch.dtype) -> tuple[Tensor, Folded]:
        """The packed weights of a site, and the folded ones for inputs of ``dtype``."""
        wanted = torch.is_grad_enabled() and self._packed.requires_grad
        if not self._sites or wanted and not self._differentiable:
            self._sites, self._differentiable = self._packed.unbind(0), wanted
        return self._sites[site], self._sites_folded(dtype)[site]

    def _sites_folded(self, dtype: torch.dtype) -> list[Folded]:
        """The folded weights of every site for inputs of ``dtype``."""
        folded = self._folded.get(dtype)
        if folded is None:
            folded = self._folded[dtype] = self._fold(dtype)
        return folded

    def _fold(self, dtype: torch.dtype) -> list[Folded]:
        parts = fold(self._whole, self.layout, dtype)
        return [Folded(*of_site) for of_site in zip(*(part.unbind(0) for part in parts))]


class _Token(torch.autograd.Function):
    """The packed weights of a stack to its token."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, kernels: StackKernels) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.kernels = kernels
        return packed.view_as(packed)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return g if _compiled_autograd() else ctx.kernels.collect(g), None


def _compiled_autograd() -> bool:
    """Whether compiled autograd runs the backward: it may run traced, where passes cannot be told apart."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region


class _Adapter(torch.autograd.Function):
    """The adapter of one site."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, call: _Call) -> Tensor:
        kernels, site, task_index, check = call
        out, saved = kernels.forward(x, site, task_index, True, check)
        ctx.save_for_backward(x, saved, token, task_index)  # the token, so that a change of the weights is noticed
        ctx.kernels, ctx.site = kernels, site
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(g)
        x, saved, _, task_index = ctx.saved_tensors
        need_dx, need_dpacked, _ = ctx.needs_input_grad
        leave = not _compiled_autograd()
        dx, dtoken = ctx.kernels.backward(g, x, saved, ctx.site, task_index, need_dx, need_dpacked, leave)
        return dx, dtoken, None


_token: Callable[..., Tensor] = _Token.apply
# Without the layer of Function.apply that looks for functorch transforms, which Stack.adapter has done: it takes longer
# than a launch.
_adapter: Callable[..., Tensor] = super(torch.autograd.Function, _Adapter).apply
