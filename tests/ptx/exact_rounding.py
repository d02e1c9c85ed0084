"""What the tests of floating-point instructions expect: rational numbers, rounded once to a format."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

#: (bits of the mantissa with the hidden one, the smallest normal exponent, the largest exponent)
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "tf32": (11, -126, 127), "f32": (24, -126, 127),
           "f64": (53, -1022, 1023)}  # fmt: skip


def round_exactly(x: Fraction, format_: str, mode: str = "rn") -> float:
    """Round a rational number to a format, as IEEE 754 says; the result as a Python float, which holds it exactly."""
    precision, lowest, highest = FORMATS[format_]
    if x == 0:
        return 0.0
    sign, size = (-1 if x < 0 else 1), abs(x)
    exponent = math.frexp(float(size))[1] - 1 if 2**-1000 < size < 2**1000 else None
    if exponent is None:
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    whole, rest = divmod(size, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and whole % 2 == 1),
        "rna": rest * 2 >= unit,
        "rz": False,
        "rm": rest > 0 and sign < 0,
        "rp": rest > 0 and sign > 0,
    }[mode]
    result = (whole + up) * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** highest
    if result > largest:
        to_infinity = mode in ("rn", "rna") or (mode == "rp") == (sign > 0) and mode != "rz"
        return sign * (math.inf if to_infinity else float(largest))
    return sign * float(result)


def exact(x) -> Fraction:
    return Fraction(float(x))


def f32_samples(count: int = 96) -> np.ndarray:
    """Numbers of few and of many bits, subnormal, tiny, large and of both signs."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
    few = rng.integers(-9, 9, count).astype(np.float32) * np.float32(2.0) ** rng.integers(-30, 30, count).astype(
        np.float32
    )
    near = (1 + rng.integers(0, 4, count) * 2.0**-23).astype(np.float32)
    tiny = rng.integers(0, 2**24, count, np.uint32).view(np.float32)
    ends = np.array([3.4028235e38, -3.4028235e38, 1.1754944e-38, 1e-45, -1e-45, 1.0, -1.0, 0.5], np.float32)
    x = np.concatenate([bits, few, near, tiny, ends])
    return x[np.isfinite(x)]


def triples(seed: int, values: np.ndarray) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(values) for _ in range(3)]


def same(got: np.ndarray, expected: list[float]) -> None:
    """Equal, the signs of zeros apart."""
    got = np.asarray(got, np.float64)
    wrong = [i for i, (x, y) in enumerate(zip(got.tolist(), expected)) if x != y]
    assert not wrong, (wrong[:5], [(float(got[i]).hex(), float(expected[i]).hex()) for i in wrong[:5]])


def bf16(bits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
