"""Every access that kernels make in Triton's interpreter: checked against the tensors they were given, and counted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from triton.runtime import interpreter


@dataclasses.dataclass
class Launch:
    """What one launch did. Bytes are counted per access, whatever a cache would serve; lanes that load the same address
    count once, as on a GPU."""

    kernel: str
    programs: int
    loaded: Counter[str] = dataclasses.field(default_factory=Counter)  #: bytes, by the kernel's argument
    stored: Counter[str] = dataclasses.field(default_factory=Counter)
    touched: dict[int, int] = dataclasses.field(default_factory=dict)  #: bytes of each tensor accessed, by address

    @property
    def asked(self) -> int:
        return self.loaded.total() + self.stored.total()

    @property
    def once(self) -> int:
        """Bytes of all tensors that were accessed, each counted once."""
        return sum(self.touched.values())


class Watch:
    """The launches within :func:`watch`, in order, and their sums by argument."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._written: dict[str, np.ndarray] = {}

    @property
    def loaded(self) -> Counter[str]:
        return sum((launch.loaded for launch in self.launches), Counter())

    @property
    def stored(self) -> Counter[str]:
        return sum((launch.stored for launch in self.launches), Counter())

    def _launch(self, kernel, grid, names, tensors) -> None:
        self.launches.append(Launch(kernel, math.prod(grid)))
        self._tensors = {n: t for n, t in zip(names, tensors) if isinstance(t, torch.Tensor) and t.numel()}
        self._written = {}

    def _access(self, kind: str, pointers, mask, itemsize: int) -> None:
        addresses = np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64)
        if not addresses.size:
            return
        launch = self.launches[-1]
        counts = launch.loaded if kind == "load" else launch.stored
        owner, offset = self._owner(addresses)
        assert owner is not None, f"a {kind} outside every tensor that the kernel was given"
        assert not (offset % itemsize).any(), f"a misaligned {kind}"
        counts[owner] += np.unique(addresses).size * itemsize
        tensor = self._tensors[owner]
        launch.touched[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        if kind == "store":
            size = self._tensors[owner].untyped_storage().nbytes()
            written = self._written.setdefault(owner, np.full(size // itemsize, -1))
            places, ticket = offset // itemsize, np.arange(addresses.size)
            fresh = (written[places] < 0).all()
            written[places] = ticket  # of two lanes that write one place, one does not find its ticket again
            assert fresh and (written[places] == ticket).all(), f"{owner} is written twice"

    def _owner(self, addresses):
        """The tensor in whose elements (its view, not its storage) all ``addresses`` lie."""
        for name, tensor in self._tensors.items():
            start = tensor.untyped_storage().data_ptr()
            offset = addresses - start
            first = tensor.data_ptr() - start
            span = (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1) * tensor.element_size()
            if (offset >= first).all() and (offset < first + span).all():
                return name, offset
        return None, None


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Check and count the accesses of all launches within the block; AssertionError at the first bad one."""
    seen, plain = Watch(), interpreter._interpreter
    call = interpreter.GridExecutor.__call__

    class Watched:
        def __getattr__(self, name):
            return getattr(plain, name)

        def load(self, pointers, mask, other, dtype):
            seen._access("load", pointers, mask, np.dtype(dtype).itemsize)
            return plain.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            seen._access("store", pointers, mask, value.itemsize)
            return plain.store(pointers, value, mask)

    def launched(self, *args, **kwargs):
        seen._launch(self.fn.__name__.removesuffix("_kernel"), self.grid, self.arg_names, args)
        return call(self, *args, **kwargs)

    interpreter._interpreter, interpreter.GridExecutor.__call__ = Watched(), launched
    try:
        yield seen
    finally:
        interpreter._interpreter, interpreter.GridExecutor.__call__ = plain, call
