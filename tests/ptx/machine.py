"""A kernel's registers for one block's threads, and its instructions decoded into steps that work on them.

Every register is an array over the lanes; a step works on such arrays with numpy. Decoding binds each operand to its
array, so that a step looks nothing up. One machine serves all blocks of a launch one after the other.
"""

from __future__ import annotations

import numpy as np

from . import operands
from .fault import Fault
from .parse import Kernel, Statement, type_bits
from .registry import DECODERS, Step
from .shared import SharedMemory
from .values import SIGNED, UNSIGNED, numpy_type

# Windows of generic addresses that no tensor lies in: user space ends far below.
SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW = 1 << 60, 2 << 60, 3 << 60
WINDOW_BYTES = 1 << 24


class Machine:
    def __init__(self, kernel: Kernel, threads: tuple[int, int, int]):
        self.kernel, self.shape = kernel, threads
        self.threads = threads[0] * threads[1] * threads[2]
        self.warps = -(-self.threads // 32)
        self.lanes = 32 * self.warps  #: those beyond the last thread never run
        self.lane = np.arange(self.lanes, dtype=np.uint32) % np.uint32(32)
        self.warp = (np.arange(self.lanes) // 32).astype(np.intp)
        self.all = np.arange(self.lanes)
        self._allocate_registers()
        self.dynamic_base = -(-kernel.static_shared // kernel.dynamic_alignment) * kernel.dynamic_alignment
        self._allocate_parameters()
        self.local = np.zeros((self.lanes, max(-(-kernel.local_bytes // 16) * 16, 16)), np.uint8)
        self._constants: dict[tuple, np.ndarray] = {}
        self._specials: dict[str, np.ndarray] = {}
        # Set by the block that runs:
        self.memory = self.shared = None
        self._shared: dict[tuple, SharedMemory] = {}
        self.granule = smallest_shared_access(kernel)
        self.opcodes = sorted({s.opcode for s in kernel.statements})
        number = {name: i for i, name in enumerate(self.opcodes)}
        #: One more than there are statements, for the kernel's end.
        self.opcode = np.array([*(number[s.opcode] for s in kernel.statements), 0], np.intp)
        self.is_product = np.array([*("mma_async" in s.modifiers for s in kernel.statements), False])
        # Filled as statements are first reached:
        self.steps: dict[int, Step] = {}
        self.stretches: dict[int, object] = {}
        self.pending_copies: list = []
        self.commits = np.zeros(self.lanes, np.int64)
        self.products = None  #: wgmma's, in flight
        self.bytes = {"read": 0, "written": 0, "shared": 0}
        self.block = self.grid = (0, 0, 0)
        self.shared_bytes = 0
        self.alive = np.ones(self.lanes, bool)

    # registers ------------------------------------------------------------

    def _allocate_registers(self) -> None:
        widths: dict[int, list[str]] = {}
        for name, type_ in self.kernel.registers.items():
            widths.setdefault(type_bits(type_), []).append(name)
        self.files: dict[int, np.ndarray] = {}
        self.where: dict[str, tuple[int, int]] = {}  # (width, row)
        for width, names in widths.items():
            if width not in (1, 8, 16, 32, 64):
                raise Fault(f"registers of {width} bits are not known")
            dtype = np.bool_ if width == 1 else UNSIGNED[width]
            self.files[width] = np.zeros((len(names), self.lanes), dtype)
            self.where |= {name: (width, row) for row, name in enumerate(names)}

    def reset(self) -> None:
        """Registers start as the bits of a NaN, so that one that is read before it is written shows."""
        for width, file in self.files.items():
            file[:] = False if width == 1 else np.iinfo(file.dtype).max
        self.pending_copies = []
        self.commits[:] = 0
        self.products = None
        self.bytes = {"read": 0, "written": 0, "shared": 0}
        self.local[:] = 0xFF
        for name, array in self._specials.items():
            array[:] = self._special_value(name)

    def register(self, name: str) -> np.ndarray:
        """A register's bits."""
        width, row = self.where[name]
        return self.files[width][row]

    def width(self, operand) -> int:
        if isinstance(operand, operands.Register):
            return self.where[operand.name][0]
        raise Fault(f"expected a register, not {operand}")

    # parameters -------------------------------------------------------------

    def _allocate_parameters(self) -> None:
        self.parameter_offset: dict[str, int] = {}
        end = 0
        for name, _, size in self.kernel.parameters:
            end = -(-end // 16) * 16
            self.parameter_offset[name] = end
            end += size
        self.parameters = np.zeros(-(-end // 16) * 16 + 16, np.uint8)
        self.parameter_end = end

    def set_parameters(self, values: dict[str, bytes]) -> None:
        names = {name for name, _, _ in self.kernel.parameters}
        if names != set(values):
            raise Fault(f"{self.kernel.name} has the parameters {sorted(names)}, not {sorted(values)}")
        for name, _, size in self.kernel.parameters:
            if len(values[name]) != size:
                raise Fault(f"{self.kernel.name}: parameter {name} has {size} bytes, not {len(values[name])}")
            at = self.parameter_offset[name]
            self.parameters[at : at + size] = np.frombuffer(values[name], np.uint8)

    # operands ---------------------------------------------------------------

    def source(self, operand, type_: str, wider: bool = False) -> np.ndarray:
        """The array that holds an operand's values as ``type_``; with ``wider``, a register's low bits will do."""
        dtype, bits = numpy_type(type_), type_bits(type_)
        if isinstance(operand, operands.Register):
            array = self.register(operand.name)
            have = 1 if array.dtype == np.bool_ else array.dtype.itemsize * 8
            if have == bits:
                return array.view(dtype)
            if wider and have > bits:
                return array.view(dtype)[:: have // bits]
            raise Fault(f"{operand.name} has {have} bits where .{type_} is expected")
        if isinstance(operand, operands.Special):
            return self._special(operand.name, bits).view(dtype)
        if isinstance(operand, operands.Immediate):
            return self._constant(self._immediate(operand, type_), dtype)
        if isinstance(operand, operands.Symbol):
            return self._constant(np.uint64(self.address_of(operand)).astype(UNSIGNED[bits]), dtype)
        raise Fault(f"{operand} cannot be read as .{type_}")

    def predicate(self, operand) -> np.ndarray | None:
        """A predicate's array; the complement of a negated one must be taken by the caller."""
        if isinstance(operand, operands.Immediate):
            return self._constant(np.bool_(operand.value != 0), np.bool_)
        return self.source(operand, "pred")

    def _immediate(self, operand: operands.Immediate, type_: str):
        bits = type_bits(type_)
        if type_ == "pred":
            return np.bool_(operand.value != 0)
        if operand.float_bits:
            if type_[0] not in "fb" or bits < 32:
                raise Fault(f"a floating-point constant where .{type_} is expected")
            if operand.float_bits == bits:
                return UNSIGNED[bits](operand.value)
            from_, to = (np.uint32, np.float64) if operand.float_bits == 32 else (np.uint64, np.float32)
            kind = np.float32 if operand.float_bits == 32 else np.float64
            return np.array(from_(operand.value)).view(kind).astype(to)
        if type_ in ("f32", "f64"):
            raise Fault(f"the integer constant {operand.value} where .{type_} is expected")
        return UNSIGNED[bits](operand.value & (1 << bits) - 1)

    def _constant(self, value, dtype) -> np.ndarray:
        value = np.asarray(value)
        if value.dtype != np.bool_:
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
        key = (value.dtype.str, int(value))
        if key not in self._constants:
            array = np.full(self.lanes, value)
            array.flags.writeable = False
            self._constants[key] = array
        return self._constants[key].view(dtype)

    def address_of(self, symbol: operands.Symbol) -> int:
        """A variable's address in its own space; global and constant variables have their real ones."""
        kernel, name = self.kernel, symbol.name
        if name in kernel.shared_variables:
            base = kernel.shared_variables[name]
            return (self.dynamic_base if base is None else base) + symbol.offset
        if name in kernel.local_variables:
            return kernel.local_variables[name] + symbol.offset
        if name in self.parameter_offset:
            return self.parameter_offset[name] + symbol.offset
        if name in kernel.data:
            return kernel.data[name].bytes.ctypes.data + symbol.offset
        raise Fault(f"{name} is not declared")

    # special registers ------------------------------------------------------

    def _special(self, name: str, bits: int) -> np.ndarray:
        value = self._special_value(name)
        if bits not in (16, 32) and not (bits == 64 and name.startswith("%lanemask")):
            raise Fault(f"{name} has 32 bits, not {bits}")
        key = name if bits == 32 else f"{name} as {bits}"
        if key not in self._specials:
            self._specials[key] = np.empty(self.lanes, UNSIGNED[bits])
            self._specials[key][:] = value
        return self._specials[key]

    def _special_value(self, name: str):
        name = name.split(" as ")[0]
        base, _, axis = name[1:].partition(".")
        a = "xyz".find(axis) if axis else 0
        thread = np.arange(self.lanes)
        x, y, _ = self.shape
        one = np.uint64(1) << self.lane.astype(np.uint64)
        below = one - np.uint64(1)
        known = {
            "tid": lambda: (thread % x, thread // x % y, thread // (x * y))[a],
            "ntid": lambda: self.shape[a],
            "ctaid": lambda: self.block[a],
            "nctaid": lambda: self.grid[a],
            "laneid": lambda: self.lane,
            "warpid": lambda: self.warp,
            "nwarpid": lambda: self.warps,
            "lanemask_eq": lambda: one,
            "lanemask_lt": lambda: below,
            "lanemask_le": lambda: below | one,
            "lanemask_ge": lambda: ~below & np.uint64(0xFFFFFFFF),
            "lanemask_gt": lambda: ~(below | one) & np.uint64(0xFFFFFFFF),
            "dynamic_smem_size": lambda: self.shared_bytes,
            "total_smem_size": lambda: self.dynamic_base + self.shared_bytes,
        }
        if base not in known:
            raise Fault(f"the special register {name} is not known")
        return np.asarray(known[base]()).astype(np.uint64)

    # results ----------------------------------------------------------------

    def target(self, operand, type_: str) -> np.ndarray:
        """The array to write an operand's results to, of exactly the type's width."""
        if operand is operands.SINK:
            return np.empty(self.lanes, numpy_type(type_))
        if not isinstance(operand, operands.Register):
            raise Fault(f"{operand} cannot be written")
        return self.source(operand, type_)

    def store(self, operand, type_: str):
        """A function (values, mask) that writes results; a wider register is extended by the type's sign."""
        if operand is operands.SINK:
            return lambda values, mask: None
        have, bits = self.width(operand), type_bits(type_)
        if have < bits:
            raise Fault(f"{operand.name} has {have} bits, too few for .{type_}")
        dtype = numpy_type(type_)
        array = self.register(operand.name)
        if have == bits:
            array = array.view(dtype)
        elif type_[0] == "s":
            array = array.view(SIGNED[have])
        else:
            # Bits, so that an unsigned copy extends them by zeros.
            raw = UNSIGNED[bits]
            return lambda values, mask: np.copyto(array, np.ascontiguousarray(values, dtype).view(raw), where=mask)

        def put(values, mask):
            np.copyto(array, values, where=mask, casting="unsafe")

        return put

    def store_lanes(self, operand, type_: str):
        """Like ``store`` for values of some lanes: a function (values, lanes), with lanes None for all."""
        if operand is operands.SINK:
            return lambda values, lanes: None
        have, bits = self.width(operand), type_bits(type_)
        if have < bits:
            raise Fault(f"{operand.name} has {have} bits, too few for .{type_}")
        array, raw = self.register(operand.name), UNSIGNED[bits]
        if type_[0] == "s":
            array, raw = array.view(SIGNED[have]), SIGNED[bits]

        def put(values, lanes):
            array[slice(None) if lanes is None else lanes] = values.view(raw)

        return put

    def active(self, mask) -> np.ndarray | None:
        """The lanes of a mask; None for all."""
        return None if mask is True else mask.nonzero()[0]

    def whole_warps(self, mask) -> np.ndarray:
        """The warps of a mask, all of whose lanes must be in it."""
        if mask is True:
            return np.arange(self.warps)
        lanes = mask.reshape(self.warps, 32)
        whole = lanes.all(1)
        if (lanes.any(1) & ~whole).any():
            raise Fault("not all lanes of a warp carry this instruction out together")
        return np.flatnonzero(whole)

    def members(self, statement: Statement, acting: np.ndarray) -> np.ndarray:
        """The lanes that must carry a warp-wide statement out together with those of ``acting``."""
        if statement.opcode in ("shfl", "vote", "match", "redux", "elect") or "warp" in statement.modifiers:
            named = self.source(statement.operands[-1], "b32")
            each = np.where(acting, named, np.uint32(0)).reshape(self.warps, 32)
            whole = np.bitwise_or.reduce(each, 1)
            return ((whole[self.warp] >> self.lane) & np.uint32(1)).astype(bool)
        group = 128 if statement.opcode == "wgmma" else 32
        if self.lanes % group:
            raise Fault("wgmma needs blocks of whole warp groups of 128 threads")
        return np.repeat(acting.reshape(-1, group).any(1), group)

    def shared_memory(self, size: int, track: bool) -> SharedMemory:
        """Shared memory as a block finds it; the same arrays serve one block after the other."""
        if (size, track) not in self._shared:
            self._shared[size, track] = SharedMemory(size, self.warps, self.granule, track)
        shared = self._shared[size, track]
        shared.reset()
        return shared

    # decoding ---------------------------------------------------------------

    def decode(self, statement: Statement) -> Step:
        """The step of a statement, guard included."""
        decoder = DECODERS.get(statement.opcode)
        if decoder is None:
            raise Fault(f"the instruction {statement.opcode} is not known")
        step = decoder(self, statement)
        if statement.guard is None:
            return step
        guard, negated = self.source(statement.guard, "pred"), statement.negated
        lanes = self.lanes

        def guarded(mask):
            taken = ~guard if negated else guard
            if mask is not True:
                taken = taken & mask
            count = np.count_nonzero(taken)
            if count == lanes:
                step(True)
            elif count:
                # A copy: the step may write the guard itself.
                step(taken.copy() if taken is guard else taken)

        return guarded


def smallest_shared_access(kernel: Kernel) -> int:
    """The bytes of the kernel's smallest access to memory that may be shared: hazards are tracked in such units."""
    smallest = 16
    for s in kernel.statements:
        if s.opcode in ("ld", "st", "atom", "red") and not {"global", "param", "const", "local"} & set(s.modifiers):
            each = max(type_bits(s.modifiers[-1]) // 8, 1) if s.modifiers[-1] != "pred" else 1
            count = next((int(m[1]) for m in s.modifiers if m in ("v2", "v4")), 1)
            smallest = min(smallest, each * count)
        elif s.opcode == "cp" and len(s.operands) >= 3 and isinstance(s.operands[2], operands.Immediate):
            smallest = min(smallest, s.operands[2].value)
        elif s.opcode == "wgmma" and "mma_async" in s.modifiers:
            smallest = min(smallest, 16)
    return max(smallest, 1)
