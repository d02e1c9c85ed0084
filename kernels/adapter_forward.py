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
    UNALIGNED,
    activate,
    copy_or_nan,
    device_guard,
    load_last,
    load_rows,
    load_vector,
    load_weight,
    matmul_precision,
    normalised,
    padded,
    root_product,
    rounded,
    row_start,
    rows_of,
    settled,
    store_rows,
    task_of,
)
from .fragments import (
    as_product,
    as_rows,
    by_thread,
    left,
    lines,
    load_across,
    load_columns,
    load_right,
    load_tile,
    normalised_tile,
    of_rows,
    on_lines,
    store_tile,
    summed,
)
from .launch import launch


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
def _bottleneck(
    parts, VECTORS, SCALE, ROOT, kind: tl.constexpr, BW: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    POST: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Return the bottleneck z [BM, BB] with its bias and in the dtype ``kind``, the row operand w [BM, BB] of the
    up-projection and the post-norm's reciprocal standard deviation r [BM] (zero without a post-norm).

    ``parts`` is the product with the down-projection in float32: [C, BM, BB] to be summed if KEEP, otherwise [BM, BB].
    Pointers to the weights of one task: VECTORS, SCALE and ROOT as in ``adapter_forward_kernel``."""
    j = tl.arange(0, BB)
    # Load before the barriers of the sum what is needed after them.
    bias = tl.load(VECTORS + j, mask=j < BW, other=0.0)
    if POST:
        scale = tl.load(SCALE + j, mask=j < BW, other=0.0)
        column, end = load_last(ROOT, BW, BB)
    z = summed(parts) if KEEP else parts
    # Round z before the activation: the backward reads the rounded z, and both must compute the same h.
    z = (z + bias[None, :]).to(kind)
    h = settled(activate(z.to(tl.float32), ACT))
    r = tl.zeros((BM,), tl.float32)
    w = h
    if POST:
        q = root_product(h, ROOT, tl.zeros((BM, BB), tl.float32) + column[None, :], True, KEEP, BW, BM, BB)
        r = tl.rsqrt(tl.sum(q * q, 1) + end * end + EPS)
        # Apply SCALE in float32, before rounding: r h may exceed float16's range, the scaled row does not.
        w = h * scale[None, :] * r[:, None]
    return z, w.to(kind), r


@triton.jit
def _save(Z, R, z, r, flat, row_ok, BW: tl.constexpr, BB: tl.constexpr, POST: tl.constexpr):
    """Store z [BM, BB] and, if POST, r [BM] of the rows ``flat`` for the backward."""
    j = tl.arange(0, BB)
    tl.store(Z + flat[:, None] * BW + j[None, :], z, mask=row_ok[:, None] & (j < BW)[None, :])
    if POST:
        tl.store(R + flat, r, mask=row_ok)


@triton.jit
def _kept_statistics(
    kept, first, NK: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """Return the mean and the reciprocal standard deviation [BM/8, 8] of rows that are kept as NK tiles."""
    C: tl.constexpr = BK // 32
    total = tl.zeros((BM * C, 4), tl.float32)
    for k in tl.static_range(NK):
        total += by_thread(kept[k].to(tl.float32))
    mean = of_rows(total, BM) / D
    total = tl.zeros((BM * C, 4), tl.float32)
    squares = tl.zeros((BM * C, 4), tl.float32)
    for k in tl.static_range(NK):
        centred = normalised_tile(kept[k], on_lines(mean, C), 1.0, first, k, D, BK)
        total += by_thread(centred)
        squares += by_thread(centred * centred)
    # The mean was rounded: the second pass knows by how much.
    step = of_rows(total, BM) / D
    return mean + step, tl.rsqrt(of_rows(squares, BM) / D - step * step + EPS)


@triton.jit
def _kept_rows(
    X, OUT, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, sample, unit, M, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    SAVE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Apply the adapter to tile ``unit`` of BM rows, which stay in registers. Pointers to weights are those of the
    sample's task."""
    NK: tl.constexpr = (D + BK - 1) // BK
    C: tl.constexpr = BK // 32
    line, first = lines(BM, BK)
    line += unit * BM
    ok = line < M
    x_rows = X + row_start(sample, line, stride_sample, stride_row, ALIGN)
    kept = ()
    for k in tl.static_range(NK):
        kept = kept + (load_tile(x_rows, first, k, ok, D, BK),)
    if PRE:
        mean, rstd = _kept_statistics(kept, first, NK, D, BM, BK, EPS)
    parts = tl.zeros((C, BM, BB), tl.float32)
    for k in tl.static_range(NK):
        x = kept[k]
        if PRE:
            x = normalised_tile(x, on_lines(mean, C), on_lines(rstd, C), first, k, D, BK).to(x.dtype)
        parts = tl.dot(left(x, BM), load_right(WD, k, D, BW, BB, BK), parts, input_precision=PRECISION)
    # Load before the barriers of the bottleneck what is needed after them.
    up = load_across(WG, 0, D, BW, BB, BK)
    z, w, r = _bottleneck(parts, VECTORS, SCALE, ROOT, X.dtype.element_ty, BW, EPS, ACT, POST, True, BM, BB)
    w = tl.broadcast_to(w[None, :, :], (C, BM, BB))
    if POST:
        spread = on_lines(tl.reshape(r, (BM // 8, 8)), C)
    out_rows = OUT + (sample.to(tl.int64) * M + line) * D
    for k in tl.static_range(NK):
        if k > 0:
            up = load_across(WG, k, D, BW, BB, BK)
        y = load_columns(VECTORS + BW, k, BM, D, BK)
        if POST:
            y = spread * y + load_columns(VECTORS + BW + D, k, BM, D, BK)
        y = as_rows(tl.dot(w, up, as_product(y, BM), input_precision=PRECISION))
        store_tile(out_rows, first, kept[k].to(tl.float32) + y, k, ok, D, BK)
    if SAVE:
        row = unit * BM + tl.arange(0, BM)
        flat = sample.to(tl.int64) * M + row
        _save(Z, R, z, r, flat, row < M, BW, BB, POST)
        if PRE:
            tl.store(PRE_MEAN + flat, tl.reshape(mean, (BM,)), mask=row < M)
            tl.store(PRE_RSTD + flat, tl.reshape(rstd, (BM,)), mask=row < M)


@triton.jit
def _streamed_rows(
    X, OUT, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, sample, unit, M, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    SAVE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As ``_kept_rows``, but the rows are loaded again for the up-projection."""
    NK: tl.constexpr = (D + BK - 1) // BK
    row = unit * BM + tl.arange(0, BM)
    row_ok = row < M
    flat = sample.to(tl.int64) * M + row
    x_rows = X + row_start(sample, row, stride_sample, stride_row, ALIGN)
    if PRE:
        mean = tl.zeros((BM,), tl.float32)
        squares = tl.zeros((BM,), tl.float32)
        for k in range(NK):
            mean, squares = _merge_statistics(load_rows(x_rows, k, row_ok, D, BK), k, mean, squares, D, BK)
        rstd = tl.rsqrt(squares / D + EPS)
    z = tl.zeros((BM, BB), tl.float32)
    for k in range(NK):
        x = load_rows(x_rows, k, row_ok, D, BK)
        if PRE:
            x = normalised(x, mean, rstd, k, D, BK)
        down = rounded(load_weight(WD, k, D, BW, BB, BK), PRECISION)
        z = tl.dot(rounded(x, PRECISION), tl.trans(down), z, input_precision=PRECISION)
    z, w, r = _bottleneck(z, VECTORS, SCALE, ROOT, X.dtype.element_ty, BW, EPS, ACT, POST, False, BM, BB)
    out_rows = OUT + flat * D
    w = rounded(w, PRECISION)
    for k in range(NK):
        y = tl.dot(w, rounded(load_weight(WG, k, D, BW, BB, BK), PRECISION), input_precision=PRECISION)
        if POST:
            y += r[:, None] * load_vector(VECTORS + BW, k, D, BK)[None, :]
            y += load_vector(VECTORS + BW + D, k, D, BK)[None, :]
        else:
            y += load_vector(VECTORS + BW, k, D, BK)[None, :]
        store_rows(out_rows, load_rows(x_rows, k, row_ok, D, BK).to(tl.float32) + y, k, row_ok, D, BK)
    if SAVE:
        _save(Z, R, z, r, flat, row_ok, BW, BB, POST)
        if PRE:
            tl.store(PRE_MEAN + flat, mean, mask=row_ok)
            tl.store(PRE_RSTD + flat, rstd, mask=row_ok)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
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
    V: tl.constexpr = BW + 2 * D if POST else BW + D
    per_sample = (M + BM - 1) // BM
    sample = tl.program_id(0) // per_sample
    unit = tl.program_id(0) - sample * per_sample
    task, weights, valid = task_of(TASK, sample, T, MIXED)
    WD += weights * (BW * D)
    WG += weights * (BW * D)
    VECTORS += weights * V
    SCALE += weights * BW
    ROOT += weights * ((BW + 1) * (BW + 1))
    if not MIXED or valid:
        if KEEP:
            _kept_rows(
                X, OUT, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, sample, unit, M, stride_sample,
                stride_row, D, BW, EPS, ACT, PRE, POST, SAVE, ALIGN, PRECISION, BB, BM, BK,
            )  # fmt: skip
        else:
            _streamed_rows(
                X, OUT, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, sample, unit, M, stride_sample,
                stride_row, D, BW, EPS, ACT, PRE, POST, SAVE, ALIGN, PRECISION, BB, BM, BK,
            )  # fmt: skip
    else:
        row = unit * BM + tl.arange(0, BM)
        row_ok = row < M
        flat = sample.to(tl.int64) * M + row
        copy_or_nan(OUT + flat * D, X + row_start(sample, row, stride_sample, stride_row, ALIGN), task, row_ok, D, BK)
        if SAVE:
            absent = tl.where(task == -1, 0.0, float("nan"))
            nothing = tl.zeros((BM,), tl.float32) + absent
            z = tl.zeros((BM, BB), tl.float32) + absent
            _save(Z, R, z.to(Z.dtype.element_ty), nothing, flat, row_ok, BW, BB, POST)
            if PRE:
                tl.store(PRE_MEAN + flat, nothing, mask=row_ok)
                tl.store(PRE_RSTD + flat, nothing, mask=row_ok)


def adapter_forward(
    x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool,
    out: Tensor | None = None, saved: Saved | None = None,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """Launch ``adapter_forward_kernel``: ``reference.adapter_forward`` for x [..., d] in float32, bfloat16 or float16
    and any number T >= 0 of tasks. Nothing is read back from the device.

    Args:
        out: where to store the output; None is a new tensor.
        saved: where to store what the backward needs; None is new tensors.
    """
    d, b, pre, post = spec.layout.arguments
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    saved = Saved.empty(x, spec.layout, save) if saved is None else saved
    rows = rows_of(x, task_index)
    if rows.B == 0 or rows.M == 0:
        return out, saved
    wd, wg, vectors, scale, root = readable(folded)
    tile = tiles.forward(d, b, x.dtype, pre, tiles.architecture(x.device))
    with device_guard(x):
        launch(
            adapter_forward_kernel, (rows.B * triton.cdiv(rows.M, tile.BM),),
            rows.data, out, *saved, wd, wg, vectors, scale, root,
            None if task_index is None else task_index.contiguous(),
            rows.M, folded.wd.shape[0], rows.stride_sample, rows.stride_row,
            D=d, BW=b, EPS=EPS, ACT=ACTIVATIONS.index(spec.activation), PRE=pre, POST=post, SAVE=save,
            MIXED=task_index is not None, ALIGN=rows.align, PRECISION=matmul_precision(x.dtype),
            BB=padded(b), BM=tile.BM, BK=tile.BK, KEEP=tile.keep and tile.BK >= 32,
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
