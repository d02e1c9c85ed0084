"""Numbers as PTX's types hold them: numpy types, 16-bit floats and correct rounding in every direction.

A bfloat16 is held as its bits in a uint16, since numpy has no such type. Results that need more than one rounding
are first rounded to odd in float64: the result is cut off towards zero, and its last bit is set if anything was lost.
A second rounding, in any direction, to a format shorter by two bits or more is then right (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

#: What a NaN looks like where PTX names its bits.
NAN_F16, NAN_BF16, NAN_F32 = 0x7FFF, 0x7FFF, 0x7FFFFFFF


def numpy_type(name: str) -> type:
    """``s32`` -> numpy.int32. The types that numpy lacks are held as unsigned bits."""
    if name == "pred":
        return np.bool_
    if name == "bf16":
        return np.uint16
    if name in ("f16x2", "bf16x2", "tf32"):
        return np.uint32
    kinds = {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}
    return kinds[name[0]][int(name[1:])]


# 16-bit formats and tf32 -------------------------------------------------


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Round float32 to bfloat16; a NaN becomes the one NaN that PTX names."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    elif mode == "rz":
        rounded = bits
    else:
        raise KeyError(mode)
    result = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(NAN_BF16), result)


def to_tf32(x: np.ndarray, mode: str) -> np.ndarray:
    """Round float32 to tf32's 10 bits of mantissa; the result is the bits of a float32 whose low 13 are zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rna":
        rounded = bits + np.uint32(0x1000)
    elif mode == "rn":
        rounded = bits + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
    elif mode == "rz":
        rounded = bits
    else:
        raise KeyError(mode)
    return np.where(np.isnan(x), np.uint32(NAN_F32), rounded & np.uint32(0xFFFFE000))


# directed rounding -------------------------------------------------------


def narrow(x: np.ndarray, dtype: type, mode: str) -> np.ndarray:
    """Round to a shorter floating-point type of numpy's in the direction of PTX's ``rn``, ``rz``, ``rm`` or ``rp``."""
    y = x.astype(dtype)
    if mode == "rn":
        return y
    wide = y.astype(x.dtype)
    lower, upper = dtype(-np.inf), dtype(np.inf)
    if mode == "rz":
        wrong = np.abs(wide) > np.abs(x)
        return np.where(wrong, np.nextafter(y, dtype(0)), y)
    if mode == "rm":
        return np.where(wide > x, np.nextafter(y, lower), y)
    if mode == "rp":
        return np.where(wide < x, np.nextafter(y, upper), y)
    raise KeyError(mode)


def odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Round ``rounded + error`` to odd, where ``rounded`` is the sum rounded to nearest and ``error`` the rest."""
    rounded = np.ascontiguousarray(rounded)
    inexact = (error != 0) & np.isfinite(rounded) & np.isfinite(error)
    # Cut off towards zero: one step back where the rounding went away from zero.
    away = inexact & ((error < 0) == (rounded > 0)) & (rounded != 0)
    bits = rounded.view(np.uint64) - away.astype(np.uint64)
    return (bits | inexact.astype(np.uint64)).view(np.float64)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum of two float64 and its exact error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a + b`` of float64 numbers, rounded to odd."""
    return odd(*two_sum(a, b))


def odd_float32(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32 to odd."""
    y = narrow(x, np.float32, "rz")
    inexact = (y.astype(np.float64) != x) & np.isfinite(y) & np.isfinite(x)
    return (np.ascontiguousarray(y).view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def to_bf16_from_double(x: np.ndarray) -> np.ndarray:
    """Round float64, itself perhaps rounded to odd, to the nearest bfloat16."""
    # float64's overflow to float32's largest finite number must still round to infinity as bfloat16.
    return to_bf16(odd_float32(x))


# fused multiply-add ------------------------------------------------------

_LOW_28 = np.uint64(0x0FFFFFFF)


def fma32(x: np.ndarray, y: np.ndarray, z: np.ndarray, mode: str = "rn") -> np.ndarray:
    """``x * y + z`` of float32 numbers with one rounding."""
    p = np.multiply(x, y, dtype=np.float64)  # exact: 24 bits times 24 bits
    s = p + z
    if mode != "rn":
        return narrow(odd_sum(p, z.astype(np.float64)), np.float32, mode)
    result = s.astype(np.float32)
    # Only a float64 that lies on the midpoint of two float32 can be rounded the wrong way: its last 28 bits are 0.
    low = s.view(np.uint64) & _LOW_28
    if np.count_nonzero(low) != low.size:
        suspects = ((low == 0) & (result != s)).nonzero()[0]
        if suspects.size:
            rounded, error = two_sum(p[suspects], z[suspects].astype(np.float64))
            result[suspects] = odd(rounded, error).astype(np.float32)
    return result


def fma64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` of float64 numbers with one rounding to nearest."""
    plain = x * y + z
    # Where the exact products of halves might over- or underflow, exact rational arithmetic decides instead.
    size = np.abs(np.array([x, y, z], np.float64))
    finite = np.isfinite(size).all(0)
    nonzero = (size[0] != 0) & (size[1] != 0)
    product = np.abs(x * y)
    easy = finite & nonzero & (size < 1e150).all(0) & (size[:2] > 1e-150).all(0) & (product > 1e-250)
    easy &= (z == 0) | (size[2] > 1e-250)
    high, low = _two_product(x, y)
    th, tl = two_sum(z, low)
    vh, vl = two_sum(high, th)
    result = np.where(easy, vh + odd_sum(tl, vl), plain)
    for i in np.flatnonzero(finite & nonzero & ~easy):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        if exact:  # the sign of an exact zero is right in x * y + z already
            result[i] = _nearest(exact)
    return result


def _nearest(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _two_product(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded product of two float64 and its exact error (Dekker)."""
    p = x * y
    xh, xl = _halves(x)
    yh, yl = _halves(y)
    return p, ((xh * yh - p) + xh * yl + xl * yh) + xl * yl


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c = 134217729.0 * x  # 2**27 + 1 (Veltkamp)
    high = c - (c - x)
    return high, x - high


# small changes that modifiers ask for -------------------------------------


def flush(x: np.ndarray) -> np.ndarray:
    """``.ftz``: a subnormal float32 becomes a zero of its sign."""
    tiny = np.abs(x) < np.float32(1.17549435e-38)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def saturate(x: np.ndarray) -> np.ndarray:
    """``.sat``: into [0, 1]; a NaN becomes +0."""
    one = x.dtype.type(1)
    return np.where(x > 0, np.minimum(x, one), x.dtype.type(0))
