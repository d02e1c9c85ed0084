"""Exchanges between the lanes of a warp: shfl, vote, match, redux, elect, activemask."""

from __future__ import annotations

import numpy as np

from .. import operands
from ..fault import Fault
from ..registry import Modifiers, expect, instruction


def participants(machine, mask, members: np.ndarray) -> np.ndarray:
    """The lanes that take part, as [warps, 32]; a Fault where a lane is named and missing, or there and not named."""
    here = np.ones(machine.lanes, bool) if mask is True else mask
    here = here.reshape(-1, 32)
    named = members.reshape(-1, 32)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if not (named[here] == 0xFFFFFFFF).all():
        own = (named & bit).astype(bool)
        if (here & ~own).any():
            raise Fault("a lane is not in its own member mask")
    wanted = np.bitwise_or.reduce(np.where(here, named, np.uint32(0)), 1)
    alive = machine.alive.reshape(-1, 32)
    missing = (wanted[:, None] & bit).astype(bool) & alive & ~here
    if missing.any():
        warp, lane = (int(i[0]) for i in np.nonzero(missing))
        raise Fault(f"lane {lane} of warp {warp} is in the member mask but does not take part")
    return here


@instruction("shfl")
def shuffle(machine, s):
    """Read another lane's value. c holds a segment mask (bits 8 to 12) and a clamp (bits 0 to 4)."""
    m = Modifiers(s)
    m.type("b32")
    if not m.flag("sync"):
        raise Fault("shfl without .sync is gone since sm_70")
    mode = m.need("up", "down", "bfly", "idx")
    m.done()
    expect(s, 5)
    destination = s.operands[0]
    pair = isinstance(destination, operands.Pair)
    target = machine.target(destination.first if pair else destination, "b32")
    valid = machine.target(destination.second, "pred") if pair else None
    a, b, c, members = (machine.source(o, "b32") for o in s.operands[1:])
    lane = np.arange(32)[None, :]
    everybody = isinstance(s.operands[4], operands.Immediate) and s.operands[4].value & 0xFFFFFFFF == 0xFFFFFFFF

    def route():
        """The lane that each lane reads, and whether it lies within the segment."""
        offset = b.reshape(-1, 32).astype(np.int64) & 31
        control = c.reshape(-1, 32).astype(np.int64)
        segment, clamp = control >> 8 & 31, control & 31
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        if mode == "up":
            from_ = lane - offset
            inside = from_ >= highest
        elif mode == "down":
            from_ = lane + offset
            inside = from_ <= highest
        elif mode == "bfly":
            from_ = lane ^ offset
            inside = from_ <= highest
        else:
            from_ = lowest | (offset & ~segment)
            inside = from_ <= highest
        from_ = np.where(inside, from_, lane)
        return from_, inside

    fixed = None
    if all(isinstance(o, operands.Immediate) for o in s.operands[2:4]):
        from_, inside = route()
        flat = (np.arange(machine.warps)[:, None] * 32 + from_).ravel()
        fixed = flat, inside, from_

    def step(mask):
        if fixed is not None:
            flat, inside, from_ = fixed
        else:
            from_, inside = route()
            flat = (np.arange(machine.warps)[:, None] * 32 + from_).ravel()
        if mask is not True or not everybody:
            here = participants(machine, mask, members)
            absent = here & ~np.take_along_axis(here, from_, 1)
            if absent.any():
                warp, which = (int(i[0]) for i in np.nonzero(absent))
                raise Fault(f"lane {which} of warp {warp} reads lane {int(from_[warp, which])}, which takes no part")
        np.copyto(target, a.take(flat), where=mask)
        if pair:
            np.copyto(valid, np.broadcast_to(inside, (machine.warps, 32)).ravel(), where=mask)

    return step


def _predicate(machine, operand):
    if isinstance(operand, operands.Negated):
        array = machine.predicate(operand.register)
        return lambda: ~array
    array = machine.predicate(operand)
    return lambda: array


