"""ldmatrix and stmatrix: 8x8 matrices of 16-bit numbers between shared memory and a warp's registers.

Lane 8i + j gives the address of row j of matrix i. Of each matrix lane l holds the two numbers of row l // 4 at columns
2 (l % 4) and 2 (l % 4) + 1, the first in the lower half of its register; transposed, rows and columns change places.
"""

from __future__ import annotations

import numpy as np

from ..fault import Fault
from ..registry import Modifiers, expect, instruction
from .movement import Effective, _elements


def _modifiers(s) -> tuple[int, bool]:
    m = Modifiers(s)
    m.type("b16")
    if not (m.flag("sync") and m.flag("aligned") and m.flag("m8n8")):
        raise Fault(f"only {s.opcode}.sync.aligned.m8n8 is known")
    count = int(m.need("x1", "x2", "x4")[1:])
    transposed = m.flag("trans")
    m.need("shared", "shared::cta")
    m.done()
    expect(s, 2)
    return count, transposed


def _rows(machine, address, warps: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The offsets [warps, 8 count] of all rows, and each one's warp."""
    offsets = address(None).reshape(-1, 32)[warps, : 8 * count]
    return offsets.ravel(), np.repeat(warps, 8 * count)


@instruction("ldmatrix")
def load_matrix(machine, s):
    count, transposed = _modifiers(s)
    address = Effective(machine, s.operands[1], 32)
    targets = [machine.target(o, "b32") for o in _elements(s.operands[0], count)]

    def step(mask):
        warps = machine.whole_warps(mask)
        shared = machine.shared
        offsets, owners = _rows(machine, address, warps, count)
        shared.check(offsets, 16, "read")
        if shared.track:
            shared.note_read(offsets, 16, owners, s.line)
        machine.bytes["shared"] += 16 * offsets.size
        index = (offsets // 8).astype(np.intp)
        rows = shared.views[8][index[:, None] + np.arange(2)].view(np.uint16)
        matrices = rows.reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        values = matrices.view(np.uint32).reshape(-1, count, 32)
        for k, target in enumerate(targets):
            if mask is True:
                target[:] = values[:, k].ravel()
            else:
                target.reshape(-1, 32)[warps] = values[:, k]

    return step


@instruction("stmatrix")
def store_matrix(machine, s):
    count, transposed = _modifiers(s)
    address = Effective(machine, s.operands[0], 32)
    sources = [machine.source(o, "b32") for o in _elements(s.operands[1], count)]

    def step(mask):
        warps = machine.whole_warps(mask)
        shared = machine.shared
        offsets, owners = _rows(machine, address, warps, count)
        shared.check(offsets, 16, "write")
        values = np.stack([a.reshape(-1, 32)[warps] for a in sources], 1)
        matrices = values.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        content = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        if shared.track:
            shared.note_write(offsets, 16, owners, s.line, lambda: content)
        machine.bytes["shared"] += 16 * offsets.size
        shared.bytes[offsets.astype(np.intp)[:, None] + np.arange(16)] = content

    return step
