"""The adapters of a stack whose weights are kept for many forwards, because nobody trains them.

In decoding a site has one row for each sample, and takes longer in the host's Python than in the kernel. So a backend
can have the weights in a form of its own (``Backend.prepare``), and a call of a site that does nothing but call one op,
which checks its arguments itself.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.base import Backend, BackendError, SiteCall
from ..backends.choice import chosen, serving
from ..layout import NO_DROPOUT, AdapterLayout, Dropout, Folded
from .checks import check_adapter, check_task_range
from .pieces_checks import check_residual
from .pieces_registered import piece_backend
from .public import backend_for, spec_of
from .registered import request_dtype
from .stack import Stack

_UNKNOWN: Any = object()

#: How many tasks a stack keeps ready to be called one by one.
_TASKS_KEPT = 16


class PreparedStack(Stack):
    """The adapters of one stack in many forwards, perhaps in several threads at once.

    Args:
        packed: [S, T, P], the packed weights, which no gradient reaches.
        layout: the layout of an adapter.
        activation: of the adapters.
    """

    def __init__(self, packed: Tensor, layout: AdapterLayout, activation: str):
        super().__init__(packed.detach(), layout, activation)
        self._task = -1  #: of all rows; negative for those that a task index names, or for the only one
        self._of_tasks: dict[int, PreparedStack] = {}
        self._prepared: dict[Any, Sequence[Tensor] | None] = {}  #: the sites' weights as a backend takes them
        self._calls: dict[Any, Sequence[SiteCall] | None] = {}
        self._residuals: dict[Any, bool] = {}  #: whether the backend of the adapters also adds

    @property
    def trains(self) -> bool:
        """Whether a backward is to reach the packed weights."""
        return False

    @property
    def nbytes(self) -> int:
        """The bytes of all weights that it holds."""
        # copied in one step, because other threads may fold for another dtype meanwhile
        folded = (part for sites in tuple(self._folded.values()) for of_site in sites for part in of_site)
        prepared = (weights for sites in tuple(self._prepared.values()) for weights in sites or ())
        return self._packed.nbytes + sum(part.nbytes for part in itertools.chain(folded, prepared))

    def of_task(self, task: int) -> PreparedStack:
        """The adapters of one of the T tasks, which share the weights of this stack.

        They must not refer to this stack, which refers to them: Python would free all of its weights, when they are
        replaced, only when it next looks for cycles, and that it does by the number of objects, which are few here.
        """
        kept = self._of_tasks
        stack = kept.get(task)
        if stack is None:
            bare = copy.copy(self)
            bare._of_tasks = {}
            stack = kept[task] = _OneTask(bare, task)
            for oldest in tuple(kept)[:-_TASKS_KEPT]:
                kept.pop(oldest, None)  # another thread may have taken it out
        return stack

    def make_ready(self, dtype: torch.dtype) -> None:
        """Fold the weights for inputs of ``dtype``, so that the first forward need not."""
        if self._sites_prepared(dtype) is None:
            self._sites_folded(dtype)

    def adapter(self, x: Tensor, site: int, task_index: Tensor | None) -> Tensor:
        """``ops.adapter`` of one site, for x [..., d]."""
        calls = self.calls_for(x)
        if calls is None:
            return super().adapter(x, site, task_index)
        try:
            return calls[site].adapter(x, task_index)
        except RuntimeError:
            self.explain(x, site, task_index)
            raise

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
        calls = self.residual_calls_for(y, hidden, dropout, weight)
        if calls is None:
            return super().adapter_residual(y, hidden, site, task_index, dropout, weight, eps)
        try:
            out, normed = calls[site].residual(hidden, y, task_index, weight, eps)
        except RuntimeError:
            self.explain_residual(y, hidden, site, task_index, weight)
            raise
        return out if weight is None else (out, normed)

    def calls_for(self, x: Tensor) -> Sequence[SiteCall] | None:
        """What runs each site for x: None where the backend has no calls, something traces or transforms what runs, or
        a gradient is to reach x."""
        # in_force() of functorch.py and traced() of public.py, without their frames
        if torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor:
            return None
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return None
        key = chosen(), x.dtype
        calls = self._calls.get(key, _UNKNOWN)
        if calls is _UNKNOWN:
            calls = self._calls[key] = self._made_calls(x.dtype)
        found: Sequence[SiteCall] | None = calls
        return found

    def residual_calls_for(
        self, y: Tensor, hidden: Tensor, dropout: Dropout, weight: Tensor | None
    ) -> Sequence[SiteCall] | None:
        """:meth:`calls_for`, for ``adapter_residual``."""
        if dropout.p != 0 or hidden.dtype is not y.dtype or type(hidden) is not Tensor or hidden.requires_grad:
            return None
        calls = self.calls_for(y)
        if calls is None or weight is None:
            return calls if calls is None or self._adds(y, weight) else None
        kind = type(weight)
        if kind is not torch.nn.Parameter and kind is not Tensor or torch.is_grad_enabled() and weight.requires_grad:
            return None
        return calls if self._adds(y, weight) else None

    def explain(self, x: Tensor, site: int, task_index: Tensor | None) -> None:
        """Raise the error that says what is expected, where x or the tasks do not fit."""
        check_adapter(x, self._packed[site], None, self.layout, task_index)
        check_task_range(task_index, self._packed.shape[1])

    def explain_residual(
        self, y: Tensor, hidden: Tensor, site: int, task_index: Tensor | None, weight: Tensor | None
    ) -> None:
        """:meth:`explain`, for ``adapter_residual``."""
        self.explain(y, site, task_index)
        check_residual(hidden, y, NO_DROPOUT, weight)

    def _adds(self, y: Tensor, weight: Tensor | None) -> bool:
        """Whether the backend that serves y also serves the residual."""
        key = chosen(), y.dtype, None if weight is None else weight.dtype
        adds = self._residuals.get(key)
        if adds is None:
            adapter = backend_for("adapter_forward", y, self._packed, self.layout, None)
            residual = piece_backend("residual_forward", y, None, weight)
            adds = self._residuals[key] = adapter is residual
        return adds

    def _made_calls(self, dtype: torch.dtype) -> Sequence[SiteCall] | None:
        found = self._sites_prepared(dtype)
        if found is None:
            return None
        backend, sites = found
        return [backend.site_call(weights, self._task) for weights in sites]

    def _sites_prepared(self, dtype: torch.dtype) -> tuple[Backend, Sequence[Tensor]] | None:
        """The backend that serves inputs of ``dtype``, and the sites' weights in its own form, if it has one."""
        packed, layout = self._packed, self.layout
        wanted = request_dtype(dtype, packed.dtype)
        try:
            backend = serving("adapter_forward", packed.device.type, wanted, layout.d, layout.b)
        except BackendError:
            return None  # to be refused
        key = backend.name, dtype
        if key not in self._prepared:
            folded = self._folded.get(dtype)
            with torch.inference_mode(False), torch.no_grad():
                if folded is None:
                    folded = self._fold(dtype)
                made = backend.prepare(folded, spec_of(layout, self.activation))
            if made is None:
                self._folded[dtype] = folded  # which the adapters are then called with
            self._prepared[key] = made
        found = self._prepared[key]
        return None if found is None else (backend, found)

    def _sites_folded(self, dtype: torch.dtype) -> list[Folded]:
        if dtype not in self._folded and not torch.compiler.is_compiling():
            # What is made in inference mode could not be saved for a backward to x later.
            with torch.inference_mode(False), torch.no_grad():
                self._folded[dtype] = self._fold(dtype)
        return super()._sites_folded(dtype)


class _OneTask(PreparedStack):
    """The adapters of one task of a stack, whose weights, in all forms that they get, are the stack's."""

    def __init__(self, whole: PreparedStack, task: int):
        super().__init__(whole._packed.narrow(1, task, 1), whole.layout, whole.activation)
        self._of, self._task = whole, task

    def _sites_prepared(self, dtype: torch.dtype) -> tuple[Backend, Sequence[Tensor]] | None:
        return self._of._sites_prepared(dtype)

    def _sites_folded(self, dtype: torch.dtype) -> list[Folded]:
        if dtype not in self._folded:
            whole, task = self._of._sites_folded(dtype), self._task
            self._folded[dtype] = [Folded(*(part.narrow(0, task, 1) for part in of_site)) for of_site in whole]
        return self._folded[dtype]
