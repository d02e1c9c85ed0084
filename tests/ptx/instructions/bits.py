"""Logic, shifts, bit fields, bytes and counts of bits."""

from __future__ import annotations

import numpy as np

from .. import operands
from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from ..values import SIGNED, UNSIGNED


def _setup(machine, s, count: int, *types: str):
    m = Modifiers(s)
    type_ = m.type(*types)
    m.done()
    expect(s, count + 1)
    return type_


@instruction("and", "or", "xor")
def logic(machine, s):
    type_ = _setup(machine, s, 2, "pred", "b16", "b32", "b64")
    ufunc = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[s.opcode]
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    return lambda mask: ufunc(a, b, out=target, where=mask)


@instruction("not")
def invert(machine, s):
    type_ = _setup(machine, s, 1, "pred", "b16", "b32", "b64")
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], type_)
    return lambda mask: np.invert(a, out=target, where=mask)


@instruction("cnot")
def is_zero(machine, s):
    type_ = _setup(machine, s, 1, "b16", "b32", "b64")
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], type_)
    return lambda mask: np.copyto(target, a == 0, where=mask, casting="unsafe")


@instruction("shl", "shr")
def shift(machine, s):
    """Amounts of the type's width or more shift everything out; shr of a signed type fills with the sign."""
    types = (
        ("b16", "b32", "b64") if s.opcode == "shl" else ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
    )
    type_ = _setup(machine, s, 2, *types)
    bits = int(type_[1:])
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], type_)
    dtype = a.dtype.type
    ufunc = np.left_shift if s.opcode == "shl" else np.right_shift
    if isinstance(s.operands[2], operands.Immediate):
        amount = s.operands[2].value & 0xFFFFFFFF
        if amount >= bits:
            if type_[0] != "s":
                return lambda mask: np.copyto(target, dtype(0), where=mask)
            amount = bits - 1
        fixed = machine.source(operands.Immediate(amount), type_)
        return lambda mask: ufunc(a, fixed, out=target, where=mask)
    n = machine.source(s.operands[2], "u32")
    if type_[0] == "s":
        return lambda mask: ufunc(a, np.minimum(n, np.uint32(bits - 1)).astype(dtype), out=target, where=mask)

    def step(mask):
        result = ufunc(a, np.minimum(n, np.uint32(bits - 1)).astype(dtype))
        np.copyto(target, np.where(n >= bits, dtype(0), result), where=mask)

    return step


@instruction("shf")
def funnel_shift(machine, s):
    """The high (left) or low (right) 32 bits of {b, a} shifted by c, which is clamped at 32 or taken modulo 32."""
    m = Modifiers(s)
    m.type("b32")
    left, wrap = m.need("l", "r") == "l", m.need("clamp", "wrap") == "wrap"
    m.done()
    expect(s, 4)
    low, high, amount = (machine.source(o, "u32") for o in s.operands[1:])
    target = machine.target(s.operands[0], "u32")
    half = np.uint64(32)

    def step(mask):
        both = low.astype(np.uint64) | high.astype(np.uint64) << half
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        # numpy leaves shifts by 64 open, but 32 is the most that is asked for here.
        result = (both << n) >> half if left else both >> n
        np.copyto(target, result.astype(np.uint32), where=mask)

    return step


def _ones(n: np.ndarray, dtype) -> np.ndarray:
    """Numbers of ``n`` ones in the low bits, n at most the width."""
    bits = np.dtype(dtype).itemsize * 8
    full = dtype(np.iinfo(dtype).max)
    return np.where(n == 0, dtype(0), full >> (np.uint32(bits) - np.maximum(n, np.uint32(1))).astype(dtype))


@instruction("bfe")
def extract_field(machine, s):
    """Bits pos to pos + len - 1 (each taken modulo 256), extended by zeros, or by the field's or the number's sign."""
    type_ = _setup(machine, s, 3, "u32", "u64", "s32", "s64")
    bits = int(type_[1:])
    a = machine.source(s.operands[1], f"u{bits}")
    pos, length = (machine.source(o, "u32") for o in s.operands[2:])
    target = machine.target(s.operands[0], f"u{bits}")
    dtype = UNSIGNED[bits]
    byte = np.uint32(0xFF)

    def step(mask):
        p, n = pos & byte, np.minimum(length & byte, np.uint32(bits))
        result = np.where(p >= bits, dtype(0), a >> np.minimum(p, np.uint32(bits - 1)).astype(dtype))
        field = _ones(n, dtype)
        result = result & field
        if type_[0] == "s":
            # The ISA: sign is bit min(pos + len - 1, msb) of a; no length, no sign.
            top = np.minimum(p + n - np.uint32(1), np.uint32(bits - 1)).astype(dtype)
            negative = (n > 0) & ((a >> top) & dtype(1)).astype(bool)
            filled = np.minimum(n, np.where(p >= bits, np.uint32(0), np.uint32(bits) - np.minimum(p, np.uint32(bits))))
            result = np.where(negative, result | ~_ones(filled, dtype), result)
        np.copyto(target, result, where=mask)

    return step


