"""mov, ld, st, and the address spaces: cvta, isspacep, prefetch."""

from __future__ import annotations

import numpy as np

from .. import operands
from ..fault import Fault
from ..machine import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, WINDOW_BYTES
from ..memory import Access
from ..parse import type_bits
from ..registry import Modifiers, expect, instruction
from ..values import UNSIGNED

_TYPES = ("b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f16", "bf16", "f32", "f64")
#: They say how a cache should treat the line, or order accesses of several threads, which run one after the other here.
_CACHE = (r"c[agsv]", r"lu", r"w[bt]", r"nc", r"L1::\w+", r"L2::\w+", r"volatile", r"relaxed", r"acquire", r"release",
          r"weak", r"cta", r"gpu", r"sys", r"cluster")  # fmt: skip


# mov -------------------------------------------------------------------------


@instruction("mov")
def move(machine, s):
    m = Modifiers(s)
    type_ = m.type("pred", "b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64")
    m.done()
    expect(s, 2)
    destination, source = s.operands
    if isinstance(destination, operands.Vector):
        return _unpack(machine, destination.elements, source, type_)
    if isinstance(source, operands.Vector):
        return _pack(machine, destination, source.elements, type_)
    a, target = machine.source(source, type_), machine.target(destination, type_)
    return lambda mask: np.copyto(target, a, where=mask)


def _unpack(machine, destinations, source, type_: str):
    bits = type_bits(type_)
    part = bits // len(destinations)
    a = machine.source(source, f"b{bits}")
    pieces = a.view(UNSIGNED[part]).reshape(-1, len(destinations))
    puts = [machine.store(d, f"b{part}") for d in destinations]

    def step(mask):
        for k, put in enumerate(puts):
            put(pieces[:, k], mask)

    return step


def _pack(machine, destination, sources, type_: str):
    bits = type_bits(type_)
    part = bits // len(sources)
    arrays = [machine.source(o, f"b{part}") for o in sources]
    target = machine.target(destination, f"b{bits}")

    def step(mask):
        packed = np.stack(arrays, 1).view(target.dtype)[:, 0]
        np.copyto(target, packed, where=mask)

    return step


# addresses ---------------------------------------------------------------------


class Effective:
    """``[base + offset]``: the byte addresses of some lanes in the width of the address space."""

    def __init__(self, machine, operand, bits: int):
        if not isinstance(operand, operands.Address):
            raise Fault(f"expected an address in brackets, not {operand}")
        dtype = UNSIGNED[bits]
        self.offset = dtype(operand.offset & (1 << bits) - 1)
        if isinstance(operand.base, operands.Register):
            wide = machine.width(operand.base) > bits
            self.base = machine.source(operand.base, f"u{bits}", wider=wide)
        else:
            self.base = machine.source(operand.base, f"u{bits}")

    def __call__(self, lanes) -> np.ndarray:
        base = self.base if lanes is None else self.base[lanes]
        return base + self.offset if self.offset else base


def _space(m: Modifiers, default: str = "generic") -> str:
    space = m.take("global", "shared", "shared::cta", "local", "const", "param", "param::entry") or default
    return {"shared::cta": "shared", "const": "global", "param::entry": "param"}.get(space, space)


def _modifiers(s):
    m = Modifiers(s)
    type_ = m.type(*_TYPES)
    count = int((m.take("v2", "v4", "v8") or "v1")[1:])
    space = _space(m)
    hint = m.flag("L2::cache_hint")
    m.ignore(*_CACHE)
    m.done()
    expect(s, 3 if hint else 2)
    return type_, count, space


def _elements(operand, count: int) -> tuple:
    elements = operand.elements if isinstance(operand, operands.Vector) else (operand,)
    if len(elements) != count:
        raise Fault(f"expected {count} values, not {len(elements)}")
    return elements


# ld ----------------------------------------------------------------------------


@instruction("ld", "ldu")
def load(machine, s):
    type_, count, space = _modifiers(s)
    size = type_bits(type_) // 8
    elements = _elements(s.operands[0], count)
    puts = [machine.store_lanes(o, type_) for o in elements]
    if space == "param" and not isinstance(s.operands[1].base, operands.Register):
        return _load_parameter(machine, s.operands[1], elements, type_, size)
    read = reader(machine, space, size, count, s.line)
    address = Effective(machine, s.operands[1], 32 if space == "shared" else 64)

    def step(mask):
        lanes = machine.active(mask)
        for put, value in zip(puts, read(address(lanes), lanes)):
            put(value, lanes)

    return step


