"""The weight gradients of ``adapter_backward`` in Triton: partial sums over segments of the rows, then dpacked.

- ``schedule.py`` cuts the rows into segments, each of one task.
- ``weights_kernel`` sums over the rows of a segment. A program either sums BK columns of dz^T xhat, (r h~)^T g and
  sum g, or it computes the sums that have no side of length d: (m2 r h~)^T (r h~), (r h~)^T s and sum dz.
- ``finish.py`` adds the partial sums of each task's segments in order and composes the packed gradient.

The column mean that C subtracts from the up-projection's gradient (docs/design.md) needs no pass over d: because Wa is
centred, it is sum_n s_n (r h~)_n / d with s_n = g_n . gamma.

The partial sums of one segment are SIZE numbers in float32, in this order. The matrices of length d are transposed, so
that the columns which a program sums lie together:

    down [d, b]        xhat^T dz
    up [d, b]          g^T (r h)
    up_bias [d]        sum r g (sum g without a post-norm)
    g_sum [d]          sum g
    gram [BB, BB]      (m2 r h)^T (r h)     gram, border and corner are the parts of (m2 r h~)^T (r h~)
    border [BB]        sum m2 r^2 h
    by_gamma [BB]      sum s r h
    dz_sum [BB]        sum dz
    corner             sum m2 r^2
    last_by_gamma      sum s r
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import AdapterLayout, Folded, Saved
from .common import (
    LENGTHS,
    UNALIGNED,
    Rows,
    matmul_precision,
    normalised,
    padded,
    rounded,
)
from .finish import finish, part_size
from .launch import launch
from .schedule import Schedule, schedule

__all__ = ["Schedule", "finish", "part_size", "partial_sums", "schedule", "weight_gradients"]


@triton.jit
def _sample_at(ORDER, place, MIXED: tl.constexpr):
    """Return the sample at a place of the schedule's order, as int64."""
    return tl.load(ORDER + place).to(tl.int64) if MIXED else place.to(tl.int64)


@triton.jit
def _next_tile(place, tile, per_sample):
    """Return the place and tile of the unit after that of ``place`` and ``tile``."""
    end = tile + 1 == per_sample
    return tl.where(end, place + 1, place), tl.where(end, 0, tile + 1)