@instruction("vote")
def vote(machine, s):
    m = Modifiers(s)
    type_ = m.type("pred", "b32")
    if not m.flag("sync"):
        raise Fault("vote without .sync is gone since sm_70")
    mode = m.need("all", "any", "uni", "ballot")
    m.done()
    expect(s, 3)
    if (mode == "ballot") != (type_ == "b32"):
        raise Fault(f"vote.{mode}.{type_} is not known")
    read, members = _predicate(machine, s.operands[1]), machine.source(s.operands[2], "b32")
    target = machine.target(s.operands[0], type_)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def step(mask):
        here = participants(machine, mask, members)
        p = read().reshape(-1, 32)
        if mode == "ballot":
            result = np.bitwise_or.reduce(np.where(p & here, bit, np.uint32(0)), 1)
        else:
            every, some = (p | ~here).all(1), (p & here).any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        np.copyto(target, np.repeat(result, 32), where=mask)

    return step


@instruction("match")
def match(machine, s):
    m = Modifiers(s)
    type_ = m.type("b32", "b64")
    if not m.flag("sync"):
        raise Fault("match needs .sync")
    m.need("any")
    m.done()
    expect(s, 3)
    a, members = machine.source(s.operands[1], type_), machine.source(s.operands[2], "b32")
    target = machine.target(s.operands[0], "b32")
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def step(mask):
        here = participants(machine, mask, members)
        value = a.reshape(-1, 32)
        same = (value[:, :, None] == value[:, None, :]) & here[:, None, :]
        np.copyto(target, np.bitwise_or.reduce(np.where(same, bit, np.uint32(0)), 2).ravel(), where=mask)

    return step


@instruction("redux")
def reduce(machine, s):
    m = Modifiers(s)
    type_ = m.type("u32", "s32", "b32")
    if not m.flag("sync"):
        raise Fault("redux needs .sync")
    operation = m.need("add", "min", "max", "and", "or", "xor")
    m.done()
    expect(s, 3)
    if (operation in ("and", "or", "xor")) != (type_ == "b32"):
        raise Fault(f"redux.{operation}.{type_} is not known")
    a, members = machine.source(s.operands[1], type_), machine.source(s.operands[2], "b32")
    target = machine.target(s.operands[0], type_)
    info = np.iinfo(a.dtype)
    ufunc, neutral = {
        "add": (np.add, 0), "min": (np.minimum, info.max), "max": (np.maximum, info.min),
        "and": (np.bitwise_and, info.max), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[operation]  # fmt: skip

    def step(mask):
        here = participants(machine, mask, members)
        value = np.where(here, a.reshape(-1, 32), a.dtype.type(neutral))
        np.copyto(target, np.repeat(ufunc.reduce(value, 1, dtype=a.dtype), 32), where=mask)

    return step


@instruction("elect")
def elect(machine, s):
    """Elects the lowest lane of the member mask; PTX only says that it is always the same one."""
    m = Modifiers(s)
    if not m.flag("sync"):
        raise Fault("elect needs .sync")
    m.done()
    expect(s, 2)
    pair = s.operands[0]
    if not isinstance(pair, operands.Pair):
        raise Fault("elect needs two destinations d|p")
    members = machine.source(s.operands[1], "b32")
    target, chosen = machine.target(pair.first, "b32"), machine.target(pair.second, "pred")

    def step(mask):
        here = participants(machine, mask, members)
        leader = np.repeat(here.argmax(1), 32)
        np.copyto(target, leader, where=mask, casting="unsafe")
        np.copyto(chosen, machine.lane == leader, where=mask)

    return step


@instruction("activemask")
def active_mask(machine, s):
    m = Modifiers(s)
    m.type("b32")
    m.done()
    target = machine.target(s.operands[0], "b32")
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def step(mask):
        here = np.ones(machine.lanes, bool) if mask is True else mask
        result = np.bitwise_or.reduce(np.where(here.reshape(-1, 32), bit, np.uint32(0)), 1)
        np.copyto(target, np.repeat(result, 32), where=mask)

    return step