@instruction("bfi")
def insert_field(machine, s):
    """Put a's low len bits into b from bit pos on; what would pass the end is dropped."""
    type_ = _setup(machine, s, 4, "b32", "b64")
    bits = int(type_[1:])
    a, b = (machine.source(o, type_) for o in s.operands[1:3])
    pos, length = (machine.source(o, "u32") for o in s.operands[3:])
    target = machine.target(s.operands[0], type_)
    dtype = UNSIGNED[bits]
    byte = np.uint32(0xFF)

    def step(mask):
        p, n = pos & byte, np.minimum(length & byte, np.uint32(bits))
        inside = p < bits
        shift_by = np.minimum(p, np.uint32(bits - 1)).astype(dtype)
        field = np.where(inside, _ones(n, dtype) << shift_by, dtype(0))
        np.copyto(target, (b & ~field) | ((a << shift_by) & field), where=mask)

    return step


@instruction("prmt")
def permute_bytes(machine, s):
    """Pick four of the eight bytes of {b, a}: each nibble of the selector names one; its top bit copies the sign."""
    m = Modifiers(s)
    m.type("b32")
    mode = m.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    m.done()
    expect(s, 4)
    if mode:
        raise Fault(f"prmt.{mode} is not known")
    a, b, selector = (machine.source(o, "u32") for o in s.operands[1:])
    target = machine.target(s.operands[0], "u32")

    def step(mask):
        both = np.stack([a, b], 1).view(np.uint8)  # [lanes, 8], little-endian
        nibble = (selector[:, None] >> (np.arange(4, dtype=np.uint32) * np.uint32(4))) & np.uint32(15)
        chosen = np.take_along_axis(both, (nibble & np.uint32(7)).astype(np.intp), 1)
        sign = (chosen.view(np.int8) >> 7).view(np.uint8)
        result = np.where(nibble & np.uint32(8), sign, chosen)
        np.copyto(target, np.ascontiguousarray(result).view(np.uint32)[:, 0], where=mask)

    return step


@instruction("lop3")
def logic_of_three(machine, s):
    """Any function of three bits: bit 4a + 2b + c of the table."""
    m = Modifiers(s)
    m.type("b32")
    m.done()
    expect(s, 5)
    if not isinstance(s.operands[4], operands.Immediate):
        raise Fault("lop3's table must be a constant")
    table = s.operands[4].value
    if not 0 <= table < 256:
        raise Fault(f"lop3's table {table} does not fit in a byte")
    a, b, c = (machine.source(o, "u32") for o in s.operands[1:4])
    target = machine.target(s.operands[0], "u32")
    minterms = [i for i in range(8) if table >> i & 1]

    def step(mask):
        na, nb, nc = ~a, ~b, ~c
        result = np.zeros_like(a)
        for i in minterms:
            result |= (a if i & 4 else na) & (b if i & 2 else nb) & (c if i & 1 else nc)
        np.copyto(target, result, where=mask)

    return step


def bit_length(x: np.ndarray) -> np.ndarray:
    """How many bits an unsigned number needs; 0 for 0."""
    x = x.astype(np.uint64)
    high, low = (x >> np.uint64(32)).astype(np.float64), (x & np.uint64(0xFFFFFFFF)).astype(np.float64)
    # float64 holds 32 bits exactly; frexp's exponent is the bit length.
    return np.where(high > 0, 32 + np.frexp(high)[1], np.frexp(low)[1]).astype(np.uint32)


def population(x: np.ndarray) -> np.ndarray:
    """How many bits are one."""
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(x.size, -1)
    return np.unpackbits(octets, axis=1).sum(1, dtype=np.uint32)


@instruction("clz", "popc")
def count(machine, s):
    type_ = _setup(machine, s, 1, "b32", "b64")
    bits = np.uint32(int(type_[1:]))
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], "u32")
    compute = population if s.opcode == "popc" else lambda x: bits - bit_length(x)
    return lambda mask: np.copyto(target, compute(a), where=mask)


@instruction("brev")
def reverse(machine, s):
    type_ = _setup(machine, s, 1, "b32", "b64")
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], type_)

    def step(mask):
        octets = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)
        flipped = np.packbits(np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1], axis=1, bitorder="little")
        np.copyto(target, np.ascontiguousarray(flipped).view(a.dtype)[:, 0], where=mask)

    return step


@instruction("bfind")
def find_leading(machine, s):
    """The position of the highest bit that is one, or for signed numbers differs from the sign; all ones if none."""
    m = Modifiers(s)
    type_ = m.type("u32", "u64", "s32", "s64")
    amount = m.flag("shiftamt")
    m.done()
    expect(s, 2)
    bits = int(type_[1:])
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], "u32")

    def step(mask):
        x = np.where(a < 0, ~a, a).view(UNSIGNED[bits]) if type_[0] == "s" else a
        position = bit_length(x) - np.uint32(1)  # wraps to all ones
        if amount:
            position = np.where(x == 0, position, np.uint32(bits - 1) - position)
        np.copyto(target, position, where=mask)

    return step


@instruction("szext")
def extend_bits(machine, s):
    """Keep the low n bits, and fill the rest with the sign (s32) or zeros (u32)."""
    m = Modifiers(s)
    type_ = m.type("s32", "u32")
    wrap = m.need("wrap", "clamp") == "wrap"
    m.done()
    expect(s, 3)
    a, n = machine.source(s.operands[1], "u32"), machine.source(s.operands[2], "u32")
    target = machine.target(s.operands[0], "u32")

    def step(mask):
        size = n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))
        low = a & _ones(size, np.uint32)
        if type_ == "s32":
            spare = (np.uint32(32) - np.maximum(size, np.uint32(1))).astype(np.int32)
            signed = np.left_shift(low.view(SIGNED[32]), spare) >> spare
            low = np.where(size == 0, np.uint32(0), signed.view(np.uint32))
        np.copyto(target, low, where=mask)

    return step
