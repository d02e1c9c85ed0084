"""Global memory: named tensors at their real addresses, with every access checked."""

from __future__ import annotations

import ctypes

import numpy as np

from .fault import Fault


class Region:
    """One tensor's bytes."""

    def __init__(self, address: int, buffer: np.ndarray, name: str, writable: bool, written: np.ndarray | None):
        self.start, self.end = address, address + buffer.size
        self.buffer, self.name, self.writable = buffer, name, writable
        self.written = written  #: a flag per byte, or None where all bytes are known to be initialised
        self._views: dict[int, np.ndarray] = {}

    def view(self, size: int) -> tuple[np.ndarray, int]:
        """The region as unsigned numbers of ``size`` bytes, and the address of the first that is aligned."""
        first = -(-self.start // size) * size
        if size not in self._views:
            skip = first - self.start
            length = max(self.buffer.size - skip, 0) // size * size
            self._views[size] = self.buffer[skip : skip + length].view(f"u{size}")
        return self._views[size], first


class Memory:
    """The tensors that a kernel may touch.

    An access outside all of them, beyond the end of one, misaligned, or a write to one that is not writable raises a
    Fault. A region that is added with ``initialised=False`` may not be read before it is written.
    """

    def __init__(self):
        self.regions: list[Region] = []

    def add(self, address: int, nbytes: int, name: str, writable: bool = True, initialised: bool = True) -> None:
        if not nbytes:
            return
        buffer = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
        self._insert(Region(address, buffer, name, writable, None if initialised else np.zeros(nbytes, bool)))

    def add_array(self, array: np.ndarray, name: str, writable: bool = True, initialised: bool = True) -> int:
        """Add a contiguous numpy array; returns its address. The array must live as long as this memory."""
        if not array.flags.c_contiguous:
            raise ValueError(f"the array for {name} is not contiguous: pass numpy.ascontiguousarray(array)")
        self.add(array.ctypes.data, array.nbytes, name, writable, initialised)
        return array.ctypes.data

    def _insert(self, region: Region) -> None:
        for other in self.regions:
            overlap = other.start < region.end and region.start < other.end
            if overlap and (other.written is not None or region.written is not None):
                raise ValueError(
                    f"{region.name} overlaps {other.name}, and one of them is added as not initialised: "
                    "add their common storage once"
                )
        self.regions.append(region)

    def region(self, low: int, high: int, total: int, hint: Region | None) -> Region | None:
        """The region that holds all bytes from ``low`` to ``high + total``; ``hint`` is tried first."""
        if hint is not None and hint.start <= low and high + total <= hint.end:
            return hint
        for region in self.regions:
            if region.start <= low and high + total <= region.end:
                return region
        return None

    def describe(self, address: int, total: int) -> str:
        """Say where an address lies that no region holds."""
        for r in self.regions:
            if r.start <= address < r.end:
                return (
                    f"{total} bytes at byte {address - r.start} pass the end of {r.name}, which has {r.end - r.start}"
                )
        below = [r for r in self.regions if r.end <= address]
        above = [r for r in self.regions if r.start > address]
        near = []
        if below:
            r = max(below, key=lambda r: r.end)
            near.append(f"{address - r.end} bytes after the end of {r.name}")
        if above:
            r = min(above, key=lambda r: r.start)
            near.append(f"{r.start - address} bytes before {r.name}")
        return f"address {address:#x} lies in no tensor: {', '.join(near) or 'there are none'}"


class Access:
    """One instruction's way into global memory: ``count`` numbers of ``size`` bytes per lane."""

    def __init__(self, size: int, count: int):
        self.size, self.count, self.total = size, count, size * count
        self._hint: Region | None = None

    def _groups(self, memory: Memory, addresses: np.ndarray, verb: str):
        """Yield (region, lanes or None for all, index of the first number) for uint64 addresses."""
        low, high = int(np.minimum.reduce(addresses)), int(np.maximum.reduce(addresses))
        if int(np.bitwise_or.reduce(addresses)) & (self.total - 1):
            worst = int(addresses[(addresses & np.uint64(self.total - 1)) != 0][0])
            raise Fault(f"misaligned {verb} of {self.total} bytes at address {worst:#x}")
        region = memory.region(low, high, self.total, self._hint)
        if region is not None:
            self._hint = region
            yield region, None, self._index(region, addresses)
            return
        left = np.ones(addresses.size, bool)
        while left.any():
            one = int(addresses[left][0])
            region = memory.region(one, one, self.total, None)
            if region is None:
                raise Fault(f"{verb} out of bounds: {memory.describe(one, self.total)}")
            here = left & (addresses >= np.uint64(region.start)) & (addresses <= np.uint64(region.end - self.total))
            yield region, np.flatnonzero(here), self._index(region, addresses[here])
            left &= ~here

    def _index(self, region: Region, addresses: np.ndarray) -> np.ndarray:
        _, first = region.view(self.size)
        return ((addresses - np.uint64(first)) // np.uint64(self.size)).astype(np.intp)

    def read(self, memory: Memory, addresses: np.ndarray) -> list[np.ndarray]:
        """The ``count`` numbers of every lane, each as one array over the lanes."""
        values = None
        for region, lanes, index in self._groups(memory, addresses, "read"):
            view, first = region.view(self.size)
            if region.written is not None:
                self._check_written(region, index, first)
            found = [view.take(index + k if k else index, mode="clip") for k in range(self.count)]
            if lanes is None:
                return found
            if values is None:
                values = [np.empty(addresses.size, view.dtype) for _ in range(self.count)]
            for value, part in zip(values, found):
                value[lanes] = part
        return values

    def write(self, memory: Memory, addresses: np.ndarray, values: list[np.ndarray]) -> None:
        for region, lanes, index in self._groups(memory, addresses, "write"):
            if not region.writable:
                raise Fault(f"write to {region.name}, which the kernel may only read")
            view, first = region.view(self.size)
            for k, value in enumerate(values):
                view[index + k] = value if lanes is None else value[lanes]
            if region.written is not None:
                region.written[self._bytes(region, index, first)] = True

    def _bytes(self, region: Region, index: np.ndarray, first: int) -> np.ndarray:
        return index[:, None] * self.size + (first - region.start) + np.arange(self.total)

    def _check_written(self, region: Region, index: np.ndarray, first: int) -> None:
        where = self._bytes(region, index, first)
        missing = ~region.written[where]
        if missing.any():
            raise Fault(f"read of byte {int(where[missing][0])} of {region.name}, which nothing has written")
