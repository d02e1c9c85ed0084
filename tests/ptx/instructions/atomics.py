"""atom and red: one lane after the other, on global or shared memory."""

from __future__ import annotations

import numpy as np

from ..fault import Fault
from ..memory import Access
from ..parse import type_bits
from ..registry import Modifiers, expect, instruction
from ..values import UNSIGNED, from_bf16, numpy_type, to_bf16
from .movement import Effective, _space

_TYPES = ("b32", "b64", "u32", "u64", "s32", "s64", "f16", "bf16", "f32", "f64")
_KNOWN = {
    "add": ("u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b32", "b64"),
    "inc": ("u32",),
    "dec": ("u32",),
}


def _combine(operation: str):
    return {
        "add": lambda old, b, c: old + b,
        "min": lambda old, b, c: min(old, b),
        "max": lambda old, b, c: max(old, b),
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
        "exch": lambda old, b, c: b,
        "cas": lambda old, b, c: c if old == b else old,
        "inc": lambda old, b, c: type(old)(0) if old >= b else old + type(old)(1),
        "dec": lambda old, b, c: b if old == 0 or old > b else old - type(old)(1),
    }[operation]


@instruction("atom", "red")
def atomic(machine, s):
    m = Modifiers(s)
    type_ = m.type(*_TYPES)
    operation = m.need(*_KNOWN)
    if type_ not in _KNOWN[operation]:
        raise Fault(f"{s.opcode}.{operation}.{type_} is not known")
    space = _space(m)
    m.take("noftz")
    m.ignore("relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "cluster", "L2::.*")
    m.done()
    returns = s.opcode == "atom"
    inputs = 2 if operation == "cas" else 1
    expect(s, 1 + inputs + returns)
    if space not in ("global", "shared", "generic"):
        raise Fault(f"there are no atomic operations on {space} memory")
    operand = s.operands[1 if returns else 0]
    sources = [machine.source(o, type_) for o in s.operands[1 + returns :]]
    put = machine.store_lanes(s.operands[0], type_) if returns else None
    size = type_bits(type_) // 8
    access, address = Access(size, 1), Effective(machine, operand, 32 if space == "shared" else 64)
    combine, dtype = _combine(operation), numpy_type(type_)
    bits = UNSIGNED[size * 8]

    def value(raw):
        return from_bf16(raw) if type_ == "bf16" else raw.view(dtype)

    def read_write(where: np.ndarray):
        """Functions that read and write one number at an address of this space."""
        if space == "shared":
            view = machine.shared.views[size]
            return (lambda i: view[int(where[i]) // size]), (lambda i, v: view.__setitem__(int(where[i]) // size, v))
        read = lambda i: access.read(machine.memory, where[i : i + 1])[0][0]  # noqa: E731
        return read, lambda i, v: access.write(machine.memory, where[i : i + 1], [np.array([v], bits)])

    def step(mask):
        lanes = machine.all if mask is True else np.flatnonzero(mask)
        where = address(lanes)
        if space == "shared":
            shared = machine.shared
            shared.check(where, size, "atomic access")
            if shared.track:
                shared.note_write(where, size, np.full(lanes.size, machine.warps), s.line, None)
            machine.bytes["shared"] += 2 * size * lanes.size
        else:
            machine.bytes["read"] += size * lanes.size
            machine.bytes["written"] += size * lanes.size
        read, write = read_write(where)
        olds = np.empty(lanes.size, bits)
        for i, lane in enumerate(lanes):
            olds[i] = raw = read(i)
            old = value(np.asarray(raw).reshape(1))[0]
            arguments = [value(a[lane : lane + 1])[0] for a in sources]
            new = np.asarray(combine(old, arguments[0], arguments[-1])).reshape(1)
            stored = to_bf16(new) if type_ == "bf16" else new.astype(dtype)
            write(i, stored.view(bits)[0])
        if returns:
            put(olds, None if mask is True else lanes)

    return step
