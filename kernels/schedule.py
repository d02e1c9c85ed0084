"""Which rows each program of the weight gradients sums, when every sample has a task of its own.

A unit is a tile of BM rows of one sample. A segment is a run of units of one task, and a program sums over one segment.
``schedule`` puts the samples in the order of their tasks and cuts each task's units into segments of nearly equal
length, so that every program has about as much to do, however the samples are distributed among the tasks. Samples
without a valid task are in no segment.

Everything happens on the device: the host reads nothing back and launches a grid that suffices for every possible
``task_index``, so a CUDA graph may contain it. One schedule serves all adapters and backwards that have the same
``task_index``, number of rows and tile.

The table is one tensor in int32:

    ranges [T + 1]          the segments of task t are ranges[t] to ranges[t+1] - 1; ranges[T] segments have units
    order [B]               the samples sorted by task, those of a task in their own order; invalid ones are not there
    units [segments, 2]     first unit of the segment, and how many; unit u is tile u % per_sample of sample
                            order[u // per_sample], where per_sample tiles of BM rows cover a sample
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import AdapterLayout
from . import tiles
from .common import LENGTHS, padded
from .launch import launch

#: How many programs the rows are split among: two waves on a GPU of 132 multiprocessors. More splits would only mean
#: more partial sums to add.
_PROGRAMS = 264
#: A segment has at least this many units, unless its task has fewer.
_LEAST_UNITS = 4
#: How many samples ``schedule_kernel`` reads at a time, and how many tasks it counts at a time.
_SAMPLES, _TASKS = 128, 64


class Schedule(NamedTuple):
    """The segments of the rows of one batch."""

    table: Tensor | None  #: int32, see the top of this file; None if all rows are of one task
    segments: int  #: how many the grid provides for; some of them may have no units
    share: int  #: units of each segment (but the last) if all rows are of one task
    B: int  #: samples
    M: int  #: rows per sample
    T: int  #: tasks
    tile: tiles.Tile  #: the tile of ``weights_kernel``

    @property
    def mixed(self) -> bool:
        """Whether the rows may be of several tasks."""
        return self.table is not None


@triton.jit
def _count(TASK, B, first, NS: tl.constexpr, NT: tl.constexpr):
    """Return how many samples each of the NT tasks from ``first`` on has, as [NT] int32."""
    task = first + tl.arange(0, NT)
    count = tl.zeros((NT,), tl.int32)
    for start in range(0, B, NS):
        sample = start + tl.arange(0, NS)
        found = tl.load(TASK + sample, mask=sample < B, other=-1)
        count += tl.sum((found[None, :] == task[:, None]).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=LENGTHS)
def schedule_kernel(TASK, TABLE, B, T, per_sample, splits, segments, NS: tl.constexpr, NT: tl.constexpr):
    """Write the table's entries of one task. The grid is (T,).

    Pointers:
        TASK   [B]                         int32 or int64; the task of each sample
        TABLE  [T + 1 + B + 2 * segments]  int32; output, see the top of this file

    A segment has at most ``share`` units, a ``splits``-th of all units of valid samples, rounded up. NS samples and NT
    tasks are compared at a time.
    """
    mine = tl.program_id(0)
    ORDER = TABLE + T + 1
    UNITS = ORDER + B
    valid = 0
    for start in range(0, B, NS):
        sample = start + tl.arange(0, NS)
        found = tl.load(TASK + sample, mask=sample < B, other=-1)
        valid += tl.sum(((found >= 0) & (found < T)).to(tl.int32), 0)
    share = tl.maximum((valid * per_sample + splits - 1) // splits, 1)

    # the samples and segments of the tasks before this one, of this one, and of all
    place, count, segment, pieces, total = 0, 0, 0, 0, 0
    for first in range(0, T, NT):
        task = first + tl.arange(0, NT)
        counts = tl.where(task < T, _count(TASK, B, first, NS, NT), 0)
        cut = (counts * per_sample + share - 1) // share
        place += tl.sum(tl.where(task < mine, counts, 0), 0)
        count += tl.sum(tl.where(task == mine, counts, 0), 0)
        segment += tl.sum(tl.where(task < mine, cut, 0), 0)
        pieces += tl.sum(tl.where(task == mine, cut, 0), 0)
        total += tl.sum(cut, 0)

    tl.store(TABLE + mine, segment)
    first_unit = place * per_sample
    for start in range(0, B, NS):
        sample = start + tl.arange(0, NS)
        found = tl.load(TASK + sample, mask=sample < B, other=-1) == mine
        tl.store(ORDER + place + tl.cumsum(found.to(tl.int32), 0) - 1, sample, mask=found)
        place += tl.sum(found.to(tl.int32), 0)

    # ``pieces`` segments of nearly equal length: the first ``more`` of them have one unit more than the others
    least = count * per_sample // tl.maximum(pieces, 1)
    more = count * per_sample - least * pieces
    for start in range(0, pieces, NS):
        piece = start + tl.arange(0, NS)
        ok = piece < pieces
        tl.store(UNITS + 2 * (segment + piece), first_unit + piece * least + tl.minimum(piece, more), mask=ok)
        tl.store(UNITS + 2 * (segment + piece) + 1, least + (piece < more).to(tl.int32), mask=ok)
    if mine == 0:
        tl.store(TABLE + T, total)
        for start in range(total, segments, NS):
            empty = start + tl.arange(0, NS)
            tl.store(UNITS + 2 * empty, tl.zeros((NS,), tl.int32), mask=empty < segments)
            tl.store(UNITS + 2 * empty + 1, tl.zeros((NS,), tl.int32), mask=empty < segments)


def schedule(
    task_index: Tensor | None,
    B: int,
    M: int,
    T: int,
    layout: AdapterLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> Schedule:
    """Divide the rows of B samples into segments. Nothing is read back from the device.

    Args:
        task_index: [B] int32 or int64, -1 for a sample without a task; None if all rows are of task 0.
        B: number of samples, at least 1.
        M: rows per sample, at least 1.
        T: number of tasks, at least 1.
        layout: the layout of the adapters.
        dtype: the dtype of the rows.
        device: the device of the rows.
    """
    tile = tiles.weights(layout.d, layout.b, dtype, layout.pre_norm, tiles.architecture(device))
    per_sample = triton.cdiv(M, tile.BM)
    units = B * per_sample
    programs = triton.cdiv(layout.d, tile.BK) + 1  # of weights_kernel, for each segment
    splits = max(1, min(triton.cdiv(units, _LEAST_UNITS), _PROGRAMS // programs))
    if task_index is None:
        share = triton.cdiv(units, splits)
        return Schedule(None, triton.cdiv(units, share), share, B, M, T, tile)
    # Rounding up adds less than one segment for each task that has samples.
    segments = min(units, splits + min(B, T) - 1)
    table = torch.empty(T + 1 + B + 2 * segments, dtype=torch.int32, device=device)
    launch(
        schedule_kernel, (T,),
        task_index.contiguous(), table, B, T, per_sample, splits, segments,
        NS=_SAMPLES, NT=min(_TASKS, padded(T)), num_warps=4,
    )  # fmt: skip
    return Schedule(table, segments, 0, B, M, T, tile)
