"""Launch kernels, and repeat launches without asking Triton again.

Triton works out at every launch which compiled kernel fits the arguments, which takes the host longer than many a
kernel runs. ``recording`` notes the launches of a host function for one set of shapes, and makes a :class:`Plan` of
them: the compiled kernels, and where each pointer lies within the tensors that the function was given. The plan then
launches the same kernels for other tensors of the same shapes.

A plan repeats launches and nothing else, so no plan is made of a host function that also calls PyTorch's operators, or
that hands a kernel a tensor other than those it was given. Whatever a plan cannot do right, it leaves to Triton:
another driver or device, hooks on launches (profilers), pointers that are not aligned like the recorded ones.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

#: The versions of Triton whose compiled kernels are called as in ``Plan.__call__``.
_KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))
_fits = tuple(int(number) for number in triton.__version__.split(".")[:2]) in _KNOWN

#: Triton compiles a kernel once for pointers that are multiples of this, and once for others.
ALIGNMENT = 16

#: PyTorch's operators that only allocate.
_ALLOCATE = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")

#: How many plans are kept before all are forgotten. Batches of ever new lengths need ever new plans.
_MOST_PLANS = 4096


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


class _Launch(NamedTuple):
    """A compiled kernel and its arguments."""

    compiled: Any  #: held because ``function`` is unloaded with it
    run: Any
    function: Any
    metadata: Any
    grid: tuple[int, int, int]
    arguments: list[Any]  #: with any number where a pointer stands
    pointers: list[tuple[int, int, int]]  #: index of the argument, index of the tensor, bytes behind its start


class Plan:
    """Launches that can be repeated. ``Plan()``, without launches, repeats nothing.

    Args:
        launches: the launches, in order.
        aligned: the indices of the tensors whose addresses must be multiples of ``ALIGNMENT``.
        hooks: lists of functions that Triton calls before the launches.
        active: the driver.
        device: the index of the device.
    """

    def __init__(
        self,
        launches: Sequence[_Launch] = (),
        aligned: Sequence[int] = (),
        hooks: Sequence[list[Any]] = (),
        active: Any = None,
        device: int = -1,
    ):
        self.launches, self.aligned, self.hooks = tuple(launches), tuple(aligned), tuple(hooks)
        self.active, self.device = active, device

    def __call__(self, addresses: list[int]) -> bool:
        """Launch for the tensors that start at ``addresses``, in the order of ``recording``; 0 stands for an absent
        one. Returns False, and launches nothing, where Triton has to be asked."""
        if not self.launches:
            return False
        active = driver.active
        if active is not self.active or active.get_current_device() != self.device or _hooked(self.hooks):
            return False
        together = 0
        for index in self.aligned:
            together |= addresses[index]
        if together % ALIGNMENT:
            return False
        stream = active.get_current_stream(self.device)
        for _, run, function, metadata, grid, template, pointers in self.launches:
            arguments = template[:]
            for at, index, offset in pointers:
                arguments[at] = addresses[index] + offset
            # None, thrice: a description of the launch for hooks, and the hooks before and after it
            run(*grid, stream, function, metadata, None, None, None, *arguments)
        return True


def _hooked(hooks: Sequence[list[Any]]) -> bool:
    """Whether something must be called at launches, as a profiler."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    try:
        return bool(before.calls or after.calls or any(hooks))
    except AttributeError:  # plain functions in place of Triton's chains of them, or None
        return bool(getattr(before, "calls", before) or getattr(after, "calls", after) or any(hooks))


