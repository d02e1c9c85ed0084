"""cp.async: copies from global to shared memory that land only when their group is waited for."""

from __future__ import annotations

import dataclasses

import numpy as np

from .. import operands
from ..fault import Fault
from ..memory import Access
from ..registry import Modifiers, expect, instruction
from ..shared import POISON
from .movement import Effective


@dataclasses.dataclass
class Copy:
    """One instruction's copies of some lanes."""

    lanes: np.ndarray
    offsets: np.ndarray
    content: np.ndarray  #: bytes [lanes, size]
    group: np.ndarray  #: the number of groups that each lane had committed before


def copy(machine, s, m: Modifiers):
    """cp.async [shared], [global], bytes {, bytes to read} ; what is not read becomes zero."""
    m.need("ca", "cg")
    m.need("shared", "shared::cta")
    m.need("global")
    m.ignore("L2::.*")
    m.done()
    expect(s, 3, 4)
    if not isinstance(s.operands[2], operands.Immediate):
        raise Fault("the size must be a constant")
    size = s.operands[2].value
    if size not in ((16,) if "cg" in s.modifiers else (4, 8, 16)):
        raise Fault(f"copies of {size} bytes are not known")
    to, from_ = Effective(machine, s.operands[0], 32), Effective(machine, s.operands[1], 64)
    to_read = machine.source(s.operands[3], "u32") if len(s.operands) == 4 else None
    access = Access(min(size, 8), max(size // 8, 1))
    ordinal = s.line

    def step(mask):
        lanes = machine.all if mask is True else np.flatnonzero(mask)
        offsets, addresses = to(lanes), from_(lanes)
        wanted = np.full(lanes.size, size, np.uint32) if to_read is None else to_read[lanes]
        if (wanted > size).any():
            raise Fault(f"more bytes to read than the {size} to copy")
        content = np.zeros((lanes.size, size), np.uint8)
        for amount in np.unique(wanted):
            here = np.flatnonzero(wanted == amount)
            if amount == size:
                values = access.read(machine.memory, addresses[here])
                content[here] = np.stack(values, 1).view(np.uint8)
            elif amount:
                if (addresses[here] & np.uint64(size - 1)).any():
                    raise Fault(f"misaligned copy of {size} bytes")
                columns = [Access(1, 1).read(machine.memory, addresses[here] + np.uint64(k))[0] for k in range(amount)]
                content[here[:, None], np.arange(amount)] = np.stack(columns, 1)
            machine.bytes["read"] += int(amount) * here.size
        shared = machine.shared
        shared.check(offsets, size, "write")
        if shared.track:
            warps = machine.warp[lanes]
            shared.note_write(offsets, size, warps, ordinal, None, proxy=False)
            shared.note_flight(offsets, size, warps)
        machine.bytes["shared"] += size * lanes.size
        shared.bytes[offsets.astype(np.intp)[:, None] + np.arange(size)] = POISON
        machine.pending_copies.append(Copy(lanes, offsets, content, machine.commits[lanes]))

    return step


def land(machine, ready) -> None:
    """Let the copies land that ``ready``, a function of a copy, marks by a flag per lane."""
    left, shared = [], machine.shared
    for each in machine.pending_copies:
        here = ready(each)
        if not here.any():
            left.append(each)
            continue
        offsets, content, lanes = each.offsets[here], each.content[here], each.lanes[here]
        size = content.shape[1]
        if shared.track:
            shared.note_landing(offsets, size, machine.warp[lanes])
        shared.bytes[offsets.astype(np.intp)[:, None] + np.arange(size)] = content
        if not here.all():
            stay = ~here
            left.append(Copy(each.lanes[stay], each.offsets[stay], each.content[stay], each.group[stay]))
    machine.pending_copies = left


def wait(machine, s, m: Modifiers, every: bool):
    """Wait until at most ``n`` of each lane's latest groups are in flight; or for all, committed or not."""
    m.done()
    expect(s, 0 if every else 1)
    if not every and not isinstance(s.operands[0], operands.Immediate):
        raise Fault("the number of groups must be a constant")
    allowed = 0 if every else s.operands[0].value

    def step(mask):
        acting = np.ones(machine.lanes, bool) if mask is True else mask
        if every:
            land(machine, lambda each: acting[each.lanes])
        else:
            land(machine, lambda each: acting[each.lanes] & (each.group < machine.commits[each.lanes] - allowed))

    return step


@instruction("cp")
def copy_family(machine, s):
    m = Modifiers(s)
    if not m.flag("async"):
        raise Fault("only cp.async is known")
    if m.flag("commit_group"):
        m.done()

        def commit(mask):
            machine.commits[slice(None) if mask is True else mask] += 1

        return commit
    if m.flag("wait_group"):
        return wait(machine, s, m, every=False)
    if m.flag("wait_all"):
        return wait(machine, s, m, every=True)
    if {"bulk", "mbarrier", "reduce"} & set(m.left):
        raise Fault("bulk copies and memory barriers are not known")
    return copy(machine, s, m)
