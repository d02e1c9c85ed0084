"""The weight gradients of ``adapter_backward`` in Triton: partial sums over fixed splits of the rows, then dpacked.

- ``weights_kernel`` sums over the rows of one task within one split. A program either sums BK columns of dz^T xhat,
  (r h~)^T g and sum g, or it computes the sums that have no side of length d: (m2 r h~)^T (r h~), (r h~)^T s and sum
  dz.
- ``finish_kernel`` adds the partial sums of all splits in order and composes the packed gradient.

A program skips the rows of other tasks, so the rows need neither be sorted nor counted by task, and the host need not
read ``task_index``. The column mean that C subtracts from the up-projection's gradient (docs/design.md) needs no pass
over d: because Wa is centred, it is sum_n s_n (r h~)_n / d with s_n = g_n . gamma.

The partial sums of one task in one split are SIZE numbers in float32, in this order:

    down [b, d]        dz^T xhat
    up [b, d]          (r h)^T g
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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import AdapterLayout, Folded, Saved
from . import tiles
from .common import (
    LENGTHS,
    Rows,
    activate,
    load_rows,
    load_vector,
    load_weight,
    matmul_precision,
    normalised,
    padded,
    row_start,
    rows_of_unit,
    some_columns,
)

#: How many programs the rows are split among: two waves on a GPU of 132 multiprocessors. More splits would only mean
#: more partial sums to add.
_PROGRAMS = 264


@triton.jit
def _row_operand(Z, R, flat, row_ok, BW: tl.constexpr, BB: tl.constexpr, ACT: tl.constexpr, POST: tl.constexpr):
    """Return r h [BM, BB] and r [BM] of the rows ``flat``, in float32; r is 1 without a post-norm. Rows that are not
    ``row_ok`` and columns beyond b are zero.

    Pointers: Z [N, b] in the compute dtype, the bottleneck before the activation; R [N] in float32, read if POST."""
    j = tl.arange(0, BB)
    ok = row_ok[:, None] & (j < BW)[None, :]
    h = activate(tl.load(Z + flat[:, None] * BW + j[None, :], mask=ok, other=0.0).to(tl.float32), ACT)
    r = tl.load(R + flat, mask=row_ok, other=0.0) if POST else tl.where(row_ok, 1.0, 0.0)
    return h * r[:, None], r


@triton.jit(do_not_specialize=LENGTHS)
def weights_kernel(
    G, X, Z, R, PRE_MEAN, PRE_RSTD, DZ, M2, S, TASK, PART,
    B, M, T, units_per_split, g_stride_sample, g_stride_row, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, SIZE: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    MIXED: tl.constexpr, G_ALIGN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WIDE_RANGE: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the partial sums of one task in one split. The grid is (splits * (NK + 1), T): for each split, NK
    programs sum BK columns each, and one more computes the sums without a side of length d.

    Pointers; "compute dtype" is the dtype of x (float32, bfloat16 or float16), everything is contiguous except G and X:
        G         [B, M, d]         compute dtype; gradient of the output, addressed by g_stride_sample and g_stride_row
        X         [B, M, d]         compute dtype; input of the forward, addressed by stride_sample and stride_row
        Z         [N, b]            compute dtype; the bottleneck before the activation
        R         [N]               float32; the post-norm's reciprocal standard deviation (read if POST)
        PRE_MEAN  [N]               float32; the mean of each row of x (read if PRE)
        PRE_RSTD  [N]               float32; the reciprocal standard deviation of each row of x (read if PRE)
        DZ        [N, b]            compute dtype; the gradient of Z, from ``rows_kernel``
        M2        [N]               float32; m2 of docs/design.md, from ``rows_kernel`` (read if POST)
        S         [N]               float32; g . gamma, from ``rows_kernel`` (read if POST)
        TASK      [B]               int32 or int64; the task of each sample (None unless MIXED)
        PART      [splits, T, SIZE] float32; output, the partial sums in the order listed at the top of this file

    B is the number of samples, M that of rows per sample, T that of tasks. A unit is a tile of BM rows of one sample; a
    split is ``units_per_split`` of them. The strides of G are in units of G_ALIGN elements, those of X in units of
    ALIGN. WIDE_RANGE multiplies r h and g in float32, because r h may leave float16's range.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    SMALL: tl.constexpr = (2 * BW + 2) * D
    chunk = tl.program_id(0) % (NK + 1)
    split = tl.program_id(0) // (NK + 1)
    task = tl.program_id(1)
    first = split * units_per_split
    last = tl.minimum(first + units_per_split, B * ((M + BM - 1) // BM))
    PART += (split.to(tl.int64) * T + task) * SIZE
    j = tl.arange(0, BB)
    if chunk < NK:
        column = chunk * BK + tl.arange(0, BK)
        column_ok = column < D
        down = tl.zeros((BB, BK), tl.float32)
        up = tl.zeros((BB, BK), tl.float32)
        up_bias = tl.zeros((BK,), tl.float32)
        g_sum = tl.zeros((BK,), tl.float32)
        for unit in range(first, last):
            sample, row, row_ok, flat = rows_of_unit(unit, M, BM)
            mine = tl.load(TASK + sample) == task if MIXED else True
            if mine:
                g = load_rows(G + row_start(sample, row, g_stride_sample, g_stride_row, G_ALIGN), chunk, row_ok, D, BK)
                x = load_rows(X + row_start(sample, row, stride_sample, stride_row, ALIGN), chunk, row_ok, D, BK)
                if PRE:
                    mean = tl.load(PRE_MEAN + flat, mask=row_ok, other=0.0)
                    rstd = tl.load(PRE_RSTD + flat, mask=row_ok, other=0.0)
                    x = normalised(x, mean, rstd, chunk, D, BK)
                dz = tl.load(DZ + flat[:, None] * BW + j[None, :], mask=row_ok[:, None] & (j < BW)[None, :], other=0.0)
                rh, r = _row_operand(Z, R, flat, row_ok, BW, BB, ACT, POST)
                wide = g.to(tl.float32)
                down = tl.dot(tl.trans(dz), x, down, input_precision=PRECISION)
                if WIDE_RANGE:
                    up = tl.dot(tl.trans(rh), wide, up, input_precision=PRECISION)
                else:
                    up = tl.dot(tl.trans(rh.to(g.dtype)), g, up, input_precision=PRECISION)
                if POST:
                    up_bias += tl.sum(wide * r[:, None], 0)
                g_sum += tl.sum(wide, 0)
        matrix_ok = (j < BW)[:, None] & column_ok[None, :]
        tl.store(PART + j[:, None] * D + column[None, :], down, mask=matrix_ok)
        tl.store(PART + BW * D + j[:, None] * D + column[None, :], up, mask=matrix_ok)
        tl.store(PART + 2 * BW * D + column, up_bias if POST else g_sum, mask=column_ok)
        tl.store(PART + (2 * BW + 1) * D + column, g_sum, mask=column_ok)
    else:
        gram = tl.zeros((BB, BB), tl.float32)
        border = tl.zeros((BB,), tl.float32)
        by_gamma = tl.zeros((BB,), tl.float32)
        dz_sum = tl.zeros((BB,), tl.float32)
        corner = tl.zeros((BM,), tl.float32)
        last_by_gamma = tl.zeros((BM,), tl.float32)
        for unit in range(first, last):
            sample, row, row_ok, flat = rows_of_unit(unit, M, BM)
            mine = tl.load(TASK + sample) == task if MIXED else True
            if mine:
                ok = row_ok[:, None] & (j < BW)[None, :]
                dz_sum += tl.sum(tl.load(DZ + flat[:, None] * BW + j[None, :], mask=ok, other=0.0).to(tl.float32), 0)
                if POST:
                    rh, r = _row_operand(Z, R, flat, row_ok, BW, BB, ACT, POST)
                    m2 = tl.load(M2 + flat, mask=row_ok, other=0.0)
                    s = tl.load(S + flat, mask=row_ok, other=0.0)
                    gram = tl.dot(tl.trans(rh * m2[:, None]), rh, gram, input_precision="ieee")
                    border += tl.sum(rh * (m2 * r)[:, None], 0)
                    by_gamma += tl.sum(rh * s[:, None], 0)
                    corner += m2 * r * r
                    last_by_gamma += s * r
        PART += SMALL
        tl.store(PART + j[:, None] * BB + j[None, :], gram)
        tl.store(PART + BB * BB + j, border)
        tl.store(PART + BB * BB + BB + j, by_gamma)
        tl.store(PART + BB * BB + 2 * BB + j, dz_sum)
        tl.store(PART + BB * BB + 3 * BB, tl.sum(corner, 0))
        tl.store(PART + BB * BB + 3 * BB + 1, tl.sum(last_by_gamma, 0))


@triton.jit(do_not_specialize=LENGTHS)
def finish_kernel(
    PART, PACKED, MEAN, DPACKED, T, splits,
    D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr, DOWN_BIAS: tl.constexpr,
    UP: tl.constexpr, UP_BIAS: tl.constexpr, GAMMA: tl.constexpr, PRE_GAMMA: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of BK columns of one task, and store that part of dpacked. The grid is (NK, T).

    Pointers, all contiguous:
        PART     [splits, T, SIZE]  float32; the partial sums from ``weights_kernel``
        PACKED   [T, P]             float32, bfloat16 or float16; the packed adapters
        MEAN     [T, b+1]           float32; the column means of [W_u | b_u], from the fold (read if POST)
        DPACKED  [T, P]             PACKED's dtype; output, the gradient of PACKED

    T is the number of tasks, ``splits`` the number of partial sums to add. DOWN_BIAS, UP, UP_BIAS, GAMMA and PRE_GAMMA
    are the offsets of the parts within a packed adapter; the down-projection is at offset 0, and each norm's beta
    follows its gamma.
    """
    SMALL: tl.constexpr = (2 * BW + 2) * D
    chunk = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BB)
    j_ok = j < BW
    column = chunk * BK + tl.arange(0, BK)
    column_ok = column < D
    down = tl.zeros((BB, BK), tl.float32)
    up = tl.zeros((BK, BB), tl.float32)
    up_bias = tl.zeros((BK,), tl.float32)
    g_sum = tl.zeros((BK,), tl.float32)
    gram = tl.zeros((BB, BB), tl.float32)
    border = tl.zeros((BB,), tl.float32)
    by_gamma = tl.zeros((BB,), tl.float32)
    dz_sum = tl.zeros((BB,), tl.float32)
    corner = tl.zeros((), tl.float32)
    last_by_gamma = tl.zeros((), tl.float32)
    for s in range(splits):
        part = PART + (task + s * T) * SIZE
        down += load_weight(part, chunk, D, BW, BB, BK)
        up += tl.load(
            part + BW * D + j[None, :] * D + column[:, None], mask=column_ok[:, None] & j_ok[None, :], other=0.0
        )
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

    packed = PACKED + task * P
    dpacked = DPACKED + task * P
    kind = DPACKED.dtype.element_ty
    up_at = UP + column[:, None] * BW + j[None, :]
    up_ok = column_ok[:, None] & j_ok[None, :]
    if POST:
        mean = MEAN + task * (BW + 1)
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


