"""Run one block of a kernel: control flow, divergence, barriers and counts.

All lanes that stand at the lowest statement run together. While all of them do, whole stretches of statements run
without a mask. Lanes that reach an instruction of the whole warp before the others wait there for them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from . import instructions  # noqa: F401  (registers the decoders)
from .barriers import Barrier, Barriers, ranges
from .fault import Fault
from .machine import Machine
from .memory import Memory
from .parse import Kernel
from .registry import WARP_WIDE, Step

INSTRUCTION_LIMIT = 5_000_000


@dataclasses.dataclass
class Stretch:
    """Statements one after the other with no jump between them."""

    start: int
    steps: list[Step]
    end: int  #: the statement that follows: one of control, or the kernel's end


class Block(Barriers):
    """``block.run()`` runs one block; ``counts`` and ``hazards`` then say what it did.

    ``parameters`` gives every parameter's bytes, ``threads`` their number or their shape (x, y, z). The block's shared
    memory is the kernel's static variables and ``dynamic_shared_bytes`` more.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        parameters: dict[str, bytes],
        block_index: tuple[int, int, int],
        grid: tuple[int, int, int],
        threads: int | tuple[int, int, int],
        dynamic_shared_bytes: int = 0,
        hazards: bool = True,
    ):
        shape = (threads, 1, 1) if isinstance(threads, int) else (tuple(threads) + (1, 1))[:3]
        if kernel.required_threads and kernel.required_threads != shape:
            raise Fault(f"{kernel.name} must be launched with {kernel.required_threads} threads, not {shape}")
        self.kernel, self.memory, self.parameters = kernel, memory, parameters
        self.block_index, self.grid = tuple(block_index), tuple(grid)
        self.dynamic_shared_bytes, self.track = dynamic_shared_bytes, hazards
        self.machine = machine_for(kernel, shape)
        self.counts: dict[str, int] = {}
        self.hazards: list[str] = []

    def run(self, limit: int = INSTRUCTION_LIMIT) -> None:
        with np.errstate(all="ignore"):
            self._prepare()
            self.limit = limit
            try:
                self._run()
            except Exception as error:
                if getattr(error, "located", False):
                    raise
                raise self._wrap(self.pc, error) from error
            finally:
                self._finish()
        if self.machine.pending_copies:
            self.hazards.append("the kernel ends with asynchronous copies that were not waited for")

    # state ------------------------------------------------------------------

    def _prepare(self) -> None:
        machine = self.machine
        machine.block, machine.grid = self.block_index, self.grid
        machine.shared_bytes = self.dynamic_shared_bytes
        machine.reset()
        machine.set_parameters(self.parameters)
        machine.memory = self.memory
        known = {region.start for region in self.memory.regions}
        for name, data in self.kernel.data.items():
            if data.bytes.ctypes.data not in known:
                self.memory.add(data.bytes.ctypes.data, data.bytes.nbytes, name, data.writable)
        machine.shared = machine.shared_memory(machine.dynamic_base + self.dynamic_shared_bytes, self.track)
        self.executed = np.zeros(len(self.kernel.statements) + 1, np.int64)
        self.warps_executed = np.zeros(len(self.kernel.statements) + 1, np.int64)
        self.issued = 0
        self.barriers: dict[int, Barrier] = {}
        self.barriers_passed = 0
        machine.alive = self.alive = np.arange(machine.lanes) < machine.threads
        self.pc = 0

    def _finish(self) -> None:
        machine = self.machine
        self.hazards = list(machine.shared.hazards)
        sums = np.bincount(machine.opcode, self.executed, len(machine.opcodes)).astype(np.int64)
        #: How often each opcode was carried out.
        self.by_opcode = by_opcode = {name: int(n) for name, n in zip(machine.opcodes, sums) if n}
        self.counts = {
            "instructions": int(self.executed.sum()),
            "warp_instructions": int(self.warps_executed.sum()),
            "barriers": self.barriers_passed,
            "global_bytes_read": machine.bytes["read"],
            "global_bytes_written": machine.bytes["written"],
            "shared_bytes": machine.bytes["shared"],
            "mma": by_opcode.get("mma", 0) + int(self.executed[machine.is_product].sum()),
            "shuffles": by_opcode.get("shfl", 0),
            "atomics": by_opcode.get("atom", 0) + by_opcode.get("red", 0),
        }

    def _fault(self, pc: int, why: str) -> Fault:
        where = f"{self.kernel.name}, block {self.block_index}"
        if pc < len(self.kernel.statements):
            s = self.kernel.statements[pc]
            where += f", line {s.line}: {s.text}"
        fault = Fault(f"{where}: {why}")
        fault.located = True
        return fault

    # converged --------------------------------------------------------------

    def _run(self) -> None:
        pc = 0
        if self.machine.threads < self.machine.lanes:
            self._split(np.zeros(self.machine.lanes, np.int64))
            pc = self._run_diverged()
        stretches, executed = self.machine.stretches, self.executed
        warps = self.machine.warps
        while pc is not None:
            stretch = stretches.get(pc) or self._stretch(pc)
            at = pc
            try:
                for step in stretch.steps:
                    step(True)
                    at += 1
            except Exception as error:
                raise self._wrap(at, error) from error
            end = stretch.end
            executed[pc : end + 1] += 1
            self.warps_executed[pc : end + 1] += warps
            self._spend(end + 1 - pc)
            self.pc = end
            pc = self._control_together(end)

    def _wrap(self, pc: int, error: Exception) -> Fault:
        why = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
        return self._fault(pc, why)

    def _spend(self, count: int) -> None:
        self.issued += count
        if self.issued > self.limit:
            raise self._fault(self.pc, f"more than {self.limit} instructions: does the kernel wait for another block?")

    def _stretch(self, pc: int) -> Stretch:
        """Decode the statements from ``pc`` to the next one of control."""
        statements, machine = self.kernel.statements, self.machine
        at = pc
        steps = []
        while at < len(statements) and not is_control(statements[at]):
            if at not in machine.steps:
                try:
                    machine.steps[at] = machine.decode(statements[at])
                except Exception as error:
                    raise self._wrap(at, error) from error
            steps.append(machine.steps[at])
            at += 1
        machine.stretches[pc] = stretch = Stretch(pc, steps, at)
        return stretch

    def _taken(self, pc: int) -> np.ndarray | bool:
        """The lanes for which a statement's guard holds; True for all."""
        s = self.kernel.statements[pc]
        if s.guard is None:
            return True
        guard = self.machine.source(s.guard, "pred")
        return ~guard if s.negated else guard.copy()

    def _control_together(self, pc: int) -> int | None:
        """Carry out a statement of control that all lanes have reached; the next pc, or None at the end."""
        statements, n = self.kernel.statements, self.machine.lanes
        if pc >= len(statements):
            self.executed[pc] -= 1
            self.warps_executed[pc] -= self.machine.warps
            return None
        s, taken = statements[pc], self._taken(pc)
        count = n if taken is True else np.count_nonzero(taken)
        if not count:
            return pc + 1
        if count == n:
            if s.opcode == "bra":
                return self._target(pc)
            if s.opcode in ("ret", "exit"):
                return None
            if self._is_plain_barrier(pc):
                self._all_met()
                return pc + 1
        # Not all alike: go on lane by lane, from this statement.
        self.executed[pc] -= 1
        self.warps_executed[pc] -= self.machine.warps
        self._split(np.full(n, pc, np.int64))
        self._control_apart(pc, np.ones(n, bool))
        return self._run_diverged()

    def _target(self, pc: int) -> int:
        s = self.kernel.statements[pc]
        if set(s.modifiers) - {"uni"}:
            raise self._fault(pc, "only bra and bra.uni are known")
        name = getattr(s.operands[0], "name", None)
        if name not in self.kernel.labels:
            raise self._fault(pc, f"there is no label {name}")
        return self.kernel.labels[name]

    # diverged ---------------------------------------------------------------

    def _split(self, pcs: np.ndarray) -> None:
        self.pcs = pcs
        self.blocked = np.zeros(pcs.size, bool)  # at a barrier
        self.held = np.zeros(pcs.size, bool)  # at an instruction of the whole warp

    def _run_diverged(self) -> int | None:
        """Run lanes apart from each other until all stand at one statement again; its pc, or None at the end."""
        pcs, statements = self.pcs, self.kernel.statements
        while True:
            runnable = self.alive & ~self.blocked
            if not runnable.any():
                if not self.alive.any():
                    return None
                self._unreached()
            free = runnable & ~self.held
            if not free.any():
                at = int(pcs[runnable].min())
                raise self._fault(at, f"lanes {ranges(self.held)} wait for others that never come: {self._others()}")
            pc = self.pc = int(pcs[free].min())
            mask = runnable & (pcs == pc)
            if mask.all():
                return pc
            self.held[mask] = False
            ahead = pcs[runnable & (pcs > pc)]
            self._advance(pc, int(ahead.min()) if ahead.size else len(statements), mask)

    def _advance(self, pc: int, stop: int, mask: np.ndarray) -> None:
        """Run the lanes of ``mask`` from ``pc`` on, at most to ``stop`` or through the next statement of control."""
        machine, statements = self.machine, self.kernel.statements
        stretch = machine.stretches.get(pc) or self._stretch(pc)
        warps = np.count_nonzero(mask.reshape(-1, 32).any(1))
        at = pc
        for step in stretch.steps[: min(stretch.end, stop) - pc]:
            if is_warp_wide(statements[at]):
                incomplete = self._hold(at, mask)
                if incomplete is not None:
                    self.executed[pc:at] += 1
                    self.warps_executed[pc:at] += warps
                    mask = mask & ~incomplete
                    if not mask.any():
                        self._spend(at - pc)
                        return
                    pc, warps = at, np.count_nonzero(mask.reshape(-1, 32).any(1))
            try:
                step(mask)
            except Exception as error:
                raise self._wrap(at, error) from error
            at += 1
        self.executed[pc:at] += 1
        self.warps_executed[pc:at] += warps
        self._spend(at - pc + 1)
        self.pcs[mask] = self.pc = at
        if at == stretch.end and (at < stop or at == len(statements)):
            self._control_apart(at, mask)

    def _hold(self, pc: int, mask: np.ndarray) -> np.ndarray | None:
        """Hold the lanes whose warp is not complete at an instruction of the whole warp; they, or None."""
        taken = self._taken(pc)
        acting = mask if taken is True else mask & taken
        needed = self.machine.members(self.kernel.statements[pc], acting) & self.alive
        short = (needed & ~acting).reshape(-1, 32).any(1)
        if not short.any():
            return None
        incomplete = acting & np.repeat(short, 32)
        self.pcs[incomplete] = pc
        self.held |= incomplete
        return incomplete

    def _control_apart(self, pc: int, mask: np.ndarray) -> None:
        statements = self.kernel.statements
        if pc >= len(statements):
            self._end(mask)
            return
        s, taken = statements[pc], self._taken(pc)
        if is_aligned_barrier(s):
            incomplete = self._hold(pc, mask)
            if incomplete is not None:
                mask = mask & ~incomplete
                if not mask.any():
                    return
        acting = mask if taken is True else mask & taken
        self.executed[pc] += 1
        self.warps_executed[pc] += np.count_nonzero(mask.reshape(-1, 32).any(1))
        self._spend(1)
        self.pcs[mask] = pc + 1
        if not acting.any():
            return
        if s.opcode == "bra":
            self.pcs[acting] = self._target(pc)
        elif s.opcode in ("ret", "exit"):
            self._end(acting)
        elif s.opcode == "trap":
            raise self._fault(pc, "trap")
        elif s.opcode in ("bar", "barrier"):
            self._arrive(pc, acting)
        else:
            raise self._fault(pc, f"{s.opcode} is not known")

    def _end(self, mask: np.ndarray) -> None:
        self.alive &= ~mask
        for number in list(self.barriers):
            self._try_release(number)


def machine_for(kernel: Kernel, shape: tuple[int, int, int]) -> Machine:
    """The kernel's machine for blocks of this shape, decoded once."""
    if shape not in kernel.machines:
        kernel.machines[shape] = Machine(kernel, shape)
    return kernel.machines[shape]


def is_control(statement) -> bool:
    if statement.opcode in ("bar", "barrier"):
        return "warp" not in statement.modifiers
    return statement.opcode in ("bra", "ret", "exit", "trap", "brx", "call")


def is_aligned_barrier(statement) -> bool:
    """Whether all lanes of a warp must reach this barrier together."""
    return statement.opcode == "bar" or (statement.opcode == "barrier" and "aligned" in statement.modifiers)


def is_warp_wide(statement) -> bool:
    return statement.opcode in WARP_WIDE or (statement.opcode == "bar" and "warp" in statement.modifiers)
