"""The block's barriers: who has arrived, who waits, and what a barrier that stays incomplete is reported as."""

from __future__ import annotations

import dataclasses

import numpy as np

from .operands import Immediate


@dataclasses.dataclass
class Barrier:
    arrived: np.ndarray  #: lanes, waiting or not
    waiting: np.ndarray
    expected: int | None  #: threads; None for all that are alive
    line: int


class Barriers:
    """The part of a Block that carries barriers out."""

    def _is_plain_barrier(self, pc: int) -> bool:
        """Whether all threads meet here, and nothing else is asked."""
        s = self.kernel.statements[pc]
        kind = tuple(m for m in s.modifiers if m not in ("cta", "aligned"))
        if s.opcode not in ("bar", "barrier") or kind != ("sync",) or len(s.operands) != 1 or self.barriers:
            return False
        return isinstance(s.operands[0], Immediate) and 0 <= s.operands[0].value < 16

    def _all_met(self) -> None:
        self.barriers_passed += 1
        self.machine.shared.barrier(None)

    def _arrive(self, pc: int, acting: np.ndarray) -> None:
        s = self.kernel.statements[pc]
        kind = tuple(m for m in s.modifiers if m not in ("cta", "aligned"))
        if kind not in (("sync",), ("arrive",)):
            raise self._fault(pc, f"the barrier .{'.'.join(kind)} is not known")
        number = self._uniform(s.operands[0], acting, pc)
        expected = self._uniform(s.operands[1], acting, pc) if len(s.operands) > 1 else None
        if not 0 <= number < 16:
            raise self._fault(pc, f"barrier {number} does not exist: there are 16")
        if expected is not None and (expected % 32 or not 0 < expected <= 32 * self.machine.warps):
            raise self._fault(pc, f"a barrier cannot expect {expected} threads")
        none = np.zeros(self.machine.lanes, bool)
        barrier = self.barriers.setdefault(number, Barrier(none.copy(), none.copy(), expected, s.line))
        if barrier.expected != expected:
            raise self._fault(pc, f"barrier {number} expects {barrier.expected} threads at line {barrier.line}")
        if (barrier.arrived & acting).any():
            raise self._fault(pc, f"lanes arrive at barrier {number} again before it is complete")
        barrier.arrived |= acting
        if kind == ("sync",):
            barrier.waiting |= acting
            self.blocked |= acting
        elif expected is None:
            raise self._fault(pc, "arrive needs the number of threads that take part")
        self._try_release(number)

    def _try_release(self, number: int) -> None:
        barrier = self.barriers[number]
        alive = np.count_nonzero(self.alive)
        arrived = np.count_nonzero(barrier.arrived)
        if arrived < (alive if barrier.expected is None else barrier.expected):
            return
        del self.barriers[number]
        self.blocked &= ~barrier.waiting
        self.barriers_passed += 1
        warps = np.flatnonzero(barrier.arrived.reshape(-1, 32).any(1))
        everybody = barrier.expected is None or arrived >= alive
        self.machine.shared.barrier(None if everybody else warps)

    def _uniform(self, operand, acting: np.ndarray, pc: int) -> int:
        values = np.unique(self.machine.source(operand, "u32")[acting])
        if values.size != 1:
            raise self._fault(pc, "a barrier's operands differ between lanes")
        return int(values[0])

    def _unreached(self) -> None:
        waits = [
            f"barrier {number} (line {b.line}): {np.count_nonzero(b.arrived)} of "
            f"{b.expected or np.count_nonzero(self.alive)} threads have arrived"
            for number, b in self.barriers.items()
        ]
        raise self._fault(int(self.pcs[self.alive].min()) - 1, f"unreached barrier: {'; '.join(waits)}")

    def _others(self) -> str:
        parts = []
        if self.blocked.any():
            parts.append(f"lanes {ranges(self.blocked)} wait at a barrier")
        if not self.alive.all():
            parts.append(f"lanes {ranges(~self.alive)} have ended")
        return "; ".join(parts) or "the guard or the member mask leaves some out"


def ranges(mask: np.ndarray) -> str:
    """The set flags of a mask as ``0-31, 64``."""
    lanes = np.flatnonzero(mask)
    runs = np.split(lanes, np.flatnonzero(np.diff(lanes) != 1) + 1)
    return ", ".join(str(r[0]) if r.size == 1 else f"{r[0]}-{r[-1]}" for r in runs if r.size)
