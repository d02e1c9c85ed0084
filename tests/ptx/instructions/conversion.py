"""cvt: between integers, between floating-point numbers, and from one to the other. (cvta is in movement.py.)"""

from __future__ import annotations

import numpy as np

from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from ..values import (
    flush,
    from_bf16,
    narrow,
    numpy_type,
    odd_float32,
    odd_sum,
    saturate,
    to_bf16,
    to_tf32,
)

_INTEGERS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(machine, s):
    m = Modifiers(s)
    to, from_ = m.types(2)
    if to in ("f16x2", "bf16x2"):
        return _to_pair(machine, s, m, to, from_)
    if to == "tf32":
        return _to_tf32(machine, s, m, from_)
    rounding = m.take("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    m.done()
    expect(s, 2)
    if ftz and "f32" not in (to, from_):
        raise Fault("only float32 is flushed")
    if relu and (to not in ("f16", "bf16") or from_ != "f32"):
        raise Fault(f".relu is not known from .{from_} to .{to}")
    source = machine.source(s.operands[1], from_, wider=True)
    put = machine.store(s.operands[0], to)
    if to in _INTEGERS and from_ in _INTEGERS:
        if rounding or ftz:
            raise Fault("integers are not rounded")
        return lambda mask: put(_integer_to_integer(source, to, sat), mask)
    if to in _INTEGERS and from_ in _FLOATS:
        if rounding not in _TO_INTEGER:
            raise Fault(f"a rounding to integers is needed, not .{rounding}")
        return lambda mask: put(_float_to_integer(_read(source, from_, ftz), to, from_, rounding), mask)
    if to in _FLOATS and from_ in _INTEGERS:
        if rounding not in ("rn", "rz", "rm", "rp"):
            raise Fault(f"a rounding is needed, not .{rounding}")
        if to == "bf16" and (sat or rounding not in ("rn", "rz")):
            raise Fault(f"cvt.{rounding}.bf16.{from_} with these modifiers is not known")
        return lambda mask: put(_integer_to_float(source, to, rounding, sat), mask)
    if to in _FLOATS and from_ in _FLOATS:
        return _between_floats(s, source, put, to, from_, rounding, ftz, sat, relu)
    raise Fault(f"cvt from .{from_} to .{to} is not known")


def _read(source: np.ndarray, type_: str, ftz: bool) -> np.ndarray:
    if type_ == "bf16":
        return from_bf16(source)
    return flush(source) if ftz and type_ == "f32" else source


def _integer_to_integer(x: np.ndarray, to: str, sat: bool) -> np.ndarray:
    dtype = numpy_type(to)
    if not sat:
        return x.astype(dtype)
    bounds = np.iinfo(dtype)
    have = np.iinfo(x.dtype)
    return np.clip(x, x.dtype.type(max(bounds.min, have.min)), x.dtype.type(min(bounds.max, have.max))).astype(dtype)


def _float_to_integer(x: np.ndarray, to: str, from_: str, rounding: str) -> np.ndarray:
    """Rounded, then clamped to the type's range. A NaN becomes 0, or the top bit alone where 64 bits are involved."""
    dtype = numpy_type(to)
    x = _TO_INTEGER[rounding](x.astype(np.float64))
    bounds = np.iinfo(dtype)
    # The bound is exact in float64, unlike the largest integer itself.
    too_high, too_low = x >= 2.0 ** (bounds.bits - (to[0] == "s")), x < float(bounds.min)
    nan = np.isnan(x)
    result = np.where(too_high | too_low | nan, 0.0, x).astype(dtype)
    result = np.where(too_high, dtype(bounds.max), np.where(too_low, dtype(bounds.min), result))
    wide = from_ == "f64" or bounds.bits == 64
    of_nan = dtype(0) if not wide else dtype(bounds.min if to[0] == "s" else 1 << (bounds.bits - 1))
    return np.where(nan, of_nan, result)


def _integer_to_float(x: np.ndarray, to: str, rounding: str, sat: bool) -> np.ndarray:
    if x.dtype.itemsize <= 4:
        wide = x.astype(np.float64)
    elif to == "f64":
        if rounding != "rn":
            raise Fault("64-bit integers are only rounded to nearest here")
        wide = x.astype(np.float64)
    else:
        # Both halves are exact in float64, and their sum is rounded to odd.
        half = x.dtype.type(32)
        low = (x & x.dtype.type(0xFFFFFFFF)).astype(np.float64)
        wide = odd_sum((x >> half).astype(np.float64) * 2.0**32, low)
    y = _round_float(wide, to, rounding)
    return saturate(y) if sat else y


def _round_float(wide: np.ndarray, to: str, rounding: str) -> np.ndarray:
    """Round float64 to a shorter format; a bfloat16 as its bits."""
    if to == "f64":
        return wide
    if to == "bf16":
        return to_bf16(odd_float32(wide), rounding)
    return narrow(wide, numpy_type(to), rounding)


def _between_floats(s, source, put, to, from_, rounding, ftz, sat, relu):
    width = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
    if rounding in _TO_INTEGER:
        if to != from_ or to == "bf16":
            raise Fault(f".{rounding} rounds within one type only")
        round_ = _TO_INTEGER[rounding]

        def step(mask):
            y = round_(_read(source, from_, ftz))
            put(saturate(y) if sat else y, mask)

        return step
    narrowing = width[to] < width[from_]
    if narrowing and rounding not in ("rn", "rz", "rm", "rp"):
        raise Fault("a rounding is needed")
    if not narrowing and rounding and not (to in ("f16", "bf16") and from_ in ("f16", "bf16") and to != from_):
        raise Fault("nothing is rounded here")
    if to == "bf16" and rounding not in ("rn", "rz", None):
        raise Fault(f".{rounding} is not known for .bf16")

    def step(mask):
        x = _read(source, from_, ftz)
        if to == from_:
            y = source if to == "bf16" else x
        elif to == "bf16" and from_ == "f32":
            if relu:
                x = np.where(x < 0, np.float32(0), x)
            put(to_bf16(saturate(x) if sat else x, rounding), mask)
            return
        else:
            y = _round_float(x.astype(np.float64), to, rounding or "rn")
        if to in ("f32", "f16", "f64"):
            if relu:
                y = np.where(y < 0, y.dtype.type(0), y)
            if sat:
                y = saturate(y)
            if ftz and to == "f32":
                y = flush(y)
        elif sat:
            raise Fault(f".sat is not known from .{from_} to .bf16")
        put(y, mask)

    return step


def _to_pair(machine, s, m: Modifiers, to: str, from_: str):
    """cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half, b the lower."""
    rounding = m.need("rn", "rz")
    relu, finite = m.flag("relu"), m.flag("satfinite")
    m.done()
    expect(s, 3)
    if from_ != "f32" or finite:
        raise Fault(f"only cvt from .f32 to .{to} without .satfinite is known")
    high, low = (machine.source(o, "f32") for o in s.operands[1:])
    put = machine.store(s.operands[0], "b32")

    def rounded(x):
        if relu:
            x = np.where(x < 0, np.float32(0), x)
        if to == "bf16x2":
            return to_bf16(x, rounding).astype(np.uint32)
        return narrow(x, np.float16, rounding).view(np.uint16).astype(np.uint32)

    return lambda mask: put(rounded(low) | rounded(high) << np.uint32(16), mask)


def _to_tf32(machine, s, m: Modifiers, from_: str):
    rounding = m.need("rna", "rn", "rz")
    relu, finite = m.flag("relu"), m.flag("satfinite")
    m.done()
    expect(s, 2)
    if from_ != "f32" or relu or finite:
        raise Fault("only cvt from .f32 to .tf32 without .relu and .satfinite is known")
    a, put = machine.source(s.operands[1], "f32"), machine.store(s.operands[0], "b32")
    return lambda mask: put(to_tf32(a, rounding), mask)
