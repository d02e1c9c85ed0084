"""Conversions against exact rational arithmetic rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest

from .exact_rounding import bf16, exact, f32_samples, round_exactly, same
from .programs import compute


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