def weight_gradients(
    g: Rows,
    x: Rows,
    saved: Saved,
    per_row: tuple[Tensor, Tensor, Tensor, Tensor],
    packed: Tensor,
    folded: Folded,
    layout: AdapterLayout,
    act: int,
    task_index: Tensor | None,
) -> Tensor:
    """Launch both kernels and return dpacked [T, P] in packed's dtype.

    Args:
        g: the rows of the output's gradient.
        x: the rows of the forward's input.
        saved: what the forward saved.
        per_row: dz, r h, m2 and s = g . gamma of every row, as ``rows_kernel`` stored them.
        packed: [T, P], T >= 1.
        folded: the folded weights; only their mean is read.
        layout: the layout of ``packed``.
        act: index of the activation in ``activations.ACTIVATIONS``.
        task_index: [B] with several tasks in the batch, otherwise None.
    """
    d, b, pre, post, T = layout.d, layout.b, layout.pre_norm, layout.post_norm, packed.shape[0]
    BB, dtype, at = padded(b), x.data.dtype, {name: part.start for name, part in layout.slices.items()}
    dz, _, m2, s = per_row
    tile = tiles.weights(d, b, dtype, pre, tiles.architecture(packed.device))
    chunks = triton.cdiv(d, tile.BK)
    units = x.B * triton.cdiv(x.M, tile.BM)
    splits = max(1, min(triton.cdiv(units, 4), _PROGRAMS // ((chunks + 1) * T)))
    units_per_split = triton.cdiv(units, splits)
    splits = triton.cdiv(units, units_per_split)
    size = (2 * b + 2) * d + BB * BB + 3 * BB + 2
    size += -size % 4  # keeps the sums of every task and split 16-byte aligned
    part = torch.empty(splits, T, size, dtype=torch.float32, device=packed.device)
    dpacked = torch.empty_like(packed)
    # r h may overflow or underflow float16. With float16 inputs both operands are therefore converted to float32; tf32
    # products lose nothing there, because tf32 has float16's mantissa.
    wide_range = dtype == torch.float16
    precision = "tf32" if wide_range and not torch.version.hip else matmul_precision(dtype)
    common = {"D": d, "BW": b, "SIZE": size, "PRE": pre, "POST": post, "BB": BB}
    weights_kernel[(splits * (chunks + 1), T)](
        g.data, x.data, saved.z, saved.r, saved.pre_mean, saved.pre_rstd, dz, m2, s, task_index, part,
        x.B, x.M, T, units_per_split, g.stride_sample, g.stride_row, x.stride_sample, x.stride_row,
        ACT=act, MIXED=task_index is not None, G_ALIGN=g.align, ALIGN=x.align, PRECISION=precision,
        WIDE_RANGE=wide_range, BM=tile.BM, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip
    tile = tiles.finish(d, b)
    finish_kernel[(triton.cdiv(d, tile.BK), T)](
        part, packed, folded.mean, dpacked, T, splits,
        P=layout.numel, DOWN_BIAS=at["down_bias"], UP=at["up_weight"], UP_BIAS=at["up_bias"],
        GAMMA=at.get("post_gamma", 0), PRE_GAMMA=at.get("pre_gamma", 0),
        BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip
    return dpacked
