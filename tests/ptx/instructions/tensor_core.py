"""mma.sync: a warp's product of small matrices, D = A B + C.

Products are exact and summed in float64, then rounded once to the result's type: the hardware adds in an order and
with an alignment of its own that PTX leaves open, so a test must allow for that.

The fragments, for lane 4 g + t: the ISA's tables in one rule. A holds numbers of 16, 32 or 64 bits; a register holds
``pack`` = 2, 1 or 1 of them side by side in a row. Register i of A, of M/8 row halves, has row g + 8 (i mod (M/8)) and
columns pack t + 4 pack (i div (M/8)) + 0..pack-1. Register i of B has rows pack t + 4 pack i + 0..pack-1, column g.
Register i of C and D has row g + 8 (i div 2), column 2 t + i mod 2.
"""

from __future__ import annotations

import re

import numpy as np

from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from ..values import from_bf16
from .movement import _elements

#: (type of A and B) -> the shapes that are known
_SHAPES = {
    "f64": {(8, 8, 4), (16, 8, 4), (16, 8, 8), (16, 8, 16)},
    "tf32": {(16, 8, 4), (16, 8, 8)},
    "f16": {(16, 8, 8), (16, 8, 16)},
    "bf16": {(16, 8, 8), (16, 8, 16)},
}
TF32_BITS = np.uint32(0xFFFFE000)


def numbers(bits: np.ndarray, type_: str) -> np.ndarray:
    """Registers' bits as float64; 16-bit types get a last axis of the two in a register. tf32 drops its low bits."""
    if type_ == "f64":
        return bits.view(np.float64)
    if type_ == "tf32":
        return (bits & TF32_BITS).view(np.float32).astype(np.float64)
    halves = np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)
    return (halves.view(np.float16) if type_ == "f16" else from_bf16(halves)).astype(np.float64)


def fragment_a(registers: np.ndarray, type_: str, row_halves: int) -> np.ndarray:
    """[registers, warps * 32] bits of A -> [warps, M, K]."""
    count, lanes = registers.shape
    pack = 2 if type_ in ("f16", "bf16") else 1
    x = numbers(registers, type_).reshape(count // row_halves, row_halves, lanes // 32, 8, 4, pack)
    # column half, row half, warp, g, t, place -> warp, row half, g, column half, t, place
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(lanes // 32, 8 * row_halves, -1)


def fragment_b(registers: np.ndarray, type_: str) -> np.ndarray:
    """[registers, warps * 32] bits of B -> [warps, K, 8]."""
    count, lanes = registers.shape
    pack = 2 if type_ in ("f16", "bf16") else 1
    x = numbers(registers, type_).reshape(count, lanes // 32, 8, 4, pack)
    # half, warp, g, t, place -> warp, half, t, place, g
    return x.transpose(1, 0, 3, 4, 2).reshape(lanes // 32, -1, 8)


def fragment_d(product: np.ndarray) -> np.ndarray:
    """[warps, M, 8] -> [registers, warps * 32]."""
    warps, rows, _ = product.shape
    x = product.reshape(warps, rows // 8, 8, 4, 2)
    # warp, row half, g, t, place -> row half, place, warp, g, t
    return x.transpose(1, 4, 0, 2, 3).reshape(rows // 4, warps * 32)


def _gather(machine, elements, type_: str) -> list[np.ndarray]:
    return [machine.source(o, type_) for o in elements]


@instruction("mma")
def multiply_accumulate(machine, s):
    m = Modifiers(s)
    d_type, a_type, b_type, c_type = m.types(4)
    if not (m.flag("sync") and m.flag("aligned") and m.flag("row") and m.flag("col")):
        raise Fault("only mma.sync.aligned with A by rows and B by columns is known")
    shape_name = next((x for x in m.left if re.fullmatch(r"m\d+n\d+k\d+", x)), "")
    m.take(shape_name)
    m.done()
    expect(s, 4)
    rows, columns, depth = shape = tuple(int(n) for n in re.findall(r"\d+", shape_name)) or (0, 0, 0)
    if a_type != b_type or shape not in _SHAPES.get(a_type, ()):
        raise Fault(f"mma of .{a_type} and .{b_type} in the shape {shape_name} is not known")
    accumulator = "f64" if a_type == "f64" else "f32"
    if (d_type, c_type) != (accumulator, accumulator):
        raise Fault(f"mma of .{a_type} into .{d_type} and .{c_type} is not known")
    per_register = 2 if a_type in ("f16", "bf16") else 1
    register_type = "b64" if a_type == "f64" else "b32"
    a_sources = _gather(machine, _elements(s.operands[1], rows * depth // 32 // per_register), register_type)
    b_sources = _gather(machine, _elements(s.operands[2], columns * depth // 32 // per_register), register_type)
    c_sources = _gather(machine, _elements(s.operands[3], rows * columns // 32), accumulator)
    targets = [machine.target(o, d_type) for o in _elements(s.operands[0], rows * columns // 32)]

    def step(mask):
        if mask is not True:
            machine.whole_warps(mask)
        a = fragment_a(np.stack(a_sources), a_type, rows // 8)
        b = fragment_b(np.stack(b_sources), a_type)
        sums = fragment_d(a @ b)
        sums += np.stack(c_sources)
        sums = sums.astype(targets[0].dtype, copy=False)
        for target, value in zip(targets, sums):
            np.copyto(target, value, where=mask)

    return step
