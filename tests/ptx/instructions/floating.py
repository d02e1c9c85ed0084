"""Floating-point arithmetic, in float32, float64 and the 16-bit formats, alone and in pairs.

Approximate instructions (``ex2.approx`` and the like) are computed exactly and rounded once: nearer to the truth than
the hardware, whose error the PTX manual bounds.
"""

from __future__ import annotations

import numpy as np

from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from ..values import (
    flush,
    fma32,
    fma64,
    from_bf16,
    narrow,
    odd_sum,
    saturate,
    to_bf16_from_double,
)

SCALARS = ("f32", "f64", "f16", "bf16")
PAIRS = ("f16x2", "bf16x2")
ROUNDINGS = ("rn", "rz", "rm", "rp")


# 16-bit formats ------------------------------------------------------------


def half_sources(machine, operand, type_: str):
    """Functions that read an operand of a 16-bit format, or each half of a pair, as float64."""
    if type_ == "f16":
        array = machine.source(operand, "f16")
        return [lambda: array.astype(np.float64)]
    if type_ == "bf16":
        array = machine.source(operand, "bf16")
        return [lambda: from_bf16(array).astype(np.float64)]
    bits = machine.source(operand, "b32").view(np.uint16).reshape(-1, 2)
    if type_ == "f16x2":
        return [lambda h=h: bits[:, h].view(np.float16).astype(np.float64) for h in (0, 1)]
    return [lambda h=h: from_bf16(bits[:, h]).astype(np.float64) for h in (0, 1)]


def half_store(machine, operand, type_: str):
    """A function (list of float64 arrays, mask) that rounds and writes them."""
    rounded = (lambda x: x.astype(np.float16).view(np.uint16)) if type_.startswith("f16") else to_bf16_from_double
    if not type_.endswith("x2"):
        put = machine.store(operand, "b16")
        return lambda values, mask: put(rounded(values[0]), mask)
    put = machine.store(operand, "b32")

    def store(values, mask):
        low, high = (rounded(v).astype(np.uint32) for v in values)
        put(low | high << np.uint32(16), mask)

    return store


def half_elementwise(machine, s, type_: str, function, finish=lambda x: x):
    """A step for a function of float64 arrays, whose result is exact or rounded to odd."""
    sources = [half_sources(machine, o, type_) for o in s.operands[1:]]
    put = half_store(machine, s.operands[0], type_)

    def step(mask):
        put([finish(function(*(read() for read in half))) for half in zip(*sources)], mask)

    return step


def odd_fma(x, y, z):
    """``x * y + z`` of 16-bit floats held as float64, rounded to odd: their product is exact."""
    return odd_sum(x * y, z)


# add, sub, mul, fma ----------------------------------------------------------


def _arithmetic_modifiers(s, *types: str):
    m = Modifiers(s)
    type_ = m.type(*types)
    rounding = m.take(*ROUNDINGS) or "rn"
    ftz, sat = m.flag("ftz"), m.flag("sat")
    if ftz and type_ == "f64":
        raise Fault("float64 is never flushed")
    if rounding != "rn" and type_ not in ("f32", "f64"):
        raise Fault(f".{rounding} is not known for .{type_}")
    if ftz and type_ != "f32":
        raise Fault(f".ftz is not known for .{type_}")
    return m, type_, rounding, ftz, sat


def _changed(function, ftz: bool, sat: bool):
    """Wrap a float32 function for .ftz and .sat."""
    if not ftz and not sat:
        return function

    def wrapped(*values):
        if ftz:
            values = [flush(v) for v in values]
        result = function(*values)
        if sat:
            result = saturate(result)
        return flush(result) if ftz else result

    return wrapped


