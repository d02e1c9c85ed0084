"""Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad. Floats are in floating.py."""

from __future__ import annotations

import numpy as np

from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from ..values import SIGNED, UNSIGNED, numpy_type
from . import floating

INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
PACKED = ("u16x2", "s16x2")


def is_integer(statement) -> bool:
    return statement.modifiers[-1] in (*INTEGERS, *PACKED, "b16", "b32", "b64")


def _ufunc(machine, s, ufunc, type_, count):
    expect(s, count + 1)
    target = machine.target(s.operands[0], type_)
    sources = [machine.source(o, type_) for o in s.operands[1:]]
    if count == 1:
        (a,) = sources
        return lambda mask: ufunc(a, out=target, where=mask)
    a, b = sources
    return lambda mask: ufunc(a, b, out=target, where=mask)


@instruction("add", "sub")
def add(machine, s):
    if not is_integer(s):
        return floating.binary(machine, s)
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    ufunc = np.add if s.opcode == "add" else np.subtract
    if m.flag("sat"):
        if type_ != "s32":
            raise Fault("only s32 saturates")
        m.done()
        expect(s, 3)
        a, b = machine.source(s.operands[1], type_), machine.source(s.operands[2], type_)
        put = machine.store(s.operands[0], type_)
        return lambda mask: put(np.clip(ufunc(a, b, dtype=np.int64), -(2**31), 2**31 - 1), mask)
    m.done()
    return _ufunc(machine, s, ufunc, type_, 2)


@instruction("min", "max")
def extreme(machine, s):
    if not is_integer(s):
        return floating.extreme(machine, s)
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    m.done()
    return _ufunc(machine, s, np.minimum if s.opcode == "min" else np.maximum, type_, 2)


@instruction("neg")
def negate(machine, s):
    if not is_integer(s):
        return floating.sign(machine, s)
    m = Modifiers(s)
    type_ = m.type("s16", "s32", "s64")
    m.done()
    return _ufunc(machine, s, np.negative, type_, 1)


@instruction("abs")
def absolute(machine, s):
    if not is_integer(s):
        return floating.sign(machine, s)
    m = Modifiers(s)
    type_ = m.type("s16", "s32", "s64")
    m.done()
    return _ufunc(machine, s, np.absolute, type_, 1)


def high_half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The high 64 bits of the product of unsigned 64-bit numbers."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    xl, xh, yl, yh = x & low, x >> shift, y & low, y >> shift
    middle = xh * yl + ((xl * yl) >> shift)
    other = xl * yh + (middle & low)
    return xh * yh + (middle >> shift) + (other >> shift)


def _signed_high_half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = x.view(np.uint64), y.view(np.uint64)
    zero = np.uint64(0)
    return (high_half(a, b) - np.where(x < 0, b, zero) - np.where(y < 0, a, zero)).view(np.int64)


def _product(type_: str, part: str):
    """A function of two arrays: the low or high half, or the whole, of their product."""
    bits, signed = int(type_[1:]), type_[0] == "s"
    if part == "lo":
        return np.multiply
    if part == "hi" and bits == 64:
        return _signed_high_half if signed else high_half
    wide = (SIGNED if signed else UNSIGNED)[2 * bits]
    if part == "wide":
        return lambda x, y: np.multiply(x, y, dtype=wide)
    narrow = numpy_type(type_)
    return lambda x, y: (np.multiply(x, y, dtype=wide) >> wide(bits)).astype(narrow)


def _part(m: Modifiers, type_: str) -> tuple[str, str]:
    part = m.need("lo", "hi", "wide")
    if part == "wide" and type_.endswith("64"):
        raise Fault("there is no product of 128 bits")
    return part, f"{type_[0]}{2 * int(type_[1:])}" if part == "wide" else type_


@instruction("mul")
def multiply(machine, s):
    if not is_integer(s):
        return floating.binary(machine, s)
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    part, result = _part(m, type_)
    m.done()
    if part == "lo":
        return _ufunc(machine, s, np.multiply, type_, 2)
    expect(s, 3)
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], result)
    if part == "wide":
        wide = target.dtype.type
        return lambda mask: np.multiply(a, b, out=target, where=mask, dtype=wide)
    product = _product(type_, part)
    return lambda mask: np.copyto(target, product(a, b), where=mask)


@instruction("mad")
def multiply_add(machine, s):
    if not is_integer(s):
        return floating.fused(machine, s)
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    part, result = _part(m, type_)
    m.done()
    expect(s, 4)
    a, b = (machine.source(o, type_) for o in s.operands[1:3])
    c, target = machine.source(s.operands[3], result), machine.target(s.operands[0], result)
    product = _product(type_, part)
    return lambda mask: np.add(product(a, b), c, out=target, where=mask)


@instruction("mul24", "mad24")
def multiply_24(machine, s):
    raise Fault("24-bit products are not known")


def truncating_division(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integer division towards zero; by zero it gives all ones, as the hardware does (PTX leaves it open)."""
    ones = x.dtype.type(-1 if x.dtype.kind == "i" else np.iinfo(x.dtype).max)
    return np.where(y == 0, ones, (x - np.fmod(x, y)) // y)


@instruction("div")
def divide(machine, s):
    if not is_integer(s):
        return floating.divide(machine, s)
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    m.done()
    expect(s, 3)
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    return lambda mask: np.copyto(target, truncating_division(a, b), where=mask)


@instruction("rem")
def remainder(machine, s):
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    m.done()
    expect(s, 3)
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    # By zero PTX leaves the result open; the hardware gives the dividend.
    return lambda mask: np.copyto(target, np.where(b == 0, a, np.fmod(a, b)), where=mask)


@instruction("sad")
def sum_of_differences(machine, s):
    m = Modifiers(s)
    type_ = m.type(*INTEGERS)
    m.done()
    expect(s, 4)
    a, b, c = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    return lambda mask: np.add(c, np.where(a < b, b - a, a - b), out=target, where=mask)
