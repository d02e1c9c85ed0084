"""Shared memory of one block: bytes that start as NaN, bounds, alignment, and hazards between warps.

Two accesses to a byte by different warps, at least one a write, must have a barrier between them that both warps take
part in. Every access carries a stamp that grows at each barrier; ``known[w, v]`` is the last stamp of warp v's accesses
that happened before what warp w does now. Accesses are tracked in granules of the smallest access that the kernel has.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .fault import Fault

POISON = 0xFF  #: four of these bytes are a NaN of float32, two are one of float16 and bfloat16


class SharedMemory:
    def __init__(self, size: int, warps: int, granule: int, track: bool):
        self.size = size
        room = np.empty(size + 1024, np.uint8)
        # Aligned to 16, so that vectors of every alignment have numpy views.
        self.bytes = room[-room.ctypes.data % 16 :][: -(-size // 16) * 16]
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.warps, self.granule, self.track = warps, granule, track
        self.hazards: list[str] = []
        self._seen: set[tuple] = set()
        self._by_size: dict[int, tuple[np.ndarray, ...]] = {}
        cells = -(-self.bytes.size // granule) if track else 0
        #: The pseudo-warp ``warps`` stands for atomic operations, which do not conflict with each other.
        self.writer = np.zeros(cells, np.int16)
        self.written = np.zeros(cells, np.int64)  # stamps
        self.read_by = np.zeros((warps + 1, cells), np.int64)
        self.last_read = np.zeros(cells, np.int64)
        self.line = np.zeros(cells, np.int32)  # of the last write
        self.in_flight = np.zeros(cells, bool)  # written by an asynchronous copy that nobody has waited for
        self.async_readers = np.zeros(cells, np.int16)  # matrix products in flight that read this
        self.unfenced = np.zeros(cells, bool)  # written by threads, not yet visible to the asynchronous proxy
        self.reset()

    def reset(self) -> None:
        self.bytes[:] = POISON
        self.hazards = []
        self._seen.clear()
        for array in (self.writer, self.written, self.read_by, self.last_read, self.line):
            array[:] = 0
        for flags in (self.in_flight, self.unfenced, self.async_readers):
            flags[:] = 0
        self.flying = self.products = 0  # copies and matrix products in flight
        self.stamp, self.floor = 1, 0
        self.known = np.zeros((self.warps, self.warps + 1), np.int64)

    # bounds ---------------------------------------------------------------

    def check(self, offsets: np.ndarray, total: int, verb: str, alignment: int | None = None) -> None:
        alignment = alignment or total
        highest = int(np.maximum.reduce(offsets))  # unsigned: below zero is high above
        if highest + total > self.size:
            raise Fault(f"shared {verb} out of bounds: {total} bytes at offset {highest} of {self.size}")
        if int(np.bitwise_or.reduce(offsets)) & (alignment - 1):
            raise Fault(f"misaligned shared {verb} of {total} bytes: not all offsets are multiples of {alignment}")

    # synchronisation --------------------------------------------------------

    def barrier(self, warps: np.ndarray | None) -> None:
        """All warps (None) or those listed have met: what each did before is known to all of them."""
        if warps is None:
            self.floor = self.stamp
        else:
            self.known[warps, warps] = self.stamp
            self.known[warps] = self.known[warps].max(0)
        self.stamp += 1

    def fence_proxy(self, warps: np.ndarray) -> None:
        """``fence.proxy.async``: what these warps know to be written is now visible to the asynchronous proxy."""
        if not self.track:
            return
        pending = np.flatnonzero(self.unfenced)
        if not pending.size:
            return
        writer, stamp = self.writer[pending], self.written[pending]
        known = stamp <= self.floor
        for warp in warps:
            known |= (writer == warp) | (stamp <= self.known[warp, writer])
        self.unfenced[pending[known]] = False

    # tracking ---------------------------------------------------------------

    def cells(self, offsets: np.ndarray, total: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The granules of every access, and for each the warp that makes it."""
        first = (offsets // self.granule).astype(np.intp)
        per = total // self.granule
        if per == 1:
            return first, warps
        return (first[:, None] + np.arange(per)).ravel(), np.repeat(warps, per)

    def _rows(self, total: int) -> tuple[np.ndarray, ...]:
        """The stamps, writers and flags with one row for each aligned piece of ``total`` bytes."""
        if total not in self._by_size:
            per = total // self.granule
            arrays = (self.written, self.last_read, self.writer, self.line, self.unfenced)
            rows = [array.reshape(-1, per) for array in arrays]
            self._by_size[total] = (*rows, self.read_by.reshape(self.warps + 1, -1, per))
        return self._by_size[total]

    def note_read(self, offsets, total, warps, line, remember: bool = True) -> None:
        written, last_read, *_, read_by = self._rows(total)
        row = (offsets // total).astype(np.intp)
        if self.flying or np.maximum.reduce(written.take(row, 0), axis=None) > self.floor:
            self._check_read(offsets, total, warps, line)
        if remember:
            read_by[warps, row] = self.stamp
            last_read[row] = self.stamp

    def _check_read(self, offsets, total, warps, line) -> None:
        cell, warp = self.cells(offsets, total, warps)
        written, writer = self.written[cell], self.writer[cell]
        unordered = (writer != warp) & (written > self.known[warp, writer]) & (written > self.floor)
        if unordered.any():
            self.report("reads", line, cell, warp, unordered, writer, self.line[cell])
        flying = self.in_flight[cell]
        if flying.any():
            what = "reads an asynchronous copy not waited for,"
            self.report(what, line, cell, warp, flying, writer, self.line[cell])

    def note_write(self, offsets, total, warps, line, content: Callable | None, proxy: bool = True) -> None:
        """``content()`` is the bytes [lanes, total] about to be written: several warps may write the same value."""
        written, last_read, writer, lines, unfenced, _ = self._rows(total)
        row = (offsets // total).astype(np.intp)
        latest = np.maximum(written.take(row, 0), last_read.take(row, 0))
        if self.flying or self.products or np.maximum.reduce(latest, axis=None) > self.floor:
            self._check_write(offsets, total, warps, line, content)
        writer[row] = warps[:, None]
        written[row] = self.stamp
        lines[row] = line
        if proxy:
            unfenced[row] = True
        # The last one to write a granule is another warp than one that has just written it too.
        if np.count_nonzero(writer.take(row, 0)[:, 0] != warps):
            self._check_doubled(offsets, total, warps, line, content)

    def _check_write(self, offsets, total, warps, line, content) -> None:
        cell, warp = self.cells(offsets, total, warps)
        self._check_unordered(cell, warp, self.written[cell], line, content)
        busy = self.async_readers[cell] > 0
        if busy.any():
            what = "overwrites what a matrix product in flight reads,"
            self.report(what, line, cell, warp, busy, warp, self.line[cell])
        flying = self.in_flight[cell]
        if flying.any():
            what = "overwrites an asynchronous copy not waited for,"
            self.report(what, line, cell, warp, flying, self.writer[cell], self.line[cell])

    def _check_unordered(self, cell, warp, written, line, content) -> None:
        writer = self.writer[cell]
        unordered = (
            (writer != warp) & (written > self.known[np.minimum(warp, self.warps - 1), writer]) & (written > self.floor)
        )
        if unordered.any():
            if content is not None:
                old = self.bytes.reshape(-1, self.granule)[cell]
                unordered &= (old != np.ascontiguousarray(content()).reshape(-1, self.granule)).any(1)
            if unordered.any():
                self.report("writes", line, cell, warp, unordered, writer, self.line[cell])
        reads = self.read_by[:, cell]  # [warps + 1, accesses]
        known = np.maximum(self.known.T[:, np.minimum(warp, self.warps - 1)], self.floor)
        early = (reads > known) & (np.arange(self.warps + 1)[:, None] != warp)
        if early.any():
            unordered = early.any(0)
            reader = early.argmax(0)
            self.report("writes, after a read by another warp,", line, cell, warp, unordered, reader, self.line[cell])

    def _check_doubled(self, offsets, total, warps, line, content) -> None:
        cell, warp = self.cells(offsets, total, warps)
        doubled = self.writer[cell] != warp
        if content is not None:
            parts = np.ascontiguousarray(content()).reshape(-1, self.granule)
            last = np.zeros(self.writer.size, np.intp)
            last[cell] = np.arange(cell.size)
            doubled &= (parts != parts[last[cell]]).any(1)
        if doubled.any():
            what = "writes, as does another warp in the same instruction,"
            self.report(what, line, cell, warp, doubled, self.writer[cell], self.line[cell])

    def note_flight(self, offsets, total, warps) -> None:
        """An asynchronous copy to these bytes has been issued."""
        self.in_flight[self.cells(offsets, total, warps)[0]] = True
        self.flying += offsets.size

    def note_landing(self, offsets, total, warps) -> None:
        """An asynchronous copy has been waited for: its bytes count as written now, by the warp that waited."""
        cell, warp = self.cells(offsets, total, warps)
        self.flying -= offsets.size
        self.in_flight[cell] = False
        self.writer[cell] = warp
        self.written[cell] = self.stamp

    def note_product(self, cells, change: int) -> None:
        """A matrix product that reads these granules has been issued (1) or has ended (-1)."""
        np.add.at(self.async_readers, cells, change)
        self.products += change

    def report(self, what, line, cell, warp, bad, other, other_line) -> None:
        i = int(np.flatnonzero(bad)[0])
        key = (what, line, int(other_line[i]))
        if key in self._seen:
            return
        self._seen.add(key)
        self.hazards.append(
            f"line {line}: warp {int(warp[i])} {what} byte {int(cell[i]) * self.granule} of shared memory, which warp "
            f"{int(other[i])} touched without a barrier between (last written at line {int(other_line[i])})"
        )
