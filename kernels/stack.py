"""The adapters of a whole stack in Triton, with as little time of the host per adapter as possible.

Each call allocates its output and one buffer, and repeats a recorded launch (launch.py). The backward of an adapter
leaves its partial sums; ``collect`` finishes the weight gradients of all adapters of the stack in one launch.

Letters: S sites of the stack, T tasks, P packed numbers per adapter, B samples of M rows each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.base import StackKernels
from ..layout import AdapterSpec, Folded, Saved, buffer_numel, in_buffer
from . import tiles
from .adapter_backward import per_row_table, row_gradients
from .adapter_forward import adapter_forward
from .common import device_guard, matmul_precision, rows_of
from .fold import fold
from .launch import Plans, recording
from .weight_gradients import Schedule, finish, part_size, partial_sums, schedule

#: The most bytes that the partial sums of a stack may take. Beyond, every adapter's gradient is finished at once.
MOST_PART_BYTES = 512 << 20

#: Plans by what is the same for all calls of a stack.
_plans: dict[Any, Plans] = {}


class _Shapes(NamedTuple):
    """What an adapter allocates for an input of one shape."""

    contiguous: bool
    N: int
    saved: int  #: numbers of the input's dtype that the forward keeps
    per_row: int  #: numbers of the input's dtype between the backward's kernels


class _Tasks(NamedTuple):
    """A task index, and what launches depend on of it."""

    index: Tensor
    kind: tuple[Any, ...]


class _Pass:
    """What the adapters of one backward pass have left.

    Args:
        segments: how the rows are divided.
        part: [S, segments, SIZE], the partial sums; None where they would take too much memory.
        sites: S.
    """

    def __init__(self, segments: Schedule, part: Tensor | None, sites: int):
        self.segments, self.part = segments, part
        self.waiting = [False] * sites  #: whose partial sums lie in ``part``
        self.finished: list[tuple[int, Tensor]] = []  #: sites and their gradients [T, P]


class _Place(NamedTuple):
    """Where an adapter stores its partial sums."""

    part: Tensor  #: [any, segments, SIZE]
    index: int  #: in ``part``
    left: _Pass | None  #: the pass to whose end they wait; None to finish them at once


class TritonStack(StackKernels):
    """The adapters of a stack, for inputs of one dtype.

    Args:
        packed: [S, T, P], contiguous, T >= 1.
        spec: the adapters' layout and activation.
        dtype: the dtype of the inputs.
    """

    def __init__(self, packed: Tensor, spec: AdapterSpec, dtype: torch.dtype):
        self._packed, self._spec = packed, spec
        self._folded = fold(packed, spec.layout, dtype)
        parts = (*self._folded, packed)
        starts = [part.data_ptr() for part in parts]
        strides = [part.stride(0) * part.element_size() for part in parts]
        self._addresses = [
            [start + site * stride for start, stride in zip(starts, strides)] for site in range(packed.shape[0])
        ]
        arch = tiles.architecture(packed.device)
        self._plans = _plans.setdefault((spec, packed.shape[1], packed.dtype, packed.device, arch), Plans())
        self._segment_bytes = part_size(spec.layout) * torch.float32.itemsize
        self._shapes: dict[Any, _Shapes] = {}
        self._schedules: dict[Any, tuple[Tensor | None, Schedule]] = {}
        self._passes: dict[int, _Pass] = {}
        # the last of each
        self._tasks: _Tasks | None = None
        self._last_segments: tuple[Tensor | None, int, torch.Size, int, Schedule] | None = None

    def _tensors(self, site: int) -> list[Tensor]:
        """What ``_addresses`` are the addresses of."""
        return [*(part[site] for part in self._folded), self._packed[site]]

    def _key(self, x: Tensor, task_index: Tensor | None) -> tuple[Any, ...]:
        """What launches for x depend on beside the key of ``_plans`` and the alignment of addresses."""
        tasks = None if task_index is None else self._tasks_of(task_index).kind
        precision = matmul_precision(x.dtype) if x.dtype == torch.float32 else None
        return x.shape, x.stride(), x.dtype, x.device, tasks, precision, tiles.epoch

    def _tasks_of(self, task_index: Tensor) -> _Tasks:
        known = self._tasks
        if known is None or known.index is not task_index:
            kind = task_index.dtype, task_index.shape, task_index.stride(), task_index.device
            known = self._tasks = _Tasks(task_index, kind)
        return known

    def _shapes_of(self, x: Tensor) -> _Shapes:
        key = x.shape, x.stride()
        shapes = self._shapes.get(key)
        if shapes is None:
            layout, lead = self._spec.layout, x.shape[:-1]
            saved = buffer_numel(Saved.table(layout, lead, x.dtype), x.dtype)
            per_row = buffer_numel(per_row_table(layout, lead.numel(), x.dtype), x.dtype)
            shapes = self._shapes[key] = _Shapes(x.is_contiguous(), lead.numel(), saved, per_row)
        return shapes

    def forward(
        self, x: Tensor, site: int, task_index: Tensor | None, save: bool, check: Callable[[], None]
    ) -> tuple[Tensor, Tensor | None]:
        key = self._key(x, task_index), save
        plan = self._plans.get(key)
        if plan is None:
            check()
        shapes = self._shapes_of(x)
        out = torch.empty_like(x) if shapes.contiguous else x.new_empty(x.shape)
        buffer = x.new_empty(shapes.saved) if save else None
        addresses = [
            x.data_ptr(),
            out.data_ptr(),
            0 if buffer is None else buffer.data_ptr(),
            0 if task_index is None else task_index.data_ptr(),
            *self._addresses[site],
        ]
        if plan is None or not plan(addresses):
            with recording([x, out, buffer, task_index, *self._tensors(site)]) as recorded:
                self._forward(x, site, task_index, out, buffer)
            self._plans.keep(key, recorded)
        return out, buffer

    def _forward(self, x: Tensor, site: int, task_index: Tensor | None, out: Tensor, buffer: Tensor | None) -> None:
        """Launch the forward through Triton."""
        table = Saved.table(self._spec.layout, x.shape[:-1], x.dtype, buffer is not None)
        saved = Saved(*(part.empty(x) for part in table) if buffer is None else in_buffer(buffer, table))
        folded = Folded(*(part[site] for part in self._folded))
        adapter_forward(x, folded, self._spec, task_index, buffer is not None, out, saved)

    def backward(
        self,
        g: Tensor,
        x: Tensor,
        buffer: Tensor,
        site: int,
        task_index: Tensor | None,
        need_dx: bool,
        need_dpacked: bool,
        leave: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        shapes = self._shapes_of(x)
        dx = None
        if need_dx:
            dx = torch.empty_like(x) if shapes.contiguous else x.new_empty(x.shape)
        if shapes.N == 0 or not (need_dx or need_dpacked):
            return dx, None
        per_row = place = segments = part = table = None
        at = 0
        if need_dpacked:
            per_row = x.new_empty(shapes.per_row)
            segments = self._segments(x, task_index)
            place, table = self._place(site, segments, leave), segments.table
            part = place.part
            at = part.data_ptr() + place.index * segments.segments * self._segment_bytes
        key = self._key(x, task_index), g.stride(), need_dx, need_dpacked
        plan = self._plans.get(key)
        addresses = [
            g.data_ptr(),
            x.data_ptr(),
            buffer.data_ptr(),
            0 if task_index is None else task_index.data_ptr(),
            0 if dx is None else dx.data_ptr(),
            0 if per_row is None else per_row.data_ptr(),
            at,
            0 if table is None else table.data_ptr(),
            *self._addresses[site],
        ]
        if plan is None or not plan(addresses):
            sums = None if place is None else place.part[place.index]
            with recording([g, x, buffer, task_index, dx, per_row, sums, table, *self._tensors(site)]) as recorded:
                self._backward(g, x, buffer, site, task_index, dx, per_row, segments, sums)
            self._plans.keep(key, recorded)
        if place is None:
            return dx, None
        if place.left is None:
            return dx, self._finish_alone(site, place.part, segments, leave)
        place.left.waiting[site] = True
        return dx, None

    def _backward(
        self,
        g: Tensor,
        x: Tensor,
        buffer: Tensor,
        site: int,
        task_index: Tensor | None,
        dx: Tensor | None,
        per_row: Tensor | None,
        segments: Schedule | None,
        sums: Tensor | None,
    ) -> None:
        """Launch the backward through Triton, except for ``finish``."""
        layout = self._spec.layout
        saved = Saved(*in_buffer(buffer, Saved.table(layout, x.shape[:-1], x.dtype)))
        xs, gs = rows_of(x, task_index), rows_of(g, task_index)
        folded = Folded(*(part[site] for part in self._folded))
        rows = None if per_row is None else in_buffer(per_row, per_row_table(layout, xs.B * xs.M, x.dtype))
        with device_guard(x):
            row_gradients(gs, xs, saved, self._packed[site], folded, self._spec, task_index, dx, rows)
            if rows is not None:
                partial_sums(gs, xs, saved, rows, layout, segments, sums)

    def _segments(self, x: Tensor, task_index: Tensor | None) -> Schedule:
        """How the rows of x are divided: the same object for all adapters with the same rows and tasks."""
        version = 0 if task_index is None else task_index._version
        last = self._last_segments
        if last is not None and last[0] is task_index and last[1:4] == (version, x.shape, tiles.epoch):
            return last[4]
        B, tasks = 1, None
        if task_index is not None:
            # Autograd may return another object for the same tensor.
            tasks = task_index.data_ptr(), version, self._tasks_of(task_index).kind
            B = x.shape[0]
        M = x.shape[:-1].numel() // B
        key = B, M, tasks, tiles.epoch
        known = self._schedules.get(key)
        if known is None:
            with device_guard(x):
                made = schedule(task_index, B, M, self._packed.shape[1], self._spec.layout, x.dtype, x.device)
            known = self._schedules[key] = task_index, made  # task_index is held, so that its address stays its own
        self._last_segments = task_index, version, x.shape, tiles.epoch, known[1]
        return known[1]

    def _place(self, site: int, segments: Schedule, leave: bool) -> _Place:
        left = self._pass(segments) if leave else None
        if left is not None and left.part is not None and left.segments is segments and not left.waiting[site]:
            return _Place(left.part, site, left)
        return _Place(self._part(1, segments), 0, None)

    def _pass(self, segments: Schedule) -> _Pass:
        """What is left in this backward pass."""
        number = torch._C._current_graph_task_id()
        left = self._passes.get(number)
        if left is None:
            sites = self._packed.shape[0]
            fits = sites * segments.segments * self._segment_bytes <= MOST_PART_BYTES
            left = self._passes[number] = _Pass(segments, self._part(sites, segments) if fits else None, sites)
            # A pass that does not reach the token forgets what was left.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._passes.pop(number, None))
        return left

    def _part(self, adapters: int, segments: Schedule) -> Tensor:
        shape = adapters, segments.segments, part_size(self._spec.layout)
        return self._packed.new_empty(shape, dtype=torch.float32)

    def _finish_alone(self, site: int, part: Tensor, segments: Schedule, leave: bool) -> Tensor | None:
        """Finish the gradient of one adapter, and leave it or return it among zeros."""
        total = torch.empty_like(self._packed[:1]) if leave else torch.zeros_like(self._packed)
        mine = total if leave else total[site : site + 1]
        self._finish(part, segments, slice(site, site + 1), mine)
        if not leave:
            return total
        self._pass(segments).finished.append((site, mine[0]))
        return None

    def _finish(self, part: Tensor, segments: Schedule, sites: slice, dpacked: Tensor) -> None:
        with device_guard(dpacked):
            finish(part, segments, self._packed[sites], self._folded.mean[sites], self._spec.layout, dpacked)

    def collect(self, g: Tensor | None) -> Tensor | None:
        left = self._passes.pop(torch._C._current_graph_task_id(), None)
        if left is None:
            return g
        total = torch.empty_like(self._packed)
        for waiting, sites in _runs(left.waiting):
            if waiting:
                assert left.part is not None
                self._finish(left.part[sites], left.segments, sites, total[sites])
            else:
                total[sites].zero_()
        for site, gradient in left.finished:
            total[site] += gradient
        return total if g is None else total.add_(g)


def _runs(flags: list[bool]) -> Iterator[tuple[bool, slice]]:
    """The runs of equal flags: each flag with the slice of its run."""
    start = 0
    for stop in range(1, len(flags) + 1):
        if stop == len(flags) or flags[stop] != flags[start]:
            yield flags[start], slice(start, stop)
            start = stop