@triton.jit
def _summands(r, POST: tl.constexpr):
    """Return [BM, 16] in float32, whose product with g^T has sum r g in its columns 0 and 1, and sum g in column 2.

    r is split into two numbers that bfloat16 holds: one alone would have only 8 bits."""
    which = tl.arange(0, 16)[None, :]
    ones = tl.where(which == 2, 1.0, 0.0)
    if POST:
        high = r.to(tl.bfloat16).to(tl.float32)
        value = tl.where(which == 0, high[:, None], tl.where(which == 1, (r - high)[:, None], ones))
    else:
        value = tl.zeros_like(r)[:, None] + ones
    return value


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def weights_kernel(
    G, X, R, PRE_MEAN, PRE_RSTD, DZ, RH, M2, S, TABLE, PART,
    B, M, T, share, g_stride_sample, g_stride_row, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, SIZE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    MIXED: tl.constexpr, G_ALIGN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr, NARROW: tl.constexpr, WIDE_RANGE: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the partial sums of one segment. The grid is (segments * (NK + 1),): for each segment, NK programs sum BK
    columns each, and one more computes the sums without a side of length d.

    Pointers; "compute dtype" is the dtype of x (float32, bfloat16 or float16), everything is contiguous except G and X:
        G         [B, M, d]         compute dtype; gradient of the output, addressed by g_stride_sample and g_stride_row
        X         [B, M, d]         compute dtype; input of the forward, addressed by stride_sample and stride_row
        R         [N]               float32; the post-norm's reciprocal standard deviation (read if POST)
        PRE_MEAN  [N]               float32; the mean of each row of x (read if PRE)
        PRE_RSTD  [N]               float32; the reciprocal standard deviation of each row of x (read if PRE)
        DZ        [N, b]            compute dtype; the gradient of z, from ``rows_kernel``
        RH        [N, b]            compute dtype, but float32 for float16; r h, from ``rows_kernel``
        M2        [N]               float32; m2 of docs/design.md, from ``rows_kernel`` (read if POST)
        S         [N]               float32; g . gamma, from ``rows_kernel`` (read if POST)
        TABLE     [...]             int32; the schedule (None unless MIXED)
        PART      [segments, SIZE]  float32; output, the partial sums in the order listed at the top of this file

    B is the number of samples, M that of rows per sample, T that of tasks. A unit is a tile of BM rows of one sample;
    unless MIXED, a segment is ``share`` of them. The strides of G are in units of G_ALIGN elements, those of X in units
    of ALIGN. STAGES is how many units' loads are in flight. WIDE_RANGE multiplies r h and g in float32, because r h may
    leave float16's range. NARROW, for 16-bit x, sums the rows of g by tensor cores, too.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    SMALL: tl.constexpr = (2 * BW + 2) * D
    per_sample = (M + BM - 1) // BM
    chunk = tl.program_id(0) % (NK + 1)
    segment = tl.program_id(0) // (NK + 1)
    if MIXED:
        ORDER = TABLE + T + 1
        UNITS = ORDER + B + 2 * segment
        first = tl.load(UNITS)
        count = tl.load(UNITS + 1)
        if count == 0:  # the grid provides for more segments than this batch has
            return
        last = first + count
    else:
        ORDER = TABLE
        first = segment * share
        last = tl.minimum(first + share, B * per_sample)
    PART += segment.to(tl.int64) * SIZE
    j = tl.arange(0, BB)
    j_ok = (j < BW)[None, :]
    # Pointers advance by one scalar per unit; what differs between the rows of a tile stays in registers.
    lane = tl.arange(0, BM)
    small_at = lane[:, None] * BW + j[None, :]
    place = first // per_sample
    tile = first - place * per_sample
    sample = _sample_at(ORDER, place, MIXED)
    if chunk < NK:
        column = chunk * BK + tl.arange(0, BK)
        column_ok = column < D
        g_at = lane.to(tl.int64)[:, None] * g_stride_row * G_ALIGN + column[None, :]
        x_at = lane.to(tl.int64)[:, None] * stride_row * ALIGN + column[None, :]
        down = tl.zeros((BK, BB), tl.float32)
        up = tl.zeros((BK, BB), tl.float32)
        sums = tl.zeros((BK, 16) if NARROW else (BM, BK), tl.float32)
        sums_by_r = tl.zeros((BM, BK), tl.float32)
        for _ in tl.range(first, last, num_stages=STAGES):
            row = tile * BM
            flat = sample * M + row
            row_ok = lane < M - row
            wide_ok = row_ok[:, None] & column_ok[None, :] if D % BK else row_ok[:, None]
            small_ok = row_ok[:, None] & j_ok
            g = tl.load(
                G + (sample * g_stride_sample + row.to(tl.int64) * g_stride_row) * G_ALIGN + g_at,
                mask=wide_ok,
                other=0.0,
            )
            x = tl.load(
                X + (sample * stride_sample + row.to(tl.int64) * stride_row) * ALIGN + x_at, mask=wide_ok, other=0.0
            )
            dz = tl.load(DZ + flat * BW + small_at, mask=small_ok, other=0.0)
            rh = tl.load(RH + flat * BW + small_at, mask=small_ok, other=0.0)
            if PRE:
                mean = tl.load(PRE_MEAN + flat + lane, mask=row_ok, other=0.0)
                rstd = tl.load(PRE_RSTD + flat + lane, mask=row_ok, other=0.0)
                x = normalised(x, mean, rstd, chunk, D, BK)
            down = tl.dot(tl.trans(rounded(x, PRECISION)), rounded(dz, PRECISION), down, input_precision=PRECISION)
            # Converting before the transposition fails in Triton 3.6 for sm_100.
            g_t = tl.trans(g).to(tl.float32) if WIDE_RANGE else tl.trans(g)
            up = tl.dot(rounded(g_t, PRECISION), rounded(rh, PRECISION), up, input_precision=PRECISION)
            r = tl.load(R + flat + lane, mask=row_ok, other=0.0) if POST else tl.where(row_ok, 1.0, 0.0)
            if NARROW:
                sums = tl.dot(g_t, _summands(r, POST).to(g_t.dtype), sums, input_precision=PRECISION)
            else:
                sums += g
                sums_by_r += g * r[:, None]
            place, tile = _next_tile(place, tile, per_sample)
            sample = _sample_at(ORDER, place, MIXED)
        at = column[:, None] * BW + j[None, :]
        at_ok = column_ok[:, None] & j_ok
        tl.store(PART + at, down, mask=at_ok)
        tl.store(PART + BW * D + at, up, mask=at_ok)
        if NARROW:
            which = tl.arange(0, 16)[None, :]
            up_bias = tl.sum(tl.where(which < 2, sums, 0.0), 1)
            g_sum = tl.sum(tl.where(which == 2, sums, 0.0), 1)
        else:
            up_bias = tl.sum(sums_by_r, 0)
            g_sum = tl.sum(sums, 0)
        tl.store(PART + 2 * BW * D + column, up_bias if POST else g_sum, mask=column_ok)
        tl.store(PART + (2 * BW + 1) * D + column, g_sum, mask=column_ok)
    else:
        gram = tl.zeros((BB, BB), tl.float32)
        border = tl.zeros((BM, BB), tl.float32)
        by_gamma = tl.zeros((BM, BB), tl.float32)
        dz_sum = tl.zeros((BM, BB), tl.float32)
        corner = tl.zeros((BM, 1), tl.float32)
        last_by_gamma = tl.zeros((BM, 1), tl.float32)
        for _ in tl.range(first, last, num_stages=STAGES):
            row = tile * BM
            flat = sample * M + row
            row_ok = lane < M - row
            small_ok = row_ok[:, None] & j_ok
            dz_sum += tl.load(DZ + flat * BW + small_at, mask=small_ok, other=0.0).to(tl.float32)
            if POST:
                rh = tl.load(RH + flat * BW + small_at, mask=small_ok, other=0.0).to(tl.float32)
                r = tl.load(R + flat + lane[:, None], mask=row_ok[:, None], other=0.0)
                m2 = tl.load(M2 + flat + lane[:, None], mask=row_ok[:, None], other=0.0)
                s = tl.load(S + flat + lane[:, None], mask=row_ok[:, None], other=0.0)
                by_m2 = rounded(rh * m2, GRAM_PRECISION)
                right = rounded(rh, GRAM_PRECISION) if WIDE_RANGE else rh  # tf32 holds every bfloat16
                gram = tl.dot(tl.trans(by_m2), right, gram, input_precision=GRAM_PRECISION)
                border += rh * (m2 * r)
                by_gamma += rh * s
                corner += m2 * r * r
                last_by_gamma += s * r
            place, tile = _next_tile(place, tile, per_sample)
            sample = _sample_at(ORDER, place, MIXED)
        PART += SMALL
        tl.store(PART + j[:, None] * BB + j[None, :], gram)
        tl.store(PART + BB * BB + j, tl.sum(border, 0))
        tl.store(PART + BB * BB + BB + j, tl.sum(by_gamma, 0))
        tl.store(PART + BB * BB + 2 * BB + j, tl.sum(dz_sum, 0))
        tl.store(PART + BB * BB + 3 * BB, tl.sum(corner))
        tl.store(PART + BB * BB + 3 * BB + 1, tl.sum(last_by_gamma))


def partial_sums(
    g: Rows,
    x: Rows,
    saved: Saved,
    per_row: Sequence[Tensor],
    layout: AdapterLayout,
    schedule: Schedule,
    out: Tensor | None = None,
) -> Tensor:
    """Launch ``weights_kernel``, and return the partial sums [segments, SIZE] in float32.

    Args:
        g: the rows of the output's gradient.
        x: the rows of the forward's input.
        saved: what the forward saved.
        per_row: dz, r h, m2 and s = g . gamma of every row, as ``rows_kernel`` stored them. Rows of samples without a
            valid task are not read.
        layout: the layout of the adapters.
        schedule: the segments of the rows.
        out: where to store the partial sums; None is a new tensor.
    """
    d, b, dtype, tile = layout.d, layout.b, x.data.dtype, schedule.tile
    size = part_size(layout)
    if out is None:
        out = torch.empty(schedule.segments, size, dtype=torch.float32, device=x.data.device)
    # r h may overflow or underflow float16. With float16 inputs both operands are therefore converted to float32; tf32
    # products lose nothing there, because tf32 has float16's mantissa. The Gram matrix's left operand, m2 r h, is
    # rounded no more coarsely than r h itself was.
    narrow, wide_range = dtype.itemsize == 2, dtype == torch.float16
    tf32 = narrow and not torch.version.hip
    launch(
        weights_kernel, (schedule.segments * (triton.cdiv(d, tile.BK) + 1),),
        g.data, x.data, saved.r, saved.pre_mean, saved.pre_rstd, *per_row, schedule.table, out,
        x.B, x.M, schedule.T, schedule.share, g.stride_sample, g.stride_row, x.stride_sample, x.stride_row,
        D=d, BW=b, SIZE=size, PRE=layout.pre_norm, POST=layout.post_norm, MIXED=schedule.mixed,
        G_ALIGN=g.align, ALIGN=x.align, PRECISION="tf32" if tf32 and wide_range else matmul_precision(dtype),
        GRAM_PRECISION="tf32" if tf32 else "ieee", NARROW=narrow, WIDE_RANGE=wide_range,
        BB=padded(b), BM=tile.BM, BK=tile.BK, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def weight_gradients(
    g: Rows,
    x: Rows,
    saved: Saved,
    per_row: Sequence[Tensor],
    packed: Tensor,
    folded: Folded,
    layout: AdapterLayout,
    task_index: Tensor | None,
) -> Tensor:
    """Launch all kernels for one adapter and return dpacked [T, P] in packed's dtype.

    Args:
        g: the rows of the output's gradient.
        x: the rows of the forward's input.
        saved: what the forward saved.
        per_row: dz, r h, m2 and s = g . gamma of every row, as ``rows_kernel`` stored them.
        packed: [T, P], T >= 1.
        folded: the folded weights; only their mean is read.
        layout: the layout of ``packed``.
        task_index: [B] with several tasks in the batch, otherwise None.
    """
    segments = schedule(task_index, x.B, x.M, packed.shape[0], layout, x.data.dtype, x.data.device)
    part = partial_sums(g, x, saved, per_row, layout, segments)
    dpacked = torch.empty_like(packed)
    finish(part[None], segments, packed[None], folded.mean[None], layout, dpacked[None])
    return dpacked
