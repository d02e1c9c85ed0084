"""Floating-point arithmetic and conversions, against exact rational arithmetic rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest

from .fault import Fault
from .programs import compute

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


# float32 and float64 arithmetic ------------------------------------------------


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float32_arithmetic_in_every_rounding(mode):
    x, y, z = triples(1, f32_samples())
    # z close to -x y makes the low bits of the product count.
    with np.errstate(all="ignore"):
        close = np.where(np.arange(x.size) % 3 == 0, -(x * y), z)
    z = np.where(np.isfinite(close), close, z).astype(np.float32)
    a, b, c = ([exact(v) for v in w] for w in (x, y, z))
    same(compute(f"add.{mode}.f32 {{d}}, {{0}}, {{1}};", np.float32, x, y),
         [round_exactly(p + q, "f32", mode) for p, q in zip(a, b)])  # fmt: skip
    same(compute(f"sub.{mode}.f32 {{d}}, {{0}}, {{1}};", np.float32, x, y),
         [round_exactly(p - q, "f32", mode) for p, q in zip(a, b)])  # fmt: skip
    same(compute(f"mul.{mode}.f32 {{d}}, {{0}}, {{1}};", np.float32, x, y),
         [round_exactly(p * q, "f32", mode) for p, q in zip(a, b)])  # fmt: skip
    same(compute(f"fma.{mode}.f32 {{d}}, {{0}}, {{1}}, {{2}};", np.float32, x, y, z),
         [round_exactly(p * q + r, "f32", mode) for p, q, r in zip(a, b, c)])  # fmt: skip


def test_fused_multiply_add_is_not_rounded_twice():
    """4097 squared is a midpoint of two float32; z decides, though float64 cannot hold the sum and drops it."""
    for sign in (1, -1):
        x, z = np.full(32, 4097, np.float32), np.full(32, sign * 2.0**-50, np.float32)
        midpoint = 2**24 + 2**13 + 1
        assert compute("fma.rn.f32 {d}, {0}, {0}, {1};", np.float32, x, z).tolist() == [midpoint + sign] * 32


def test_float64_arithmetic():
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal(200) * 10.0 ** rng.integers(-20, 20, 200) for _ in range(2))
    z = np.where(np.arange(200) % 2, -(x * y), rng.standard_normal(200) * 1e-10)
    # Overflow, subnormal results and products that vanish.
    x[:6], y[:6], z[:6] = (
        [1e200, 1e-200, 1e-160, 1e308, -1e-308, 0],
        [1e200, 1e-200, 1e-160, 10, 0.3, 5],
        [1, 0, 5e-324, -1e308, 5e-324, 3],
    )
    a, b, c = ([exact(v) for v in w] for w in (x, y, z))
    same(compute("fma.rn.f64 {d}, {0}, {1}, {2};", np.float64, x, y, z),
         [round_exactly(p * q + r, "f64") for p, q, r in zip(a, b, c)])  # fmt: skip
    for name, function in (
        ("add.f64", np.add),
        ("sub.rn.f64", np.subtract),
        ("mul.f64", np.multiply),
        ("div.rn.f64", np.divide),
    ):
        with np.errstate(all="ignore"):
            expected = function(x, y)
        same(compute(f"{name} {{d}}, {{0}}, {{1}};", np.float64, x, y), expected.tolist())


@pytest.mark.parametrize("type_", ["f16", "bf16"])
@pytest.mark.parametrize("pair", [False, True])
def test_arithmetic_of_16_bit_formats(type_, pair):
    rng = np.random.default_rng(3)
    bits = [rng.integers(0, 2**16, 512).astype(np.uint16) for _ in range(3)]
    bits[2][:100] = np.array([0x0001, 0x8001, 0x03FF, 0x0000, 0x8000] * 20, np.uint16)

    def values(b):
        return b.view(np.float16).astype(np.float64) if type_ == "f16" else bf16(b)

    good = np.isfinite(values(bits[0])) & np.isfinite(values(bits[1])) & np.isfinite(values(bits[2]))
    bits = [b[good][:384] for b in bits]
    x, y, z = ([exact(v) for v in values(b)] for b in bits)
    suffix, inputs = (type_ + "x2", [b.view(np.uint32) for b in bits]) if pair else (type_, bits)
    functions = {
        "fma.rn": (3, lambda p, q, r: p * q + r),
        "add.rn": (2, lambda p, q, r: p + q),
        "sub.rn": (2, lambda p, q, r: p - q),
        "mul.rn": (2, lambda p, q, r: p * q),
    }
    for name, (count, function) in functions.items():
        operands = ", ".join(f"{{{i}}}" for i in range(count))
        got = compute(f"{name}.{suffix} {{d}}, {operands};", inputs[0].dtype, *inputs[:count]).view(np.uint16)
        same(values(got), [round_exactly(function(*v), type_) for v in zip(x, y, z)])


@pytest.mark.parametrize("type_, x, y", [("bf16", 17 / 16, 17 / 16), ("f16", 33 / 32, 65 / 64)])
def test_fused_multiply_add_of_16_bit_formats_is_not_rounded_twice(type_, x, y):
    """x y is a midpoint of the format; z decides, though neither float32 nor float64 can hold the sum."""
    encode = {
        "bf16": lambda v: (np.array([v], np.float32).view(np.uint32) >> 16).astype(np.uint16),
        "f16": lambda v: np.array([v], np.float16).view(np.uint16),
    }[type_]
    for z in (2.0**-24, -(2.0**-24)) if type_ == "f16" else (2.0**-60, -(2.0**-60)):
        got = compute(f"fma.rn.{type_} {{d}}, {{0}}, {{1}}, {{2}};", np.uint16, *(encode(v) for v in (x, y, z)))
        value = bf16(got) if type_ == "bf16" else got.view(np.float16)
        assert float(value[0]) == round_exactly(exact(x) * exact(y) + exact(z), type_)


def bf16(bits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


SUBNORMAL, SMALLEST = np.float32(2.0**-130), np.float32(2.0**-126)


def test_flushing_subnormal_numbers():
    x = np.array([SUBNORMAL, -SUBNORMAL, SMALLEST, 1], np.float32)
    y = np.array([0, 0, 0.5, 0.5], np.float32)
    assert compute("add.f32 {d}, {0}, {1};", np.float32, x, y).tolist() == [SUBNORMAL, -SUBNORMAL, 0.5, 1.5]
    assert compute("add.ftz.f32 {d}, {0}, {1};", np.float32, x, y).view(np.uint32)[:2].tolist() == [0, 0x00000000]
    flushed = compute("mul.ftz.f32 {d}, {0}, {1};", np.float32, x, np.full(4, 0.5, np.float32))
    assert flushed.view(np.uint32).tolist() == [0, 0x80000000, 0, 0x3F000000]  # results too, with their sign
    assert compute("mul.f32 {d}, {0}, {1};", np.float32, x, np.full(4, 0.5, np.float32))[2] == 2.0**-127
    assert compute("setp.gt.f32 {d}, {0}, {1};", bool, x[:1], y[:1]).tolist() == [True]
    assert compute("setp.gt.ftz.f32 {d}, {0}, {1};", bool, x[:1], y[:1]).tolist() == [False]
    assert compute("ex2.approx.ftz.f32 {d}, {0};", np.float32, np.array([-127, -126, 0], np.float32)).tolist() == [
        0,
        2.0**-126,
        1,
    ]
    assert compute("ex2.approx.f32 {d}, {0};", np.float32, np.array([-127, 3], np.float32)).tolist() == [2.0**-127, 8]
    assert compute("rsqrt.approx.ftz.f32 {d}, {0};", np.float32, np.array([SUBNORMAL, 4], np.float32)).tolist() == [
        np.inf,
        0.5,
    ]


def test_saturation_and_nan():
    x = np.array([-1, 0.25, 2, np.nan, np.inf, -np.inf], np.float32)
    assert compute("add.sat.f32 {d}, {0}, 0f00000000;", np.float32, x).tolist() == [0, 0.25, 1, 0, 1, 0]
    assert compute("cvt.sat.f32.f32 {d}, {0};", np.float32, x).tolist() == [0, 0.25, 1, 0, 1, 0]
    assert compute("fma.rn.sat.f32 {d}, {0}, {0}, {0};", np.float32, x).tolist() == [0, 0.3125, 1, 0, 1, 0]


def test_minimum_and_maximum_drop_a_nan_unless_told_and_order_zeros():
    nan = np.nan
    x = np.array([1, nan, nan, 0.0, -0.0, 2, -1], np.float32)
    y = np.array([nan, 1, nan, -0.0, 0.0, 1, 3], np.float32)
    for name, plain, zeros in (("min", [1, 1, nan, 0, 0, 1, -1], 0x80000000), ("max", [1, 1, nan, 0, 0, 2, 3], 0)):
        got = compute(f"{name}.f32 {{d}}, {{0}}, {{1}};", np.float32, x, y)
        np.testing.assert_array_equal(got, np.array(plain, np.float32))
        assert got.view(np.uint32)[3:5].tolist() == [zeros, zeros]
        got = compute(f"{name}.NaN.f32 {{d}}, {{0}}, {{1}};", np.float32, x, y)
        np.testing.assert_array_equal(got, np.array([nan] * 3 + plain[3:], np.float32))
        wide = compute(f"{name}.f64 {{d}}, {{0}}, {{1}};", np.float64, x.astype(np.float64), y.astype(np.float64))
        np.testing.assert_array_equal(wide, np.array(plain))


def test_sign_operations_change_the_sign_bit_alone():
    x = np.array([1, -2, 0.0, -0.0], np.float32)
    assert compute("neg.f32 {d}, {0};", np.float32, x).view(np.uint32).tolist() == [0xBF800000, 0x40000000, 1 << 31, 0]
    assert compute("abs.f32 {d}, {0};", np.float32, x).view(np.uint32).tolist() == [0x3F800000, 0x40000000, 0, 0]
    halves = np.array([0x3C00BC00, 0x80000000], np.uint32)
    assert compute("neg.f16x2 {d}, {0};", np.uint32, halves).tolist() == [0xBC003C00, 0x00008000]
    assert compute("neg.f64 {d}, {0};", np.float64, x.astype(np.float64)).tolist() == [-1, 2, 0, 0]
    # copysign d, a, b: the sign of a, the magnitude of b.
    signs, sizes = np.array([-1, 1, -0.0], np.float32), np.array([3, -4, 5], np.float32)
    assert compute("copysign.f32 {d}, {0}, {1};", np.float32, signs, sizes).tolist() == [-3, 4, -5]


def test_functions_of_one_argument():
    x = np.array([0.3, 1, 2, 10.5, 1e-20, 1e20], np.float32)
    wide = x.astype(np.float64)
    for name, expected in {
        "sqrt.rn": np.sqrt(wide), "sqrt.approx": np.sqrt(wide), "rsqrt.approx": 1 / np.sqrt(wide), "rcp.rn": 1 / wide,
        "rcp.approx": 1 / wide, "lg2.approx": np.log2(wide), "tanh.approx": np.tanh(wide), "sin.approx": np.sin(wide),
        "cos.approx": np.cos(wide),
    }.items():  # fmt: skip
        got = compute(f"{name}.f32 {{d}}, {{0}};", np.float32, x)
        np.testing.assert_array_equal(got, expected.astype(np.float32), err_msg=name)
    np.testing.assert_array_equal(compute("sqrt.rn.f64 {d}, {0};", np.float64, wide), np.sqrt(wide))
    np.testing.assert_array_equal(compute("rcp.rn.f64 {d}, {0};", np.float64, wide), 1 / wide)


def test_approximate_division_flushes_the_reciprocal_of_large_divisors():
    x, y = np.array([1, np.inf, 6], np.float32), np.array([2.0**127, 2.0**127, 3], np.float32)
    np.testing.assert_array_equal(
        compute("div.approx.f32 {d}, {0}, {1};", np.float32, x, y), np.array([0, np.nan, 2], np.float32)
    )
    assert compute("div.full.f32 {d}, {0}, {1};", np.float32, x, y).tolist() == [2.0**-127, np.inf, 2]
    assert compute("div.rn.f32 {d}, {0}, {1};", np.float32, x, y).tolist() == [2.0**-127, np.inf, 2]


def test_comparisons_with_nan():
    nan = np.nan
    x, y = np.array([1, 2, 2, nan, 1, nan], np.float32), np.array([2, 2, 1, 1, nan, nan], np.float32)
    ordered = {"eq": [0, 1, 0], "ne": [1, 0, 1], "lt": [1, 0, 0], "le": [1, 1, 0], "gt": [0, 0, 1], "ge": [0, 1, 1]}
    for name, expected in ordered.items():
        for suffix, of_nan in (("", 0), ("u", 1)):
            for type_, dtype in (("f32", np.float32), ("f64", np.float64)):
                got = compute(
                    f"setp.{name}{suffix}.{type_} {{d}}, {{0}}, {{1}};", bool, x.astype(dtype), y.astype(dtype)
                )
                assert got.tolist() == [bool(b) for b in expected + [of_nan] * 3], (name, suffix)
    assert compute("setp.num.f32 {d}, {0}, {1};", bool, x, y).tolist() == [True] * 3 + [False] * 3
    assert compute("setp.nan.f32 {d}, {0}, {1};", bool, x, y).tolist() == [False] * 3 + [True] * 3


def test_properties():
    x = np.array([1, np.inf, np.nan, 2.0**-130, 0], np.float32)
    truth = {
        "finite": [1, 0, 0, 1, 1],
        "infinite": [0, 1, 0, 0, 0],
        "number": [1, 1, 0, 1, 1],
        "notanumber": [0, 0, 1, 0, 0],
        "normal": [1, 0, 0, 0, 0],
        "subnormal": [0, 0, 0, 1, 0],
    }
    for name, expected in truth.items():
        assert compute(f"testp.{name}.f32 {{d}}, {{0}};", bool, x).tolist() == [bool(e) for e in expected], name


# conversions --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_float32_to_16_bits(mode):
    x = f32_samples(200)
    ties = np.arange(64, dtype=np.uint32) * 0x1000 + 0x3F800000  # around the midpoints of both formats
    x = np.concatenate([x, ties.view(np.float32), np.float32([1e-7, 6e-8, 2.0**-25, 65504, 65519, 65520, 1e30])])
    for type_ in ("f16", "bf16"):
        got = compute(f"cvt.{mode}.{type_}.f32 {{d}}, {{0}};", np.uint16, x)
        values = got.view(np.float16).astype(np.float64) if type_ == "f16" else bf16(got)
        same(values, [round_exactly(exact(v), type_, mode) for v in x])
        # The first source goes to the upper half.
        both = compute(f"cvt.{mode}.{type_}x2.f32 {{d}}, {{0}}, {{1}};", np.uint32, x, x[::-1].copy())
        assert (both >> 16).tolist() == got.tolist() and (both & 0xFFFF).tolist() == got[::-1].tolist()


def test_float64_to_16_bits_is_rounded_once():
    # Just above a midpoint of bfloat16 (and of float16), by less than float32 resolves.
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11, 3.1, 1e-300])
    for type_ in ("f16", "bf16"):
        got = compute(f"cvt.rn.{type_}.f64 {{d}}, {{0}};", np.uint16, x)
        values = got.view(np.float16).astype(np.float64) if type_ == "f16" else bf16(got)
        same(values, [round_exactly(exact(v), type_) for v in x])
    for mode in ("rn", "rz", "rm", "rp"):
        same(compute(f"cvt.{mode}.f32.f64 {{d}}, {{0}};", np.float32, np.append(x, -x)),
             [round_exactly(exact(v), "f32", mode) for v in np.append(x, -x)])  # fmt: skip


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32_keeps_ten_bits(mode):
    x = np.concatenate([f32_samples(), (np.arange(64, dtype=np.uint32) * 0x800 + 0x3F800000).view(np.float32)])
    x = x[np.abs(x) < 3e38]
    got = compute(f"cvt.{mode}.tf32.f32 {{d}}, {{0}};", np.uint32, x)
    assert not (got & 0x1FFF).any()
    same(got.view(np.float32), [round_exactly(exact(v), "tf32", mode) for v in x])
    special = np.array([np.nan, np.inf, -np.inf], np.float32)
    special = np.append(special, np.array([0x7FFFFFFF], np.uint32).view(np.float32))
    got = compute(f"cvt.{mode}.tf32.f32 {{d}}, {{0}};", np.uint32, special).view(np.float32)
    np.testing.assert_array_equal(got, np.array([np.nan, np.inf, -np.inf, np.nan], np.float32))


def test_widening_and_nan():
    bits = np.arange(0, 2**16, 37, dtype=np.uint16)
    np.testing.assert_array_equal(
        compute("cvt.f32.f16 {d}, {0};", np.float32, bits[:1000]), bits[:1000].view(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(
        compute("cvt.f32.bf16 {d}, {0};", np.float32, bits[-1000:]), bf16(bits[-1000:]).astype(np.float32)
    )
    nan = np.array([np.nan], np.float32)
    assert compute("cvt.rn.bf16.f32 {d}, {0};", np.uint16, nan).tolist() == [0x7FFF]
    assert np.isnan(compute("cvt.rn.f16.f32 {d}, {0};", np.float16, nan)).all()
    x = np.array([1.5, np.inf, -0.0], np.float32)
    assert compute("cvt.f64.f32 {d}, {0};", np.float64, x).tolist() == [1.5, np.inf, 0]


@pytest.mark.parametrize(
    "mode, function", [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)]
)
def test_float_to_integer_rounds_and_clamps(mode, function):
    x = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, 1e30, -1e30, 2147483648.0, 4294967296.0, 100.7, -100.7], np.float32
    )
    for type_, dtype in (
        ("s32", np.int32),
        ("u32", np.uint32),
        ("s64", np.int64),
        ("u64", np.uint64),
        ("s16", np.int16),
    ):
        info = np.iinfo(dtype)
        got = compute(f"cvt.{mode}.{type_}.f32 {{d}}, {{0}};", dtype, x)
        assert got.tolist() == [min(max(function(float(v)), info.min), info.max) for v in x], type_
    same(compute(f"cvt.{mode}.f32.f32 {{d}}, {{0}};", np.float32, x), [float(function(float(v))) for v in x])


def test_nan_to_integer():
    nan32, nan64 = np.array([np.nan], np.float32), np.array([np.nan])
    assert compute("cvt.rzi.s32.f32 {d}, {0};", np.int32, nan32).tolist() == [0]
    assert compute("cvt.rzi.s64.f32 {d}, {0};", np.int64, nan32).tolist() == [-(2**63)]
    assert compute("cvt.rzi.u32.f64 {d}, {0};", np.uint32, nan64).tolist() == [2**31]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float(mode):
    rng = np.random.default_rng(5)
    wide = np.append(
        rng.integers(-(2**63), 2**63 - 1, 90), [2**53 + 1, 2**60 + 2**36, -(2**60) - 2**36 - 1, 2**63 - 1, -(2**63), 3]
    )
    for type_, dtype in (
        ("s32", np.int32),
        ("u32", np.uint32),
        ("s64", np.int64),
        ("u64", np.uint64),
        ("s16", np.int16),
    ):
        x = wide.astype(dtype)
        same(compute(f"cvt.{mode}.f32.{type_} {{d}}, {{0}};", np.float32, x),
             [round_exactly(Fraction(int(v)), "f32", mode) for v in x])  # fmt: skip
    same(compute("cvt.rn.f64.s64 {d}, {0};", np.float64, wide), [float(int(v)) for v in wide])
    small = (wide % 100_000).astype(np.int32)
    got = compute(f"cvt.{mode}.f16.s32 {{d}}, {{0}};", np.float16, small)
    same(got, [round_exactly(Fraction(int(v)), "f16", mode) for v in small])


def test_integer_to_integer_extends_by_the_sources_sign_and_keeps_the_low_bits():
    x = np.array([-1, 5, -(2**31), 2**31 - 1, 0x8081], np.int32)
    assert compute("cvt.s64.s32 {d}, {0};", np.int64, x).tolist() == x.tolist()
    assert compute("cvt.u64.u32 {d}, {0};", np.int64, x).tolist() == [int(v) & 0xFFFFFFFF for v in x]
    assert compute("cvt.u32.u64 {d}, {0};", np.uint32, x.astype(np.int64) + 2**40).tolist() == [
        int(v) & 0xFFFFFFFF for v in x
    ]
    assert compute("cvt.s32.s8 {d}, {0};", np.int32, x).tolist() == [-1, 5, 0, -1, -127]
    assert compute("cvt.u32.u8 {d}, {0};", np.uint32, x).tolist() == [255, 5, 0, 255, 129]
    assert compute("cvt.u16.u32 {d}, {0};", np.uint16, x).tolist() == [0xFFFF, 5, 0, 0xFFFF, 0x8081]
    assert compute("cvt.sat.u8.s32 {d}, {0};", np.uint16, x).tolist() == [0, 5, 0, 255, 255]
    assert compute("cvt.sat.s16.s32 {d}, {0};", np.int16, x).tolist() == [-1, 5, -32768, 32767, 32767]


@pytest.mark.parametrize(
    "instruction",
    [
        "cvt.f32.f64 {d}, {0};",  # no rounding
        "cvt.rn.f64.f64 {d}, {0};",  # nothing to round
        "cvt.rzi.u32.u32 {d}, {0};",
        "add.ftz.f64 {d}, {0}, {0};",
        "ex2.rn.f32 {d}, {0};",
        "rsqrt.approx.f64 {d}, {0};",
        "min.xorsign.abs.f32 {d}, {0}, {0};",
    ],
)
def test_what_is_not_known_is_refused(instruction):
    dtype = np.float64 if "f64" in instruction else np.float32
    with pytest.raises(Fault, match="line "):
        compute(instruction, dtype, np.zeros(32, dtype))
