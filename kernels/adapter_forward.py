"""``adapter_forward`` in Triton: each program handles BM rows of one sample (docs/design.md has the formulas).

x is read from memory once. If a tile of whole rows fits in registers (KEEP), it stays there between the two
projections; a wider tile is read again for the second one, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..layout import EPS, AdapterSpec, Folded, Saved
from . import tiles
from .common import (
    LENGTHS,
    activate,
    device_guard,
    load_rows,
    load_vector,
    load_weight,
    matmul_precision,
    normalised,
    padded,
    root_rows,
    row_start,
    rows_of,
    rows_of_unit,
    store_sum,
    task_of,
)


@triton.jit
def _merge_statistics(x, k, mean, squares, D: tl.constexpr, BK: tl.constexpr):
    """Update the mean and the sum of squared deviations [BM] of columns 0 to k*BK with the columns of ``x``, which are
    k*BK to (k+1)*BK (the pairwise update of Chan, Golub and LeVeque, 1983)."""
    column = k * BK + tl.arange(0, BK)
    seen = k * BK
    count = tl.minimum(D - seen, BK)
    x = x.to(tl.float32)
    chunk_mean = tl.sum(x, 1) / count
    centred = x - chunk_mean[:, None]
    if D % BK:
        centred = tl.where((column < D)[None, :], centred, 0.0)
    step = chunk_mean - mean
    share = count / (seen + count)
    squares += tl.sum(centred * centred, 1) + step * step * (seen * share)
    return mean + step * share, squares


@triton.jit
def _branch(w, r, WG, GB, BETA, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
            POST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Return what the adapter adds to columns k*BK to (k+1)*BK of x, as [BM, BK] in float32.

    ``w`` [BM, BB] is the row operand of the up-projection and ``r`` [BM] the post-norm's reciprocal standard deviation.
    Pointers to the weights of one task: WG [b, d], GB [d] the bias, BETA [d] the post-norm's beta (read only if
    POST)."""
    y = tl.dot(w, load_weight(WG, k, D, BW, BB, BK), input_precision=PRECISION)
    if POST:
        y += r[:, None] * load_vector(GB, k, D, BK)[None, :] + load_vector(BETA, k, D, BK)[None, :]
    else:
        y += load_vector(GB, k, D, BK)[None, :]
    return y