def _load_parameter(machine, operand, elements, type_: str, size: int):
    """A parameter's value is one for all threads."""
    start = machine.address_of(operand.base) + operand.offset
    if start < 0 or start + size * len(elements) > machine.parameter_end or start % (size * len(elements)):
        raise Fault(f"{size * len(elements)} bytes at {operand} lie outside the parameters, or are misaligned")
    values = [machine.parameters[start + k * size :][:size].view(UNSIGNED[size * 8]) for k in range(len(elements))]
    puts = [machine.store(o, type_) for o in elements]
    signed = [v.view(f"i{size}") if type_[0] == "s" else v for v in values]
    floating = type_[0] == "f" or type_ == "bf16"
    if floating:
        puts = [machine.store(o, f"b{size * 8}") for o in elements]

    def step(mask):
        for put, value in zip(puts, signed):
            put(value, mask)

    return step


def _total(size: int, count: int, space: str) -> int:
    if size * count > (32 if space == "global" else 16):
        raise Fault(f"accesses of {size * count} bytes to {space} memory are not known")
    return size * count


def reader(machine, space: str, size: int, count: int, line: int):
    """A function (addresses, lanes) -> the values, each an unsigned array over the lanes."""
    total = _total(size, count, space)
    access = Access(size, count)

    def from_global(addresses, lanes):
        machine.bytes["read"] += total * addresses.size
        return access.read(machine.memory, addresses)

    def from_shared(offsets, lanes):
        shared = machine.shared
        shared.check(offsets, total, "read")
        if shared.track:
            shared.note_read(offsets, total, machine.warp if lanes is None else machine.warp[lanes], line)
        machine.bytes["shared"] += total * offsets.size
        index, view = (offsets // size).astype(np.intp), shared.views[size]
        return [view.take(index + k if k else index) for k in range(count)]

    def from_local(addresses, lanes):
        index = _inside(addresses, total, machine.local.shape[1], "local read")
        view = machine.local.view(f"u{size}")
        rows = machine.all if lanes is None else lanes
        return [view[rows, index // size + k] for k in range(count)]

    def from_parameters(addresses, lanes):
        index = _inside(addresses, total, machine.parameter_end, "parameter read")
        view = machine.parameters[: machine.parameters.size // size * size].view(f"u{size}")
        return [view[index // size + k] for k in range(count)]

    def generic(addresses, lanes):
        values = [np.empty(addresses.size, UNSIGNED[size * 8]) for _ in range(count)]
        for base, here in _windows(addresses):
            within = lanes if here is None else here if lanes is None else lanes[here]
            part = addresses if here is None else addresses[here]
            found = _by_window[base](part - np.uint64(base), within)
            if here is None:
                return found
            for value, new in zip(values, found):
                value[here] = new
        return values

    _by_window = {
        0: from_global,
        SHARED_WINDOW: lambda a, lanes: from_shared(a.astype(np.uint32), lanes),
        LOCAL_WINDOW: from_local,
        PARAMETER_WINDOW: from_parameters,
    }
    return {
        "global": from_global, "shared": from_shared, "local": from_local, "param": from_parameters, "generic": generic,
    }[space]  # fmt: skip


def _windows(addresses: np.ndarray):
    """Yield (window, the indices in it or None for all) for generic addresses."""
    if int(addresses.max()) < SHARED_WINDOW:
        yield 0, None
        return
    left = addresses.size
    for base in (0, SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW):
        end = SHARED_WINDOW if base == 0 else base + WINDOW_BYTES
        here = np.flatnonzero((addresses >= np.uint64(base)) & (addresses < np.uint64(end)))
        left -= here.size
        if here.size:
            yield base, None if here.size == addresses.size else here
    if left:
        raise Fault(f"a generic address lies in no space; the highest is {int(addresses.max()):#x}")


def _inside(addresses: np.ndarray, total: int, size: int, verb: str) -> np.ndarray:
    if int(addresses.max()) + total > size:
        raise Fault(f"{verb} out of bounds: {total} bytes at offset {int(addresses.max())} of {size}")
    if int(np.bitwise_or.reduce(addresses)) & (total - 1):
        raise Fault(f"misaligned {verb} of {total} bytes")
    return addresses.astype(np.intp)


# st ----------------------------------------------------------------------------


@instruction("st")
def store(machine, s):
    type_, count, space = _modifiers(s)
    if space == "param":
        raise Fault("parameters cannot be written")
    size = type_bits(type_) // 8
    sources = [machine.source(o, f"b{size * 8}" if isinstance(o, operands.Register) else type_, wider=True)
               for o in _elements(s.operands[1], count)]  # fmt: skip
    sources = [a.view(UNSIGNED[size * 8]) for a in sources]
    write = writer(machine, space, size, count, s.line)
    address = Effective(machine, s.operands[0], 32 if space == "shared" else 64)

    def step(mask):
        lanes = machine.active(mask)
        write(address(lanes), [a if lanes is None else a[lanes] for a in sources], lanes)

    return step


def writer(machine, space: str, size: int, count: int, line: int):
    """A function (addresses, values, lanes) that writes unsigned arrays over the lanes."""
    total = _total(size, count, space)
    access = Access(size, count)

    def to_global(addresses, values, lanes):
        machine.bytes["written"] += total * addresses.size
        access.write(machine.memory, addresses, values)

    def to_shared(offsets, values, lanes):
        shared = machine.shared
        shared.check(offsets, total, "write")
        if shared.track:
            warps = machine.warp if lanes is None else machine.warp[lanes]
            shared.note_write(offsets, total, warps, line, lambda: np.stack(values, 1).view(np.uint8))
        machine.bytes["shared"] += total * offsets.size
        index, view = (offsets // size).astype(np.intp), shared.views[size]
        for k, value in enumerate(values):
            view[index + k] = value

    def to_local(addresses, values, lanes):
        index = _inside(addresses, total, machine.local.shape[1], "local write")
        view = machine.local.view(f"u{size}")
        rows = machine.all if lanes is None else lanes
        for k, value in enumerate(values):
            view[rows, index // size + k] = value

    def generic(addresses, values, lanes):
        for base, here in _windows(addresses):
            within = lanes if here is None else here if lanes is None else lanes[here]
            part = addresses if here is None else addresses[here]
            if base == PARAMETER_WINDOW:
                raise Fault("parameters cannot be written")
            _by_window[base](part - np.uint64(base), values if here is None else [v[here] for v in values], within)

    _by_window = {
        0: to_global,
        SHARED_WINDOW: lambda a, values, lanes: to_shared(a.astype(np.uint32), values, lanes),
        LOCAL_WINDOW: to_local,
    }
    return {"global": to_global, "shared": to_shared, "local": to_local, "generic": generic}[space]


# address spaces ------------------------------------------------------------------

_BASES = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}


@instruction("cvta")
def convert_address(machine, s):
    m = Modifiers(s)
    m.type("u64")
    back = m.flag("to")
    space = m.need("global", "const", "shared", "shared::cta", "local", "param", "param::entry").split("::")[0]
    m.done()
    expect(s, 2)
    base = np.uint64(_BASES[space])
    a, target = machine.source(s.operands[1], "u64"), machine.target(s.operands[0], "u64")
    ufunc = np.subtract if back else np.add
    return lambda mask: ufunc(a, base, out=target, where=mask)


@instruction("isspacep")
def is_in_space(machine, s):
    m = Modifiers(s)
    space = m.need("global", "shared", "shared::cta", "local", "param")
    m.done()
    expect(s, 2)
    base = _BASES[space.split("::")[0]]
    end = SHARED_WINDOW if base == 0 else base + WINDOW_BYTES
    a, target = machine.source(s.operands[1], "u64"), machine.target(s.operands[0], "pred")
    return lambda mask: np.copyto(target, (a >= np.uint64(base)) & (a < np.uint64(end)), where=mask)


@instruction("prefetch", "prefetchu")
def prefetch(machine, s):
    """A prefetch may name any address; it changes nothing."""
    return lambda mask: None


@instruction("createpolicy")
def create_policy(machine, s):
    """A cache policy is only ever handed to a load or a store, which here have no cache."""
    target = machine.target(s.operands[0], "b64")
    return lambda mask: np.copyto(target, np.uint64(0), where=mask)