def _directed(opcode: str, rounding: str):
    """add, sub or mul of float32 in another direction than to nearest."""

    def compute(x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        if opcode == "mul":
            return narrow(x * y, np.float32, rounding)
        return narrow(odd_sum(x, -y if opcode == "sub" else y), np.float32, rounding)

    return compute


def binary(machine, s):
    m, type_, rounding, ftz, sat = _arithmetic_modifiers(s, *SCALARS, *PAIRS)
    m.done()
    expect(s, 3)
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[s.opcode]
    if type_ not in ("f32", "f64"):
        exact = {"add": odd_sum, "sub": lambda x, y: odd_sum(x, -y), "mul": np.multiply}[s.opcode]
        return half_elementwise(machine, s, type_, exact, saturate if sat else lambda x: x)
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    if type_ == "f64" and (rounding != "rn" or sat):
        raise Fault("float64 is only rounded to nearest here")
    if rounding == "rn" and not ftz and not sat:
        return lambda mask: ufunc(a, b, out=target, where=mask)
    compute = _changed(ufunc if rounding == "rn" else _directed(s.opcode, rounding), ftz, sat)
    return lambda mask: np.copyto(target, compute(a, b), where=mask)


@instruction("fma")
def fused(machine, s):
    m, type_, rounding, ftz, sat = _arithmetic_modifiers(s, *SCALARS, *PAIRS)
    relu = m.flag("relu")
    m.done()
    expect(s, 4)
    if type_ not in ("f32", "f64"):
        finish = saturate if sat else (lambda x: np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))) if relu else None
        return half_elementwise(machine, s, type_, odd_fma, finish or (lambda x: x))
    if relu:
        raise Fault(f".relu is not known for .{type_}")
    a, b, c = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    if type_ == "f64":
        if rounding != "rn" or sat:
            raise Fault("float64 is only rounded to nearest here")
        return lambda mask: np.copyto(target, fma64(a, b, c), where=mask)
    compute = _changed(fma32 if rounding == "rn" else lambda x, y, z: fma32(x, y, z, rounding), ftz, sat)
    return lambda mask: np.copyto(target, compute(a, b, c), where=mask)


# min and max -----------------------------------------------------------------


def _extreme(opcode: str, nan: bool):
    """IEEE's minimum and maximum: -0 lies below +0; a NaN loses, or wins with .NaN."""
    ufunc = {("min", False): np.fmin, ("min", True): np.minimum, ("max", False): np.fmax, ("max", True): np.maximum}[
        opcode, nan
    ]
    join = np.bitwise_or if opcode == "min" else np.bitwise_and

    def compute(x, y):
        bits = np.uint64 if x.dtype.itemsize == 8 else np.uint32
        result = ufunc(x, y)
        # Equal numbers have equal bits, but for the zeros.
        return np.where(x == y, join(x.view(bits), y.view(bits)).view(x.dtype), result)

    return compute


def extreme(machine, s):
    m = Modifiers(s)
    type_ = m.type(*SCALARS, *PAIRS)
    nan, ftz = m.flag("NaN"), m.flag("ftz")
    m.done()
    expect(s, 3)
    compute = _extreme(s.opcode, nan)
    if type_ not in ("f32", "f64"):
        if ftz:
            raise Fault(f".ftz is not known for .{type_}")
        return half_elementwise(machine, s, type_, compute)
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    compute = _changed(compute, ftz, False)
    return lambda mask: np.copyto(target, compute(a, b), where=mask)


# sign ------------------------------------------------------------------------


