"""setp, selp, slct, set and testp."""

from __future__ import annotations

import numpy as np

from .. import operands
from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from ..values import flush, from_bf16

_UFUNCS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = {name + "u": name for name in _UFUNCS}
COMPARISONS = (*_UFUNCS, *_UNSIGNED_NAMES, *_UNORDERED, "num", "nan")
FLOATS = ("f16", "bf16", "f32", "f64")
TYPES = ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", *FLOATS)


def comparison(name: str, type_: str):
    """The function of two arrays that a comparison stands for."""
    if type_ in FLOATS:
        if name == "num":
            return lambda x, y: ~(np.isnan(x) | np.isnan(y))
        if name == "nan":
            return lambda x, y: np.isnan(x) | np.isnan(y)
        if name in _UNORDERED:  # true if an operand is a NaN
            ufunc = _UFUNCS[_UNORDERED[name]]
            return lambda x, y: ufunc(x, y) | np.isnan(x) | np.isnan(y)
        if name == "ne":  # false if an operand is a NaN, unlike IEEE's
            return lambda x, y: (x < y) | (x > y)
        if name in _UFUNCS:
            return _UFUNCS[name]
    else:
        if name in _UNSIGNED_NAMES:
            if type_[0] == "s":
                raise Fault(f".{name} compares unsigned numbers, not .{type_}")
            name = _UNSIGNED_NAMES[name]
        if type_[0] == "b" and name not in ("eq", "ne"):
            raise Fault(f".{name} does not compare .{type_}")
        if name in _UFUNCS:
            return _UFUNCS[name]
    raise Fault(f"the comparison .{name} is not known for .{type_}")


def _reader(machine, operand, type_: str, ftz: bool):
    array = machine.source(operand, type_)
    if type_ == "bf16":
        return lambda: from_bf16(array)
    return (lambda: flush(array)) if ftz else (lambda: array)


def _compare_halves(machine, s, name: str):
    """Of packed numbers the first predicate is that of the low halves, and the second that of the high ones."""
    expect(s, 3)
    compare, destination = comparison(name, "bf16"), s.operands[0]
    targets = [machine.target(half, "pred") for half in (destination.first, destination.second)]
    a, b = (machine.source(o, "b32") for o in s.operands[1:])

    def step(mask):
        for shift, target in zip((0, 16), targets):
            halves = (from_bf16((array >> shift).astype(np.uint16)) for array in (a, b))
            np.copyto(target, compare(*halves), where=mask)

    return step


@instruction("setp")
def set_predicate(machine, s):
    m = Modifiers(s)
    type_ = m.type(*TYPES, "bf16x2")
    name = m.need(*COMPARISONS)
    if type_ == "bf16x2":
        m.done()
        return _compare_halves(machine, s, name)
    joined, ftz = m.take("and", "or", "xor"), m.flag("ftz")
    m.done()
    expect(s, 4 if joined else 3)
    if ftz and type_ != "f32":
        raise Fault(f".ftz is not known for .{type_}")
    compare = comparison(name, type_)
    destination = s.operands[0]
    pair = isinstance(destination, operands.Pair)
    first = machine.target(destination.first if pair else destination, "pred")
    if not joined and not pair and type_ != "bf16" and not ftz:
        a, b = (machine.source(o, type_) for o in s.operands[1:3])
        if isinstance(compare, np.ufunc):
            return lambda mask: compare(a, b, out=first, where=mask)
        return lambda mask: np.copyto(first, compare(a, b), where=mask)
    read_a, read_b = (_reader(machine, o, type_, ftz) for o in s.operands[1:3])
    second = machine.target(destination.second, "pred") if pair else None
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(joined)
    if joined:
        other = s.operands[3]
        negated = isinstance(other, operands.Negated)
        c = machine.predicate(other.register if negated else other)

    def step(mask):
        p = compare(read_a(), read_b())
        q = ~p
        if joined:
            third = ~c if negated else c
            p, q = join(p, third), join(q, third)
        np.copyto(first, p, where=mask)
        if pair:
            np.copyto(second, q, where=mask)

    return step


@instruction("set")
def set_value(machine, s):
    """A comparison's truth as all ones, or as 1.0."""
    m = Modifiers(s)
    result, type_ = m.types(2)
    name, ftz = m.need(*COMPARISONS), m.flag("ftz")
    m.done()
    expect(s, 3)
    if result not in ("u32", "s32", "f32") or type_ not in TYPES:
        raise Fault(f"set.{name}.{result}.{type_} is not known")
    compare = comparison(name, type_)
    read_a, read_b = (_reader(machine, o, type_, ftz) for o in s.operands[1:])
    target = machine.target(s.operands[0], result)
    true = np.float32(1) if result == "f32" else target.dtype.type(0) - target.dtype.type(1)
    return lambda mask: np.copyto(target, np.where(compare(read_a(), read_b()), true, target.dtype.type(0)), where=mask)


@instruction("selp")
def select(machine, s):
    m = Modifiers(s)
    type_ = m.type("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64")
    m.done()
    expect(s, 4)
    a, b = (machine.source(o, type_) for o in s.operands[1:3])
    negated = isinstance(s.operands[3], operands.Negated)
    p = machine.predicate(s.operands[3].register if negated else s.operands[3])
    if negated:
        a, b = b, a
    target = machine.target(s.operands[0], type_)
    return lambda mask: np.copyto(target, np.where(p, a, b), where=mask)


@instruction("slct")
def select_by_sign(machine, s):
    """a if c >= 0 (-0 included), else b; a NaN selects b."""
    m = Modifiers(s)
    type_, by = m.types(2)
    ftz = m.flag("ftz")
    m.done()
    expect(s, 4)
    if by not in ("s32", "f32") or type_ in ("f16", "bf16", "pred"):
        raise Fault(f"slct.{type_}.{by} is not known")
    a, b = (machine.source(o, type_) for o in s.operands[1:3])
    c, target = machine.source(s.operands[3], by), machine.target(s.operands[0], type_)
    return lambda mask: np.copyto(target, np.where((flush(c) if ftz else c) >= 0, a, b), where=mask)


@instruction("testp")
def test_property(machine, s):
    m = Modifiers(s)
    type_ = m.type("f32", "f64")
    name = m.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    m.done()
    expect(s, 2)
    a, target = machine.source(s.operands[1], type_), machine.target(s.operands[0], "pred")
    smallest = np.finfo(a.dtype).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (np.abs(x) < smallest) & (x != 0),
    }
    test = tests[name]
    return lambda mask: np.copyto(target, test(a), where=mask)