@triton.jit(do_not_specialize=LENGTHS)
def adapter_forward_kernel(
    X, OUT, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, TASK, M, T, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    SAVE: tl.constexpr, MIXED: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Apply the adapter to BM rows of one sample. The grid is B times M / BM rounded up.

    Pointers; "compute dtype" is the dtype of x (float32, bfloat16 or float16), everything is contiguous except X:
        X         [B, M, d]       compute dtype; input rows, addressed by stride_sample and stride_row
        OUT       [N, d]          compute dtype; output, x plus the adapter's branch
        Z         [N, b]          compute dtype; output, the bottleneck before the activation (written if SAVE)
        R         [N]             float32; output, the post-norm's reciprocal standard deviation (SAVE and POST)
        PRE_MEAN  [N]             float32; output, the mean of each row of x (SAVE and PRE)
        PRE_RSTD  [N]             float32; output, the reciprocal standard deviation of each row of x (SAVE and PRE)
        WD        [T, b, d]       compute dtype; down-projection, times the pre-norm's gamma
        WG        [T, b, d]       compute dtype; up-projection transposed; if POST centred, times gamma, over SCALE
        VECTORS   [T, V]          float32; per task the folded down bias [b] and up bias [d], and if POST beta [d]
        SCALE     [T, b]          float32; powers of two, one per row of WG (read if POST)
        ROOT      [T, b+1, b+1]   float32; R of ``Folded.root`` (read if POST)
        TASK      [B]             int32 or int64; the task of each sample, -1 for none (None unless MIXED)

    M is the number of rows per sample, T the number of tasks; the strides of X are in units of ALIGN elements.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    V: tl.constexpr = BW + 2 * D if POST else BW + D
    sample, row, row_ok, flat = rows_of_unit(tl.program_id(0), M, BM)
    task, weights, valid = task_of(TASK, sample, T, MIXED)
    x_rows = X + row_start(sample, row, stride_sample, stride_row, ALIGN)
    WD += weights * (BW * D)
    WG += weights * (BW * D)
    VECTORS += weights * V
    j = tl.arange(0, BB)

    kept = ()
    if PRE:
        mean = tl.zeros((BM,), tl.float32)
        squares = tl.zeros((BM,), tl.float32)
        if KEEP:
            for k in tl.static_range(NK):
                x = load_rows(x_rows, k, row_ok, D, BK)
                kept = kept + (x,)
                mean, squares = _merge_statistics(x, k, mean, squares, D, BK)
        else:
            for k in range(NK):
                x = load_rows(x_rows, k, row_ok, D, BK)
                mean, squares = _merge_statistics(x, k, mean, squares, D, BK)
        rstd = tl.rsqrt(squares / D + EPS)

    z = tl.zeros((BM, BB), tl.float32)
    if KEEP:
        for k in tl.static_range(NK):
            if PRE:
                x = normalised(kept[k], mean, rstd, k, D, BK)
            else:
                x = load_rows(x_rows, k, row_ok, D, BK)
                kept = kept + (x,)
            z = tl.dot(x, tl.trans(load_weight(WD, k, D, BW, BB, BK)), z, input_precision=PRECISION)
    else:
        for k in range(NK):
            x = load_rows(x_rows, k, row_ok, D, BK)
            if PRE:
                x = normalised(x, mean, rstd, k, D, BK)
            z = tl.dot(x, tl.trans(load_weight(WD, k, D, BW, BB, BK)), z, input_precision=PRECISION)
    z += tl.load(VECTORS + j, mask=j < BW, other=0.0)[None, :]
    # Round z before the activation: the backward reads the rounded z, and both must compute the same h.
    z = z.to(X.dtype.element_ty)
    h = activate(z.to(tl.float32), ACT)
    r = tl.zeros((BM,), tl.float32)
    w = h
    if POST:
        q, last = root_rows(h, ROOT + weights * ((BW + 1) * (BW + 1)), BW, BM, BB)
        r = tl.rsqrt(tl.sum(q * q, 1) + last * last + EPS)
        # Apply SCALE in float32, before rounding: r h may exceed float16's range, the scaled row does not.
        w = h * tl.load(SCALE + weights * BW + j, mask=j < BW, other=0.0)[None, :] * r[:, None]
    w = w.to(X.dtype.element_ty)

    out_rows = OUT + flat * D
    if KEEP:
        for k in tl.static_range(NK):
            y = _branch(w, r, WG, VECTORS + BW, VECTORS + BW + D, k, D, BW, BB, BK, POST, PRECISION)
            store_sum(out_rows, kept[k], y, k, row_ok, task, valid, D, BK, MIXED)
    else:
        for k in range(NK):
            y = _branch(w, r, WG, VECTORS + BW, VECTORS + BW + D, k, D, BW, BB, BK, POST, PRECISION)
            x = load_rows(x_rows, k, row_ok, D, BK)
            store_sum(out_rows, x, y, k, row_ok, task, valid, D, BK, MIXED)

    if SAVE:
        absent = tl.where(task == -1, 0.0, float("nan"))
        if MIXED:
            z = tl.where(valid, z, absent.to(z.dtype))
        tl.store(Z + flat[:, None] * BW + j[None, :], z, mask=row_ok[:, None] & (j < BW)[None, :])
        if POST:
            tl.store(R + flat, tl.where(valid, r, absent), mask=row_ok)
        if PRE:
            tl.store(PRE_MEAN + flat, tl.where(valid, mean, absent), mask=row_ok)
            tl.store(PRE_RSTD + flat, tl.where(valid, rstd, absent), mask=row_ok)


def adapter_forward(
    x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool
) -> tuple[Tensor, Saved]:
    """Launch ``adapter_forward_kernel``: ``reference.adapter_forward`` for x [..., d] in float32, bfloat16 or float16
    and any number T >= 0 of tasks. Nothing is read back from the device."""
    d, b, pre, post = spec.layout.arguments
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = Saved.empty(x, spec.layout, save)
    rows = rows_of(x, task_index)
    if rows.B == 0 or rows.M == 0:
        return out, saved
    wd, wg, vectors, scale, root = readable(folded)
    tile = tiles.forward(d, b, x.dtype, pre, tiles.architecture(x.device))
    with device_guard(x):
        adapter_forward_kernel[(rows.B * triton.cdiv(rows.M, tile.BM),)](
            rows.data, out, *saved, wd, wg, vectors, scale, root, task_index,
            rows.M, folded.wd.shape[0], rows.stride_sample, rows.stride_row,
            D=d, BW=b, EPS=EPS, ACT=ACTIVATIONS.index(spec.activation), PRE=pre, POST=post, SAVE=save,
            MIXED=task_index is not None, ALIGN=rows.align, PRECISION=matmul_precision(x.dtype),
            BB=padded(b), BM=tile.BM, BK=tile.BK, KEEP=tile.keep,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, saved


def readable(folded: Folded) -> tuple[Tensor, ...]:
    """Return wd, wg, vectors, scale and root as the kernels read them: contiguous, and all but wd and wg in float32.

    There is at least one task's worth, zeros if T = 0: a sample whose task is out of range reads the weights of task 0
    before its results are discarded."""
    parts = folded[:5] if folded.wd.shape[0] else [part.new_zeros(1, *part.shape[1:]) for part in folded[:5]]
    weights, exact = parts[:2], parts[2:]
    return *(part.contiguous() for part in weights), *(part.float().contiguous() for part in exact)