class Recording(TorchDispatchMode):
    """Notes the launches within :func:`recording`. ``plan`` is what came of it: None where these very tensors did not
    serve, but others of the same shapes may; ``Plan()`` where none will."""

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self._extents = [_extent(t) for t in tensors]
        self._launches: list[_Launch] = []
        self._aligned: set[int] = set()
        self._hooks: list[list[Any]] = []
        self._backends: set[str] = set()
        self._other: str | None = None  #: an operator of PyTorch that was called
        self._plain = False  #: whether something was launched that a plan cannot repeat
        self._unaligned = False
        self.plan: Plan | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name not in _ALLOCATE:
            self._other = func._schema.name
        return func(*args, **(kwargs or {}))

    def note(self, kernel: Any, compiled: Any, grid: Sequence[int], args: Sequence[Any], constants: Any) -> None:
        """Note one launch."""
        parameters = getattr(kernel, "params", None)
        if not _fits or parameters is None or not hasattr(compiled, "packed_metadata"):
            self._plain = True  # Triton's interpreter returns no kernel
            return
        named = dict(zip((parameter.name for parameter in parameters), args)) | constants
        template: list[Any] = []
        pointers = []
        for at, parameter in enumerate(parameters):
            value = named[parameter.name]
            if isinstance(value, Tensor):
                address, value = value.data_ptr(), 0
                specialised = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
                if address:
                    found = self._find(address)
                    if found is None:
                        self._plain = True
                        return
                    pointers.append((at, *found))
                    if specialised:
                        self._aligned.add(found[0])
                        self._unaligned |= bool(address % ALIGNMENT or self._extents[found[0]][0] % ALIGNMENT)
            template.append(value)
        sizes = tuple(grid) + (1,) * (3 - len(grid))
        self._backends.add(compiled.metadata.target.backend)
        self._hooks.append(kernel.pre_run_hooks)
        self._launches.append(
            _Launch(compiled, compiled.run, compiled.function, compiled.packed_metadata, sizes, template, pointers)
        )

    def _find(self, address: int) -> tuple[int, int] | None:
        for index, (start, stop) in enumerate(self._extents):
            if start <= address < stop:
                return index, address - start
        return None

    def finish(self, device: int) -> None:
        """Make the plan, for tensors on the device of this index."""
        if self._other or self._plain or self._backends - {"cuda"}:
            self.plan = Plan()
            return
        ordered = sorted(extent for extent in self._extents if extent[0])
        overlap = any(stop > start for (_, stop), (start, _) in zip(ordered, ordered[1:]))
        # Of tensors that overlap nobody knows which one a pointer was meant to be in.
        if self._launches and not overlap and not self._unaligned and not _hooked(self._hooks):
            self.plan = Plan(self._launches, sorted(self._aligned), self._hooks, driver.active, device)


def _extent(t: Tensor | None) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    if t is None or t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


@contextlib.contextmanager
def recording(tensors: Sequence[Tensor | None]) -> Iterator[Recording]:
    """Record the launches within the block.

    Args:
        tensors: all that the kernels may read or write. The plan takes their addresses in the same order.
    """
    found = Recording(tensors)
    before = _local.recording
    _local.recording = found
    try:
        with found:
            yield found
    finally:
        _local.recording = before
    found.finish(next(t.get_device() for t in tensors if t is not None))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, noted where launches are recorded."""
    compiled = kernel[grid](*args, **constants)
    if _local.recording is not None:
        _local.recording.note(kernel, compiled, grid, args, constants)


class Plans:
    """Plans by what distinguishes them. All are forgotten where there are too many."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def get(self, key: Any) -> Plan | None:
        """The plan of ``key``; None where nothing was recorded yet."""
        return self._plans.get(key)

    def keep(self, key: Any, recorded: Recording) -> None:
        """Keep what was recorded for ``key``, if anything was."""
        if recorded.plan is not None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = recorded.plan

    def run(self, key: Any, tensors: Sequence[Tensor | None], through_triton: Callable[[], None]) -> None:
        """Repeat the launches of ``key``, or make them by ``through_triton`` and keep them.

        Args:
            key: all that the launches depend on except for what is in ``tensors``.
            tensors: all that the kernels may read or write. Their shapes, strides and dtypes belong to the key.
            through_triton: launches the kernels.
        """
        plan = self._plans.get(key)
        if plan is not None:
            if plan([0 if t is None else t.data_ptr() for t in tensors]):
                return
            if not plan.launches:
                through_triton()
                return
        with recording(tensors) as recorded:
            through_triton()
        self.keep(key, recorded)


def kind_of(t: Tensor | None) -> Any:
    """What a plan's key has of a tensor."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)
