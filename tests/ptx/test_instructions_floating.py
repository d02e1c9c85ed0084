"""Floating-point arithmetic against exact rational arithmetic rounded once."""

import numpy as np
import pytest

from .exact_rounding import bf16, exact, f32_samples, round_exactly, same, triples
from .fault import Fault
from .programs import compute


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


def test_fused_multiply_add_of_float64_is_rounded_once():
    rows = [
        (3, (2**53 + 1) // 3, 2.0**-60),  # the product is a midpoint, and z decides
        (3, (2**53 + 1) // 3, -(2.0**-60)),
        (1.5 * 2.0**-537, 2.0**-537, -(2.0**-1074)),  # the product alone would be rounded
        (2.0**1000, 2.0**24, -(2.0**1023)),  # the product alone would overflow
        (2.0**1000, 2.0**24, 1),
    ]
    x, y, z = (np.array(column, np.float64) for column in zip(*rows))
    same(
        compute("fma.rn.f64 {d}, {0}, {1}, {2};", np.float64, x, y, z),
        [round_exactly(exact(a) * exact(b) + exact(c), "f64") for a, b, c in zip(x, y, z)],
    )


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
    np.testing.assert_array_equal(compute("rsqrt.approx.f64 {d}, {0};", np.float64, wide), 1 / np.sqrt(wide))


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


def test_setp_of_packed_bfloat16_has_a_predicate_for_each_half():
    one, two, nan = 0x3F80, 0x4000, 0x7FC0
    a = np.array([one << 16 | two, two << 16 | one, nan << 16 | one], np.uint32)
    b = np.full(3, one << 16 | one, np.uint32)
    for half, expected in (("%p1", [False, True, True]), ("%p2", [True, False, False])):
        body = f"setp.le.bf16x2 %p1|%p2, {{0}}, {{1}}; selp.u32 {{d}}, 1, 0, {half};"
        assert compute(body, np.uint32, a, b).tolist() == expected


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


@pytest.mark.parametrize(
    "instruction",
    [
        "cvt.f32.f64 {d}, {0};",  # no rounding
        "cvt.rn.f64.f64 {d}, {0};",  # nothing to round
        "cvt.rzi.u32.u32 {d}, {0};",
        "add.ftz.f64 {d}, {0}, {0};",
        "ex2.rn.f32 {d}, {0};",
        "rsqrt.approx.ftz.f64 {d}, {0};",
        "rcp.approx.ftz.f64 {d}, {0};",
        "min.xorsign.abs.f32 {d}, {0}, {0};",
    ],
)
def test_what_is_not_known_is_refused(instruction):
    dtype = np.float64 if "f64" in instruction else np.float32
    with pytest.raises(Fault, match="line "):
        compute(instruction, dtype, np.zeros(32, dtype))
