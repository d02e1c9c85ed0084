"""wgmma.mma_async: products of a warp group of 128 threads, in flight until their group is waited for.

While a product is in flight its result registers hold NaN, and shared memory that it reads must not be written. A and B
lie in shared memory in a layout that a descriptor describes, or A lies in registers. Each product is summed in float64
and rounded once to float32.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from .. import operands
from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from .movement import _elements
from .tensor_core import fragment_a, fragment_d, numbers

_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8}
_ROWS = 64


@dataclasses.dataclass
class Product:
    """One product in flight."""

    group: int  #: the number of groups committed before
    results: dict[str, np.ndarray]  #: bits per register
    mask: object
    inputs: dict[str, np.ndarray]  #: A's registers as they were
    cells: np.ndarray | None  #: the granules of shared memory that it reads
    offsets: np.ndarray
    warps: np.ndarray
    line: int


class InFlight:
    """All products of a block that nobody has waited for."""

    def __init__(self):
        self.products: list[Product] = []
        self.committed = 0
        self.fenced: dict[str, np.ndarray] | None = None  #: registers as they were at the last wgmma.fence

    def pending(self, name: str) -> np.ndarray | None:
        """A register's latest result in flight."""
        for product in reversed(self.products):
            if name in product.results:
                return product.results[name]
        return None


