"""``adapter_backward`` in Triton, in three launches (docs/design.md has the formulas).

``rows_kernel`` in this file computes dx, with one program for BM rows of one sample. It also stores dz, r h, m2 and
s = g . gamma of each row, from which the two kernels of ``weight_gradients.py`` sum the gradients of the weights. No
kernel adds with atomics, so two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..layout import AdapterLayout, AdapterSpec, Folded, Saved, TensorSpec
from . import tiles
from .adapter_forward import readable
from .common import (
    LENGTHS,
    UNALIGNED,
    Rows,
    activate,
    activate_grad,
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
    two_of_rows,
)
from .launch import launch
from .weight_gradients import weight_gradients


@triton.jit
def _through_root(
    Z, R, ROOT, RH, flat, row_ok, BW: tl.constexpr, ACT: tl.constexpr, POST: tl.constexpr, NEED_SUMS: tl.constexpr,
    KEEP: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Do what needs no g for the rows ``flat``: return R^T R [h ; 1] without its last entry, as [BM, BB] (zeros without
    a post-norm), and store r h (if NEED_SUMS).

    Pointers as in ``rows_kernel``; those to weights are those of the rows' task."""
    j = tl.arange(0, BB)
    at = flat[:, None] * BW + j[None, :]
    at_ok = row_ok[:, None] & (j < BW)[None, :]
    h = settled(activate(tl.load(Z + at, mask=at_ok, other=0.0).to(tl.float32), ACT))
    u = tl.zeros((BM, BB), tl.float32)
    rh = h
    if POST:
        column, _ = load_last(ROOT, BW, BB)
        q = root_product(h, ROOT, u + column[None, :], True, KEEP, BW, BM, BB)
        u = root_product(q, ROOT, u, False, KEEP, BW, BM, BB)
        rh = h * tl.load(R + flat, mask=row_ok, other=0.0)[:, None]
    if NEED_SUMS:
        tl.store(RH + at, rh.to(RH.dtype.element_ty), mask=at_ok)
    return u


