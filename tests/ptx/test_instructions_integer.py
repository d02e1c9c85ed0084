"""Integer arithmetic, bits and comparisons against plain Python integers."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .fault import Fault
from .programs import compute

DTYPES = {"u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s16": np.int16, "s32": np.int32, "s64": np.int64}
QUICK = settings(max_examples=8, deadline=None, database=None)


def bits_of(type_: str) -> int:
    return int(type_[1:])


def wrap(value: int, type_: str) -> int:
    """The value that the type's bits hold after overflow."""
    bits = bits_of(type_)
    value &= (1 << bits) - 1
    return value - (1 << bits) if type_[0] == "s" and value >> (bits - 1) else value


def samples(type_: str) -> tuple[list[int], list[int]]:
    """All pairs of the type's corner values."""
    info = np.iinfo(DTYPES[type_])
    corners = sorted({info.min, info.min + 1, info.max, info.max - 1, info.max // 3, 0, 1, 2, 7, 0x1234 & info.max,
                      *([-1, -2, -7] if type_[0] == "s" else [])})  # fmt: skip
    pairs = [(a, b) for a in corners for b in corners]
    return [a for a, _ in pairs], [b for _, b in pairs]


def check(instruction: str, type_: str, result: str, expected, *columns):
    arrays = [np.array(c, DTYPES[type_]) for c in columns]
    got = compute(instruction, DTYPES[result], *arrays)
    assert got.tolist() == [wrap(expected(*row), result) for row in zip(*columns)]


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("type_", DTYPES)
@pytest.mark.parametrize("name", ["add", "sub", "min", "max", "mul.lo", "mul.hi", "div", "rem"])
def test_two_operands(name, type_):
    a, b = samples(type_)
    if name in ("div", "rem"):
        a, b = zip(*[(x, y) for x, y in zip(a, b) if y])
    functions = {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "min": min,
        "max": max,
        "mul.lo": lambda x, y: x * y,
        "mul.hi": lambda x, y: x * y >> bits_of(type_),
        "div": truncated,
        "rem": lambda x, y: x - y * truncated(x, y),
    }
    check(f"{name}.{type_} {{d}}, {{0}}, {{1}};", type_, type_, functions[name], a, b)


@pytest.mark.parametrize("type_", ["u16", "u32", "s16", "s32"])
def test_wide_products(type_):
    a, b = samples(type_)
    result = f"{type_[0]}{2 * bits_of(type_)}"
    check(f"mul.wide.{type_} {{d}}, {{0}}, {{1}};", type_, result, lambda x, y: x * y, a, b)


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("part", ["lo", "hi"])
def test_multiply_add(type_, part):
    a, b = samples(type_)
    c = a[::-1]
    half = (lambda x, y: x * y) if part == "lo" else lambda x, y: x * y >> bits_of(type_)
    check(f"mad.{part}.{type_} {{d}}, {{0}}, {{1}}, {{2}};", type_, type_, lambda x, y, z: half(x, y) + z, a, b, c)


def test_wide_multiply_add_takes_a_wide_addend():
    a, b = (np.array(c, np.int32) for c in samples("s32"))
    c = np.arange(a.size, dtype=np.int64) << 40
    got = compute("mad.wide.s32 {d}, {0}, {1}, {2};", np.int64, a, b, c)
    assert got.tolist() == [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c)]


def test_saturating_addition():
    a, b = samples("s32")
    check("add.sat.s32 {d}, {0}, {1};", "s32", "s32", lambda x, y: min(max(x + y, -(2**31)), 2**31 - 1), a, b)


@pytest.mark.parametrize("type_", ["s16", "s32", "s64"])
def test_negation_and_absolute_value(type_):
    a, _ = samples(type_)
    check(f"neg.{type_} {{d}}, {{0}};", type_, type_, lambda x: -x, a)
    check(f"abs.{type_} {{d}}, {{0}};", type_, type_, abs, a)


def test_sum_of_absolute_differences():
    a, b = samples("s32")
    check("sad.s32 {d}, {0}, {1}, {2};", "s32", "s32", lambda x, y, z: z + abs(x - y), a, b, b)