def sign(machine, s):
    """neg and abs change a float's sign bit, a NaN's too."""
    m = Modifiers(s)
    type_ = m.type(*SCALARS, *PAIRS)
    ftz = m.flag("ftz")
    m.done()
    expect(s, 2)
    if ftz:
        if type_ != "f32":
            raise Fault(f".ftz is not known for .{type_}")
        a, target = machine.source(s.operands[1], "f32"), machine.target(s.operands[0], "f32")
        ufunc = np.negative if s.opcode == "neg" else np.absolute
        return lambda mask: np.copyto(target, ufunc(flush(a)), where=mask)
    bits = {"f64": 64, "f32": 32, "f16x2": 32, "bf16x2": 32, "f16": 16, "bf16": 16}[type_]
    top = {64: 1 << 63, 32: 0x80008000 if type_.endswith("x2") else 1 << 31, 16: 1 << 15}[bits]
    a, target = machine.source(s.operands[1], f"b{bits}"), machine.target(s.operands[0], f"b{bits}")
    if s.opcode == "neg":
        flip = target.dtype.type(top)
        return lambda mask: np.bitwise_xor(a, flip, out=target, where=mask)
    keep = ~target.dtype.type(top)
    return lambda mask: np.bitwise_and(a, keep, out=target, where=mask)


@instruction("copysign")
def copysign(machine, s):
    m = Modifiers(s)
    type_ = m.type("f32", "f64")
    m.done()
    expect(s, 3)
    # copysign d, a, b: a's sign and b's magnitude.
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    return lambda mask: np.copysign(b, a, out=target, where=mask)


# division and functions of one argument -----------------------------------------


def _divide_approximately(x, y):
    """div.approx.f32: beyond 2**126 a divisor's reciprocal is flushed to zero."""
    result = x / y
    large = np.abs(y) > np.float32(2.0**126)
    large &= np.isfinite(y)
    return np.where(large, np.where(np.isinf(x), np.float32(np.nan), np.copysign(np.float32(0), result)), result)


def divide(machine, s):
    m = Modifiers(s)
    type_ = m.type("f32", "f64")
    kind = m.need("approx", "full", "rn", "rz", "rm", "rp")
    ftz = m.flag("ftz")
    m.done()
    expect(s, 3)
    if kind in ("rz", "rm", "rp") or (type_ == "f64" and (kind != "rn" or ftz)):
        raise Fault(f"div.{kind}.{type_} is not known")
    a, b = (machine.source(o, type_) for o in s.operands[1:])
    target = machine.target(s.operands[0], type_)
    if kind != "approx" and not ftz:
        return lambda mask: np.divide(a, b, out=target, where=mask)
    compute = _changed(_divide_approximately if kind == "approx" else np.divide, ftz, False)
    return lambda mask: np.copyto(target, compute(a, b), where=mask)


def _wide(function):
    """A function computed in float64 and rounded once to float32."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


_FUNCTIONS = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "rcp": lambda x: 1.0 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@instruction("sqrt", "rsqrt", "rcp", "ex2", "lg2", "tanh", "sin", "cos")
def function(machine, s):
    m = Modifiers(s)
    type_ = m.type("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    kind = m.need("approx", "rn", "rz", "rm", "rp")
    ftz = m.flag("ftz")
    m.done()
    expect(s, 2)
    compute = _FUNCTIONS[s.opcode]
    if kind == "rn" and s.opcode not in ("sqrt", "rcp"):
        raise Fault(f"{s.opcode}.rn is not known")
    if kind in ("rz", "rm", "rp"):
        raise Fault(f"{s.opcode}.{kind} is not known")
    if type_ not in ("f32", "f64"):
        if s.opcode not in ("ex2", "tanh") or (ftz and not type_.startswith("bf16")):
            raise Fault(f"{s.opcode}.{type_} is not known")
        return half_elementwise(machine, s, type_, compute)
    if type_ == "f64":
        # rsqrt.approx.f64 is a sequence of instructions, what CUDA's rsqrt of a double is made of: off by one unit in
        # the last place at most. The other approximations of float64 have 20 bits, on which no kernel of ours may rely.
        if ftz or kind != "rn" and s.opcode != "rsqrt":
            raise Fault(f"{s.opcode}.{kind}.f64 is not known")
        apply = compute
    else:
        apply = _changed(np.sqrt if s.opcode == "sqrt" else _wide(compute), ftz, False)
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], type_)
    return lambda mask: np.copyto(target, apply(a), where=mask)