def in_flight(machine) -> InFlight:
    if machine.products is None:
        machine.products = InFlight()
    return machine.products


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory: all in bytes.

    ``start`` is its address, ``leading`` and ``stride`` step from one 8-row core matrix to the next; ``pitch`` is the
    width of the swizzled row: 128, 64 or 32 bytes.
    """

    start: int
    leading: int
    stride: int
    pitch: int

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        swizzle, base_offset = bits >> 62 & 3, bits >> 49 & 7
        if base_offset:
            raise Fault(f"a descriptor's base offset {base_offset} is not known, only 0")
        if swizzle == 0:
            raise Fault("descriptors without a swizzle are not known")
        pitch = {1: 128, 2: 64, 3: 32}[swizzle]
        return cls((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, pitch)

    def offsets(self, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
        """The byte offsets [rows, depth] of a matrix whose elements have ``size`` bytes.

        Not transposed (K-major), each row's ``depth`` elements lie side by side, and eight rows make an atom.
        Transposed (MN-major), the elements of a column lie side by side.
        """
        r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        if not transposed:
            at = self.start + r // 8 * self.stride + r % 8 * self.pitch + k * size
        else:
            across = self.pitch // size
            at = self.start + r % across * size + r // across * self.leading + k % 8 * self.pitch + k // 8 * self.stride
        # The swizzle exchanges 16-byte pieces: the address bits from 4 up by those from 7 up.
        bits = {128: 7, 64: 3, 32: 1}[self.pitch]
        return at ^ (at >> 7 & bits) << 4


def _shape(m: Modifiers) -> tuple[int, int, int]:
    name = next((x for x in m.left if re.fullmatch(r"m\d+n\d+k\d+", x)), None)
    if name is None:
        raise Fault("the shape is missing")
    m.take(name)
    return tuple(int(n) for n in re.findall(r"\d+", name))


def multiply(machine, s, m: Modifiers):
    d_type, a_type, b_type = m.types(3)
    rows, columns, depth = _shape(m)
    m.done()
    if a_type != b_type or d_type != "f32" or a_type not in _DEPTH:
        raise Fault(f"wgmma of .{a_type} and .{b_type} into .{d_type} is not known")
    if rows != _ROWS or depth != _DEPTH[a_type] or columns % 8 or not 8 <= columns <= 256:
        raise Fault(f"wgmma in the shape m{rows}n{columns}k{depth} is not known")
    a_in_registers = isinstance(s.operands[1], operands.Vector)
    flags = 0 if a_type == "tf32" else 1 if a_in_registers else 2
    expect(s, 6 + flags)
    scales_and_flags = s.operands[4:]
    if not all(isinstance(o, operands.Immediate) for o in scales_and_flags):
        raise Fault("scales and transpositions must be constants")
    scale_a, scale_b, *transposed = (o.value for o in scales_and_flags)
    if scale_a not in (1, -1) or scale_b not in (1, -1) or any(t not in (0, 1) for t in transposed):
        raise Fault("scales are 1 or -1, transpositions 0 or 1")
    transpose_b = bool(transposed[-1]) if transposed else False
    transpose_a = bool(transposed[0]) if len(transposed) == 2 else False
    sign = scale_a * scale_b
    size = 4 if a_type == "tf32" else 2
    results = _elements(s.operands[0], columns // 2)
    names = [o.name for o in results]
    targets = [machine.target(o, "f32") for o in results]
    scale_d = machine.predicate(s.operands[3])
    if a_in_registers:
        elements = _elements(s.operands[1], 4)
        a_names, a_registers = [o.name for o in elements], [machine.source(o, "b32") for o in elements]
    else:
        a_names, a_registers, a_descriptor = [], [], machine.source(s.operands[1], "u64")
    b_descriptor = machine.source(s.operands[2], "u64")

    def matrix(bits: int, rows_: int, transposed_: bool) -> tuple[np.ndarray, np.ndarray]:
        """A matrix's numbers, and the offsets of the 16-byte pieces that it lies in."""
        offsets = Descriptor.of(bits).offsets(rows_, depth, size, transposed_)
        flat = offsets.ravel()
        machine.shared.check(flat.astype(np.uint32), size, "read by wgmma")
        raw = machine.shared.views[size].take(flat // size)
        value = numbers(raw, "tf32") if a_type == "tf32" else _halves(raw, a_type)
        machine.bytes["shared"] += flat.size * size
        return value.reshape(rows_, depth), np.unique(flat // 16) * 16

    def one(values: np.ndarray, lanes: slice) -> int:
        found = values[lanes]
        if (found != found[0]).any():
            raise Fault("a descriptor differs between the threads of a warp group")
        return int(found[0])

    def step(mask):
        flight = in_flight(machine)
        acting = np.ones(machine.lanes, bool) if mask is True else mask
        groups = acting.reshape(-1, 128)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault("not all threads of a warp group take part")
        _check_fence(machine, flight, names, a_names)
        old = np.stack([_pending(flight, name, target) for name, target in zip(names, targets)])
        sums = np.zeros((columns // 2, machine.lanes))
        read_offsets, read_warps = [], []
        for group in np.flatnonzero(groups.all(1)):
            lanes = slice(128 * group, 128 * group + 128)
            warps = np.arange(4 * group, 4 * group + 4)
            if a_in_registers:
                a = fragment_a(np.stack([r[lanes] for r in a_registers]), a_type, 2).reshape(_ROWS, depth)
            else:
                a, pieces = matrix(one(a_descriptor, lanes), _ROWS, transpose_a)
                read_offsets.append(pieces)
                read_warps.append(np.full(pieces.size, warps[0]))
            b, pieces = matrix(one(b_descriptor, lanes), columns, transpose_b)
            read_offsets.append(pieces)
            read_warps.append(np.full(pieces.size, warps[0]))
            product = sign * (a @ b.T)  # [64, columns]
            # Warp w has rows 16 w to 16 w + 15, and in each block of eight columns an mma's fragment of D.
            blocks = product.reshape(4, 16, columns // 8, 8).transpose(2, 0, 1, 3)
            sums[:, lanes] = np.concatenate([fragment_d(block) for block in blocks])
        sums += np.where(scale_d, old.astype(np.float64), 0.0)
        offsets, warps = np.concatenate(read_offsets), np.concatenate(read_warps)
        cells = _note_reads(machine, offsets, warps, s.line)
        bits = sums.astype(np.float32).view(np.uint32)
        flight.products.append(
            Product(
                flight.committed,
                dict(zip(names, bits)),
                mask,
                {n: r.copy() for n, r in zip(a_names, a_registers)},
                cells,
                offsets,
                warps,
                s.line,
            )
        )
        for target in targets:
            np.copyto(target.view(np.uint32), np.uint32(0xFFFFFFFF), where=mask)

    return step


def _halves(raw: np.ndarray, type_: str) -> np.ndarray:
    pairs = raw.reshape(-1, 2).view(np.uint32)[:, 0]
    return numbers(pairs, type_).ravel()


def _pending(flight: InFlight, name: str, target: np.ndarray) -> np.ndarray:
    bits = flight.pending(name)
    return target.copy() if bits is None else bits.view(np.float32)


def _check_fence(machine, flight: InFlight, names, a_names) -> None:
    """Registers must not have changed since the last wgmma.fence, other than by products themselves."""
    if flight.fenced is None:
        raise Fault("wgmma.fence is missing before the first product")
    for name in [*names, *a_names]:
        if flight.pending(name) is None and (machine.register(name) != flight.fenced[name]).any():
            raise Fault(f"{name} was changed after the last wgmma.fence")


def _note_reads(machine, offsets: np.ndarray, warps: np.ndarray, line: int) -> np.ndarray | None:
    shared = machine.shared
    if not shared.track:
        return None
    shared.note_read(offsets, 16, warps, line, remember=False)
    cells, owners = shared.cells(offsets, 16, warps)
    if shared.unfenced[cells].any():
        hidden = shared.unfenced[cells]
        shared.report("reads, with no fence.proxy.async since its write,", line, cells, owners, hidden,
                      shared.writer[cells], shared.line[cells])  # fmt: skip
    shared.note_product(cells, 1)
    return cells


def _registers_of_products(kernel) -> list[str]:
    """The registers that any of the kernel's products reads A from or writes."""
    vectors = [
        o for s in kernel.statements if s.opcode == "wgmma" for o in s.operands[:2] if isinstance(o, operands.Vector)
    ]
    return sorted({o.name for vector in vectors for o in vector.elements})


def fence(machine, s, m: Modifiers):
    m.done()

    used = _registers_of_products(machine.kernel)

    def step(mask):
        in_flight(machine).fenced = {name: machine.register(name).copy() for name in used}

    return step


def commit(machine, s, m: Modifiers):
    m.done()

    def step(mask):
        in_flight(machine).committed += 1

    return step


def wait(machine, s, m: Modifiers):
    m.done()
    expect(s, 1)
    if not isinstance(s.operands[0], operands.Immediate):
        raise Fault("the number of groups must be a constant")
    allowed = s.operands[0].value

    def step(mask):
        flight = in_flight(machine)
        done = [p for p in flight.products if p.group < flight.committed - allowed]
        flight.products = [p for p in flight.products if p.group >= flight.committed - allowed]
        landed: dict[str, tuple[np.ndarray, object]] = {}
        for product in done:
            _finish(machine, product)
            landed |= {name: (bits, product.mask) for name, bits in product.results.items()}
        for name, (bits, product_mask) in landed.items():
            register = machine.register(name)
            changed = register != np.uint32(0xFFFFFFFF)
            if product_mask is not True:
                changed &= product_mask
            if changed.any():
                raise Fault(f"{name} was changed while a product was to be written to it")
            if flight.pending(name) is None:
                np.copyto(register, bits, where=product_mask)

    return step


def _finish(machine, product: Product) -> None:
    for name, before in product.inputs.items():
        if (machine.register(name) != before).any():
            raise Fault(f"{name} was changed while the product of line {product.line} was reading it")
    shared = machine.shared
    if product.cells is not None:
        shared.note_product(product.cells, -1)
        # The reads of all four warps have happened by now.
        for k in range(4):
            shared.note_read(product.offsets, 16, product.warps + k, product.line)


@instruction("wgmma")
def wgmma(machine, s):
    m = Modifiers(s)
    kind = m.need("mma_async", "fence", "commit_group", "wait_group")
    if not (m.flag("sync") and m.flag("aligned")):
        raise Fault("wgmma needs .sync.aligned")
    return {"mma_async": multiply, "fence": fence, "commit_group": commit, "wait_group": wait}[kind](machine, s, m)