@pytest.mark.parametrize("name, function", [("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)])
@pytest.mark.parametrize("type_", ["u16", "u32", "u64"])
def test_logic(name, function, type_):
    a, b = samples(type_)
    check(f"{name}.b{bits_of(type_)} {{d}}, {{0}}, {{1}};", type_, type_, function, a, b)
    check(f"not.b{bits_of(type_)} {{d}}, {{0}};", type_, type_, lambda x: ~x, a)
    check(f"cnot.b{bits_of(type_)} {{d}}, {{0}};", type_, type_, lambda x: int(x == 0), a)


@pytest.mark.parametrize("type_", ["u16", "u32", "u64", "s16", "s32", "s64"])
@pytest.mark.parametrize("amount", [0, 1, 5, 15, 16, 31, 32, 63, 64, 200, 0xFFFFFFFF])
def test_shifts_clamp_their_amount(type_, amount):
    a, _ = samples(type_)
    dtype, bits = DTYPES[type_], bits_of(type_)
    values, amounts = np.array(a, dtype), np.full(len(a), amount, np.uint32)
    right = [wrap(x >> min(amount, bits), type_) for x in a]
    left = [wrap(x << amount if amount < bits else 0, type_) for x in a]
    for operand, inputs in (("{1}", (values, amounts)), (str(amount), (values,))):
        assert compute(f"shr.{type_} {{d}}, {{0}}, {operand};", dtype, *inputs).tolist() == right
        assert compute(f"shl.b{bits} {{d}}, {{0}}, {operand};", dtype, *inputs).tolist() == left


words = st.integers(0, 2**32 - 1)


@QUICK
@given(st.lists(st.tuples(words, words, words), min_size=32, max_size=32))
def test_funnel_shift(rows):
    a, b, c = (np.array(x, np.uint32) for x in zip(*rows))
    c[:8] = [0, 1, 31, 32, 33, 63, 64, 2**32 - 1]
    for mode in ("wrap", "clamp"):
        for side in ("l", "r"):
            expected = []
            for low, high, n in zip(a.tolist(), b.tolist(), c.tolist()):
                n = n & 31 if mode == "wrap" else min(n, 32)
                both = high << 32 | low
                expected.append((both << n >> 32 if side == "l" else both >> n) & 0xFFFFFFFF)
            assert (
                compute(f"shf.{side}.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}};", np.uint32, a, b, c).tolist() == expected
            )


def field(a: int, position: int, length: int, type_: str) -> int:
    """bfe in the words of the PTX manual, bit by bit."""
    bits = bits_of(type_)
    position, length = position & 255, length & 255
    a &= (1 << bits) - 1
    if type_[0] == "u" or length == 0:
        sign = 0
    else:
        sign = a >> min(position + length - 1, bits - 1) & 1
    d = 0
    for i in range(bits):
        inside = i < length and position + i < bits
        d |= (a >> (position + i) & 1 if inside else sign) << i
    return wrap(d, type_)


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(type_):
    rng = np.random.default_rng(0)
    corners = [0, 1, 4, 8, 31, 32, 33, 63, 64, 100, 255, 256]
    position, length = (np.array(x, np.uint32) for x in zip(*[(p, n) for p in corners for n in corners]))
    a = rng.integers(0, 2**64, position.size, np.uint64).astype(np.dtype(f"u{bits_of(type_) // 8}")).view(DTYPES[type_])
    got = compute(f"bfe.{type_} {{d}}, {{0}}, {{1}}, {{2}};", DTYPES[type_], a, position, length)
    assert got.tolist() == [field(int(x), int(p), int(n), type_) for x, p, n in zip(a, position, length)]


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits):
    rng = np.random.default_rng(1)
    corners = [0, 1, 4, 8, 31, 32, 33, 63, 64, 100, 255]
    position, length = (np.array(x, np.uint32) for x in zip(*[(p, n) for p in corners for n in corners]))
    dtype = DTYPES[f"u{bits}"]
    a, b = (rng.integers(0, 2**64, position.size, np.uint64).astype(dtype) for _ in range(2))
    expected = []
    for x, y, p, n in zip(a.tolist(), b.tolist(), position.tolist(), length.tolist()):
        for i in range(n):
            if p + i < bits and i < bits:
                y = y & ~(1 << (p + i)) | (x >> i & 1) << (p + i)
        expected.append(y)
    assert (
        compute(f"bfi.b{bits} {{d}}, {{0}}, {{1}}, {{2}}, {{3}};", dtype, a, b, position, length).tolist() == expected
    )


@QUICK
@given(st.lists(st.tuples(words, words, words), min_size=32, max_size=32))
def test_byte_permutation(rows):
    a, b, selector = (np.array(x, np.uint32) for x in zip(*rows))
    expected = []
    for x, y, c in zip(a.tolist(), b.tolist(), selector.tolist()):
        octets = list((y << 32 | x).to_bytes(8, "little"))
        picked = []
        for i in range(4):
            nibble = c >> (4 * i) & 15
            byte = octets[nibble & 7]
            picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        expected.append(int.from_bytes(bytes(picked), "little"))
    assert compute("prmt.b32 {d}, {0}, {1}, {2};", np.uint32, a, b, selector).tolist() == expected


@QUICK
@given(st.integers(0, 255))
@example(0xF0)
@example(0xCC)
@example(0xAA)
@example(0xE8)
def test_logic_of_three_inputs(table):
    rng = np.random.default_rng(table)
    a, b, c = (rng.integers(0, 2**32, 32, np.uint32) for _ in range(3))
    expected = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist()):
        d = 0
        for i in range(32):
            index = (x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)
            d |= (table >> index & 1) << i
        expected.append(d)
    assert compute(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table:#x};", np.uint32, a, b, c).tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits):
    dtype = DTYPES[f"u{bits}"]
    values = [
        0,
        1,
        2,
        3,
        0x80,
        0xFFFF,
        2**31,
        2**32 - 1,
        2 ** (bits - 1),
        2**bits - 1,
        2**33 & (2**bits - 1),
        0x12345678,
    ]
    a = np.array(values, dtype)
    assert compute(f"clz.b{bits} {{d}}, {{0}};", np.uint32, a).tolist() == [bits - v.bit_length() for v in values]
    assert compute(f"popc.b{bits} {{d}}, {{0}};", np.uint32, a).tolist() == [bin(v).count("1") for v in values]
    reversed_ = [int(format(v, f"0{bits}b")[::-1], 2) for v in values]
    assert compute(f"brev.b{bits} {{d}}, {{0}};", dtype, a).tolist() == reversed_
    highest = [v.bit_length() - 1 & 0xFFFFFFFF for v in values]
    assert compute(f"bfind.u{bits} {{d}}, {{0}};", np.uint32, a).tolist() == highest


def test_bfind_of_signed_numbers_looks_for_the_bit_that_differs_from_the_sign():
    a = np.array([0, -1, 1, -2, -128, 127, -(2**31)], np.int32)
    expected = [0xFFFFFFFF, 0xFFFFFFFF, 0, 0, 6, 6, 30]
    assert compute("bfind.s32 {d}, {0};", np.uint32, a).tolist() == expected


@pytest.mark.parametrize("type_", DTYPES)
def test_comparisons(type_):
    a, b = samples(type_)
    arrays = [np.array(x, DTYPES[type_]) for x in (a, b)]
    names = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
    if type_[0] == "u":
        names |= {"lo": "__lt__", "ls": "__le__", "hi": "__gt__", "hs": "__ge__"}
    for name, method in names.items():
        got = compute(f"setp.{name}.{type_} {{d}}, {{0}}, {{1}};", bool, *arrays)
        assert got.tolist() == [getattr(x, method)(y) for x, y in zip(a, b)], name


@pytest.mark.parametrize("join", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", ["", "!"])
def test_setp_joins_the_comparison_and_its_complement_with_a_third_predicate(join, negated):
    a, b, c = (np.array(x, np.uint32) for x in zip(*[(x, y, z) for x in (1, 2) for y in (1, 2) for z in (0, 1)]))
    body = f"setp.ne.u32 %p1, {{2}}, 0; setp.lt.{join}.u32 %p2|%p3, {{0}}, {{1}}, {negated}%p1;"
    truth = {"and": lambda p, q: p and q, "or": lambda p, q: p or q, "xor": lambda p, q: p != q}[join]
    for register, complement in (("%p2", False), ("%p3", True)):
        got = compute(f"{body} selp.b32 {{d}}, 1, 0, {register};", np.uint32, a, b, c)
        expected = [
            int(truth((x < y) != complement, bool(z) != bool(negated)))
            for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())
        ]
        assert got.tolist() == expected


def test_selection():
    a, b, c = np.array([1, 2, 3], np.int32), np.array([-1, -2, -3], np.int32), np.array([0, 5, -5], np.int32)
    assert compute("slct.s32.s32 {d}, {0}, {1}, {2};", np.int32, a, b, c).tolist() == [1, 2, -3]
    got = compute("setp.gt.s32 %p1, {2}, 0; selp.s32 {d}, {0}, {1}, %p1;", np.int32, a, b, c)
    assert got.tolist() == [-1, 2, -3]


@pytest.mark.parametrize(
    "instruction, what",
    [
        ("bogus.u32 {d}, {0}, {0};", "the instruction bogus is not known"),
        ("add.cc.u32 {d}, {0}, {0};", "the modifier .cc is not known"),
        ("add.u64 {d}, {0}, {0};", "has 32 bits where .u64 is expected"),
        ("mul.u32 {d}, {0}, {0};", "expected one of the modifiers .lo, .hi, .wide"),
        ("add.u32 {d}, {0};", "expected 3 operands, not 2"),
        ("setp.lo.s32 %p1, {0}, {0};", "compares unsigned numbers"),
        ("mov.u32 {d}, %smid;", "the special register %smid is not known"),
        ("add.u32 {d}, {0}, nothing;", "nothing is not declared"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(instruction, what):
    with pytest.raises(Fault, match=what.replace(".", r"\.")) as raised:
        compute(instruction, np.uint32, np.zeros(32, np.uint32))
    text = instruction.split(" ")[0]
    assert f": {text}" in str(raised.value) and "line " in str(raised.value) and "block (0, 0, 0)" in str(raised.value)