@triton.jit
def _bottleneck(
    t, u, along_bias, Z, R, SCALE, DZ, M2, flat, row_ok, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr,
    ACT: tl.constexpr, POST: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """Return dz [BM, BB] in z's dtype, from t = g Wg^T [BM, BB], u of ``_through_root`` and ``along_bias`` = g . bias
    [BM]. Also store it and, if POST, m2 (if NEED_SUMS)."""
    j = tl.arange(0, BB)
    at = flat[:, None] * BW + j[None, :]
    at_ok = row_ok[:, None] & (j < BW)[None, :]
    # z is loaded again rather than kept, as the kernel has no register to spare.
    z = tl.load(Z + at, mask=at_ok, other=0.0).to(tl.float32)
    dh = t
    if POST:
        r = tl.load(R + flat, mask=row_ok, other=0.0)
        t = t * tl.load(SCALE + j, mask=j < BW, other=0.0)[None, :]
        m2 = (tl.sum(t * activate(z, ACT), 1) + along_bias) * r / D
        dh = r[:, None] * (t - (m2 * D * r)[:, None] * u)
        if NEED_SUMS:
            tl.store(M2 + flat, m2, mask=row_ok)
    dz = (dh * activate_grad(z, ACT)).to(Z.dtype.element_ty)
    if NEED_SUMS:
        tl.store(DZ + at, dz, mask=at_ok)
    return dz


@triton.jit
def _kept_rows(
    G, X, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, GAMMA, DX, DZ, RH, M2, S, sample, unit, M,
    g_stride_sample, g_stride_row, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, G_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the results of tile ``unit`` of BM rows; g stays in registers. Pointers to weights are those of the
    sample's task, and GAMMA points to the post-norm's gamma."""
    NK: tl.constexpr = (D + BK - 1) // BK
    C: tl.constexpr = BK // 32
    line, first = lines(BM, BK)
    line += unit * BM
    ok = line < M
    row = unit * BM + tl.arange(0, BM)
    row_ok = row < M
    flat = sample.to(tl.int64) * M + row
    g_rows = G + row_start(sample, line, g_stride_sample, g_stride_row, G_ALIGN)
    kept = ()
    for k in tl.static_range(NK):
        kept = kept + (load_tile(g_rows, first, k, ok, D, BK),)
    # While g is on its way:
    u = _through_root(Z, R, ROOT, RH, flat, row_ok, BW, ACT, POST, NEED_SUMS, True, BM, BB)
    t = tl.zeros((C, BM, BB), tl.float32)
    for k in tl.static_range(NK):
        t = tl.dot(left(kept[k], BM), load_right(WG, k, D, BW, BB, BK), t, input_precision=PRECISION)
    t = summed(t)
    along_bias = tl.zeros((BM,), tl.float32)
    if POST:
        # After the barriers of the sum: together the two would take too many registers.
        by_bias = tl.zeros((BM * C, 4), tl.float32)
        by_gamma = tl.zeros((BM * C, 4), tl.float32)
        for k in tl.static_range(NK):
            g = kept[k].to(tl.float32)
            by_bias += by_thread(g * load_columns(VECTORS + BW, k, BM, D, BK))
            if NEED_SUMS:
                by_gamma += by_thread(g * load_columns(GAMMA, k, BM, D, BK))
            tl.debug_barrier()  # keeps ptxas from loading all tiles at once, which spills
        along_bias, along_gamma = two_of_rows(by_bias, by_gamma, BM)
        if NEED_SUMS:
            tl.store(S + flat, along_gamma, mask=row_ok)
    if NEED_DX:
        # Load before the barriers of the bottleneck what is needed after them.
        down = load_across(WD, 0, D, BW, BB, BK)
    dz = _bottleneck(t, u, along_bias, Z, R, SCALE, DZ, M2, flat, row_ok, D, BW, BB, ACT, POST, NEED_SUMS)
    if NEED_DX:
        dz = tl.broadcast_to(dz[None, :, :], (C, BM, BB))
        dx_rows = DX + (sample.to(tl.int64) * M + line) * D
        if PRE:
            x_rows = X + row_start(sample, line, stride_sample, stride_row, ALIGN)
            at = sample.to(tl.int64) * M + line
            mean = tl.load(PRE_MEAN + at, mask=ok, other=0.0)[:, None]
            rstd = tl.load(PRE_RSTD + at, mask=ok, other=0.0)[:, None]
            total = tl.zeros((BM * C, 4), tl.float32)
            along = tl.zeros((BM * C, 4), tl.float32)
            for k in tl.static_range(NK):
                branch = as_rows(tl.dot(dz, load_across(WD, k, D, BW, BB, BK), input_precision=PRECISION))
                xhat = normalised_tile(load_tile(x_rows, first, k, ok, D, BK), mean, rstd, first, k, D, BK)
                total += by_thread(branch)
                along += by_thread(branch * xhat)
            total = on_lines(of_rows(total, BM) / D, C)
            along = on_lines(of_rows(along, BM) / D, C)
        for k in tl.static_range(NK):
            branch = as_rows(tl.dot(dz, down, input_precision=PRECISION))
            if k + 1 < NK:
                down = load_across(WD, k + 1, D, BW, BB, BK)
            if PRE:
                xhat = normalised_tile(load_tile(x_rows, first, k, ok, D, BK), mean, rstd, first, k, D, BK)
                branch = rstd * (branch - total - xhat * along)
            store_tile(dx_rows, first, kept[k].to(tl.float32) + branch, k, ok, D, BK)
            tl.debug_barrier()  # keeps ptxas from loading all tiles at once, which spills


@triton.jit
def _streamed_rows(
    G, X, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, GAMMA, DX, DZ, RH, M2, S, sample, unit, M,
    g_stride_sample, g_stride_row, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, ACT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, G_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As ``_kept_rows``, but g is loaded again for dx."""
    NK: tl.constexpr = (D + BK - 1) // BK
    row = unit * BM + tl.arange(0, BM)
    row_ok = row < M
    flat = sample.to(tl.int64) * M + row
    g_rows = G + row_start(sample, row, g_stride_sample, g_stride_row, G_ALIGN)
    t = tl.zeros((BM, BB), tl.float32)
    along_bias = tl.zeros((BM,), tl.float32)
    along_gamma = tl.zeros((BM,), tl.float32)
    for k in range(NK):
        g = load_rows(g_rows, k, row_ok, D, BK)
        up = rounded(load_weight(WG, k, D, BW, BB, BK), PRECISION)
        t = tl.dot(rounded(g, PRECISION), tl.trans(up), t, input_precision=PRECISION)
        if POST:
            wide = g.to(tl.float32)
            along_bias += tl.sum(wide * load_vector(VECTORS + BW, k, D, BK)[None, :], 1)
            if NEED_SUMS:
                along_gamma += tl.sum(wide * load_vector(GAMMA, k, D, BK)[None, :], 1)
    u = _through_root(Z, R, ROOT, RH, flat, row_ok, BW, ACT, POST, NEED_SUMS, False, BM, BB)
    dz = _bottleneck(t, u, along_bias, Z, R, SCALE, DZ, M2, flat, row_ok, D, BW, BB, ACT, POST, NEED_SUMS)
    if NEED_SUMS and POST:
        tl.store(S + flat, along_gamma, mask=row_ok)
    if NEED_DX:
        dz = rounded(dz, PRECISION)
        dx_rows = DX + flat * D
        if PRE:
            x_rows = X + row_start(sample, row, stride_sample, stride_row, ALIGN)
            mean = tl.load(PRE_MEAN + flat, mask=row_ok, other=0.0)
            rstd = tl.load(PRE_RSTD + flat, mask=row_ok, other=0.0)
            total = tl.zeros((BM,), tl.float32)
            along = tl.zeros((BM,), tl.float32)
            for k in range(NK):
                down = rounded(load_weight(WD, k, D, BW, BB, BK), PRECISION)
                branch = tl.dot(dz, down, input_precision=PRECISION)
                xhat = normalised(load_rows(x_rows, k, row_ok, D, BK).to(tl.float32), mean, rstd, k, D, BK)
                total += tl.sum(branch, 1)
                along += tl.sum(branch * xhat, 1)
            total, along = total / D, along / D
        for k in range(NK):
            down = rounded(load_weight(WD, k, D, BW, BB, BK), PRECISION)
            branch = tl.dot(dz, down, input_precision=PRECISION)
            if PRE:
                xhat = normalised(load_rows(x_rows, k, row_ok, D, BK).to(tl.float32), mean, rstd, k, D, BK)
                branch = rstd[:, None] * (branch - total[:, None] - xhat * along[:, None])
            store_rows(dx_rows, load_rows(g_rows, k, row_ok, D, BK).to(tl.float32) + branch, k, row_ok, D, BK)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def rows_kernel(
    G, X, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, PACKED, TASK, DX, DZ, RH, M2, S,
    M, T, g_stride_sample, g_stride_row, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, GAMMA_AT: tl.constexpr, ACT: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, MIXED: tl.constexpr,
    G_ALIGN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute dx, dz, m2 and s of BM rows of one sample. The grid is B times M / BM rounded up.

    Pointers; "compute dtype" is the dtype of x (float32, bfloat16 or float16), everything is contiguous except G and X:
        G         [B, M, d]       compute dtype; gradient of the output, addressed by g_stride_sample and g_stride_row
        X         [B, M, d]       compute dtype; input of the forward, addressed by stride_sample and stride_row
        Z         [N, b]          compute dtype; the bottleneck before the activation, saved by the forward
        R         [N]             float32; the post-norm's reciprocal standard deviation (read if POST)
        PRE_MEAN  [N]             float32; the mean of each row of x (read if PRE)
        PRE_RSTD  [N]             float32; the reciprocal standard deviation of each row of x (read if PRE)
        WD        [T, b, d]       compute dtype; down-projection, times the pre-norm's gamma
        WG        [T, b, d]       compute dtype; up-projection transposed; if POST centred, times gamma, over SCALE
        VECTORS   [T, V]          float32; per task the folded down bias [b] and up bias [d], and if POST beta [d]
        SCALE     [T, b]          float32; powers of two, one per row of WG (read if POST)
        ROOT      [T, b+1, b+1]   float32; R of ``Folded.root`` (read if POST)
        PACKED    [T, P]          any of the three dtypes; gamma is read from it (if POST and NEED_SUMS)
        TASK      [B]             int32 or int64; the task of each sample, -1 for none (None unless MIXED)
        DX        [N, d]          compute dtype; output, the gradient of x (written if NEED_DX)
        DZ        [N, b]          compute dtype; output, the gradient of Z (written if NEED_SUMS)
        RH        [N, b]          compute dtype, but float32 for float16, whose range r h may leave; output, r h, or h
                                  without a post-norm (written if NEED_SUMS)
        M2        [N]             float32; output, m2 of docs/design.md (written if NEED_SUMS and POST)
        S         [N]             float32; output, g . gamma (written if NEED_SUMS and POST)

    M is the number of rows per sample, T the number of tasks; the strides of G are in units of G_ALIGN elements, those
    of X in units of ALIGN. GAMMA_AT is where the post-norm's gamma starts in a packed adapter.
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
    GAMMA = PACKED + weights * P + GAMMA_AT
    if not MIXED or valid:
        if KEEP:
            _kept_rows(
                G, X, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, GAMMA, DX, DZ, RH, M2, S, sample, unit, M,
                g_stride_sample, g_stride_row, stride_sample, stride_row, D, BW, ACT, PRE, POST, NEED_DX, NEED_SUMS,
                G_ALIGN, ALIGN, PRECISION, BB, BM, BK,
            )  # fmt: skip
        else:
            _streamed_rows(
                G, X, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, GAMMA, DX, DZ, RH, M2, S, sample, unit, M,
                g_stride_sample, g_stride_row, stride_sample, stride_row, D, BW, ACT, PRE, POST, NEED_DX, NEED_SUMS,
                G_ALIGN, ALIGN, PRECISION, BB, BM, BK,
            )  # fmt: skip
    elif NEED_DX:
        row = unit * BM + tl.arange(0, BM)
        g_rows = G + row_start(sample, row, g_stride_sample, g_stride_row, G_ALIGN)
        copy_or_nan(DX + (sample.to(tl.int64) * M + row) * D, g_rows, task, row < M, D, BK)


def per_row_table(layout: AdapterLayout, N: int, dtype: torch.dtype) -> list[TensorSpec]:
    """Shape and dtype of what ``rows_kernel`` stores of N rows of ``dtype`` for the weight gradients: dz, r h, m2 and
    s."""
    wide = torch.float32 if dtype == torch.float16 else dtype  # r h may leave float16's range
    sums = TensorSpec((N if layout.post_norm else 0,), torch.float32)
    return [TensorSpec((N, layout.b), dtype), TensorSpec((N, layout.b), wide), sums, sums]


def row_gradients(
    g: Rows,
    x: Rows,
    saved: Saved,
    packed: Tensor,
    folded: Folded,
    spec: AdapterSpec,
    task_index: Tensor | None,
    dx: Tensor | None,
    per_row: Sequence[Tensor] | None,
) -> None:
    """Launch ``rows_kernel``.

    Args:
        g: the rows of the output's gradient.
        x: the rows of the forward's input.
        saved: what the forward saved.
        packed: [T, P]; its post-norm's gamma is read, if ``per_row`` is there.
        folded: the folded weights.
        spec: the adapter's layout and activation.
        task_index: [B] with several tasks in the batch, otherwise None.
        dx: where to store the gradient of x; None where it is not needed.
        per_row: where to store dz, r h, m2 and s, as ``per_row_table`` lists them; None where they are not needed.
    """
    layout, dtype = spec.layout, x.data.dtype
    d, b, pre, post = layout.arguments
    wd, wg, vectors, scale, root = readable(folded)
    tile = tiles.backward(d, b, dtype, pre, tiles.architecture(x.data.device))
    if tile.keep and g.align % 8:
        tile = tile._replace(BM=16)  # loads of single numbers take registers for addresses; 32 rows would spill
    T = packed.shape[0]
    launch(
        rows_kernel, (x.B * triton.cdiv(x.M, tile.BM),),
        g.data, x.data, *saved, wd, wg, vectors, scale, root, packed if T else wd,
        None if task_index is None else task_index.contiguous(),
        wd if dx is None else dx, *((wd,) * 4 if per_row is None else per_row),  # wd stands where nothing is accessed
        x.M, T, g.stride_sample, g.stride_row, x.stride_sample, x.stride_row,
        D=d, BW=b, P=layout.numel, GAMMA_AT=layout.slices["post_gamma"].start if post else 0,
        ACT=ACTIVATIONS.index(spec.activation), PRE=pre, POST=post, NEED_DX=dx is not None,
        NEED_SUMS=per_row is not None, MIXED=task_index is not None, G_ALIGN=g.align, ALIGN=x.align,
        PRECISION=matmul_precision(dtype), BB=padded(b), BM=tile.BM, BK=tile.BK, KEEP=tile.keep and tile.BK >= 32,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def adapter_backward(
    g: Tensor,
    x: Tensor,
    saved: Saved,
    packed: Tensor,
    folded: Folded,
    spec: AdapterSpec,
    task_index: Tensor | None,
    need_dx: bool,
    need_dpacked: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels: ``reference.adapter_backward`` for x [..., d] in float32, bfloat16 or float16.

    Returns:
        dx like x and dpacked [T, P] like ``packed``; an empty tensor in place of one that is not needed. dx of a sample
        without a task is g bit for bit, and NaN for a sample whose task is out of range; neither adds to dpacked.
    """
    layout, T = spec.layout, packed.shape[0]
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    xs, gs = rows_of(x, task_index), rows_of(g, task_index)
    N = xs.B * xs.M
    if N == 0 or not (need_dx or need_dpacked):
        return dx, torch.zeros_like(packed) if need_dpacked else packed.new_empty(0)
    need_sums = need_dpacked and T > 0
    saved = Saved(*(part.contiguous() for part in saved))
    exact = packed.contiguous() if packed.dtype != torch.float64 else packed.float()
    per_row = [part.empty(x) for part in per_row_table(layout, N, x.dtype)] if need_sums else None
    with device_guard(x):
        row_gradients(gs, xs, saved, exact, folded, spec, task_index, dx if need_dx else None, per_row)
        if per_row is None:
            return dx, torch.empty_like(packed) if need_dpacked else packed.new_empty(0)
        dpacked = weight_gradients(gs, xs, saved, per_row, exact, folded, layout, task_index)
    return dx, dpacked.to(packed.dtype)
