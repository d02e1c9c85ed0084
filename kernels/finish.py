"""The last step of the weight gradients: add the partial sums of a task's segments, and compose its packed gradient.

One launch serves all adapters of a stack. ``weight_gradients.py`` says what the partial sums are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import AdapterLayout
from . import tiles
from .common import LENGTHS, UNALIGNED, load_vector, load_weight, padded, some_columns
from .launch import launch
from .schedule import Schedule


@triton.jit
def _load_transposed(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Load [BK, BB]: rows k*BK to (k+1)*BK of the contiguous matrix [D, BW] at ``base``; zeros outside it."""
    j = tl.arange(0, BB)
    column = k * BK + tl.arange(0, BK)
    pointer = base + column[:, None] * BW + j[None, :]
    if D % BK == 0 and BW == BB:
        tile = tl.load(pointer)
    else:
        tile = tl.load(pointer, mask=(column < D)[:, None] & (j < BW)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def finish_kernel(
    PART, PACKED, MEAN, DPACKED, TABLE, T, segments,
    D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, DOWN_BIAS: tl.constexpr,
    UP: tl.constexpr, UP_BIAS: tl.constexpr, GAMMA: tl.constexpr, PRE_GAMMA: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, MIXED: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of BK columns of one task of one adapter, and store that part of dpacked. The grid is
    (NK, T, adapters).

    Pointers, all contiguous:
        PART     [adapters, segments, SIZE]  float32; the partial sums from ``weights_kernel``
        PACKED   [adapters, T, P]            float32, bfloat16 or float16; the packed adapters
        MEAN     [adapters, T, b+1]          float32; the column means of [W_u | b_u], from the fold (read if POST)
        DPACKED  [adapters, T, P]            PACKED's dtype; output, the gradient of PACKED
        TABLE    [...]                       int32; the schedule (None unless MIXED)

    T is the number of tasks. A task's segments are in the schedule; unless MIXED all are of the one task. DOWN_BIAS,
    UP, UP_BIAS, GAMMA and PRE_GAMMA are the offsets of the parts within a packed adapter; the down-projection is at
    offset 0, and each norm's beta follows its gamma.
    """
    SMALL: tl.constexpr = (2 * BW + 2) * D
    chunk = tl.program_id(0)
    task = tl.program_id(1)
    adapter = tl.program_id(2).to(tl.int64)
    if MIXED:
        first = tl.load(TABLE + task)
        last = tl.load(TABLE + task + 1)
    else:
        first = 0
        last = segments
    j = tl.arange(0, BB)
    j_ok = j < BW
    column = chunk * BK + tl.arange(0, BK)
    column_ok = column < D
    down = tl.zeros((BK, BB), tl.float32)
    up = tl.zeros((BK, BB), tl.float32)
    up_bias = tl.zeros((BK,), tl.float32)
    g_sum = tl.zeros((BK,), tl.float32)
    gram = tl.zeros((BB, BB), tl.float32)
    border = tl.zeros((BB,), tl.float32)
    by_gamma = tl.zeros((BB,), tl.float32)
    dz_sum = tl.zeros((BB,), tl.float32)
    corner = tl.zeros((), tl.float32)
    last_by_gamma = tl.zeros((), tl.float32)
    # Several segments at a time: their loads do not wait for each other.
    for segment in tl.range(first, last, loop_unroll_factor=UNROLL):
        part = PART + (adapter * segments + segment) * SIZE
        down += _load_transposed(part, chunk, D, BW, BB, BK)
        up += _load_transposed(part + BW * D, chunk, D, BW, BB, BK)
        up_bias += load_vector(part + 2 * BW * D, chunk, D, BK)
        g_sum += load_vector(part + (2 * BW + 1) * D, chunk, D, BK)
        small = part + SMALL
        dz_sum += tl.load(small + BB * BB + 2 * BB + j)
        if POST:
            gram += tl.load(small + j[:, None] * BB + j[None, :])
            border += tl.load(small + BB * BB + j)
            by_gamma += tl.load(small + BB * BB + BB + j)
            corner += tl.load(small + BB * BB + 3 * BB)
            last_by_gamma += tl.load(small + BB * BB + 3 * BB + 1)

    packed = PACKED + (adapter * T + task) * P
    dpacked = DPACKED + (adapter * T + task) * P
    kind = DPACKED.dtype.element_ty
    up_at = UP + column[:, None] * BW + j[None, :]
    up_ok = column_ok[:, None] & j_ok[None, :]
    if POST:
        mean = MEAN + (adapter * T + task) * (BW + 1)
        gamma = load_vector(packed + GAMMA, chunk, D, BK)
        wa = tl.load(packed + up_at, mask=up_ok, other=0.0).to(tl.float32)
        wa -= tl.load(mean + j, mask=j_ok, other=0.0)[None, :]
        wa_bias = load_vector(packed + UP_BIAS, chunk, D, BK) - tl.load(mean + BW)
        dgamma = tl.sum(wa * up, 1) + wa_bias * up_bias
        tl.store(dpacked + GAMMA + column, dgamma.to(kind), mask=column_ok)
        tl.store(dpacked + GAMMA + D + column, g_sum.to(kind), mask=column_ok)
        product = wa_bias[:, None] * border[None, :]
        for c in range(BB // 16):
            gram_rows = tl.trans(some_columns(gram, c, BB, BB))  # gram is symmetric, so its columns serve as its rows
            product = tl.dot(some_columns(wa, c, BK, BB), gram_rows, product, input_precision="ieee")
        up = gamma[:, None] * up - product - by_gamma[None, :] / D
        up_bias = gamma * up_bias - (tl.sum(wa * border[None, :], 1) + wa_bias * corner) - last_by_gamma / D
    tl.store(dpacked + up_at, up.to(kind), mask=up_ok)
    tl.store(dpacked + UP_BIAS + column, up_bias.to(kind), mask=column_ok)
    down = tl.trans(down)
    if PRE:
        wd = load_weight(packed, chunk, D, BW, BB, BK).to(tl.float32)
        pre_gamma = load_vector(packed + PRE_GAMMA, chunk, D, BK)
        pre_beta = load_vector(packed + PRE_GAMMA + D, chunk, D, BK)
        tl.store(dpacked + PRE_GAMMA + column, tl.sum(wd * down, 0).to(kind), mask=column_ok)
        tl.store(dpacked + PRE_GAMMA + D + column, tl.sum(wd * dz_sum[:, None], 0).to(kind), mask=column_ok)
        down = down * pre_gamma[None, :] + dz_sum[:, None] * pre_beta[None, :]
    tl.store(dpacked + j[:, None] * D + column[None, :], down.to(kind), mask=j_ok[:, None] & column_ok[None, :])
    if chunk == 0:
        tl.store(dpacked + DOWN_BIAS + j, dz_sum.to(kind), mask=j_ok)


def part_size(layout: AdapterLayout) -> int:
    """How many numbers the partial sums of one segment are: a multiple of 4, so that all are 16-byte aligned."""
    BB = padded(layout.b)
    size = (2 * layout.b + 2) * layout.d + BB * BB + 3 * BB + 2
    return size + -size % 4


def finish(
    part: Tensor, schedule: Schedule, packed: Tensor, mean: Tensor, layout: AdapterLayout, dpacked: Tensor
) -> None:
    """Launch ``finish_kernel`` once for all adapters of a stack.

    Args:
        part: [adapters, segments, SIZE] float32, from ``partial_sums`` with the same schedule for all adapters.
        schedule: the segments of the rows.
        packed: [adapters, T, P].
        mean: [adapters, T, b+1] float32, ``Folded.mean``; not read without a post-norm.
        layout: the layout of ``packed``.
        dpacked: [adapters, T, P] in packed's dtype, written in place.
    """
    at = {name: part.start for name, part in layout.slices.items()}
    tile = tiles.finish(layout.d, layout.b)
    launch(
        finish_kernel, (triton.cdiv(layout.d, tile.BK), schedule.T, packed.shape[0]),
        part, packed, mean, dpacked, schedule.table, schedule.T, schedule.segments,
        D=layout.d, BW=layout.b, P=layout.numel, SIZE=part_size(layout), DOWN_BIAS=at["down_bias"],
        UP=at["up_weight"], UP_BIAS=at["up_bias"], GAMMA=at.get("post_gamma", 0), PRE_GAMMA=at.get("pre_gamma", 0),
        PRE=layout.pre_norm, POST=layout.post_norm, MIXED=schedule.mixed, BB=padded(layout.b), BK=tile.BK,
        UNROLL=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
