"""``adapter_backward`` in Triton, in three launches (docs/design.md has the formulas).

``rows_kernel`` in this file computes dx, with one program for BM rows of one sample. It also stores dz, r h, m2 and
s = g . gamma of each row, from which the two kernels of ``weight_gradients.py`` sum the gradients of the weights. No
kernel adds with atomics, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..layout import AdapterSpec, Folded, Saved
from . import tiles
from .adapter_forward import readable
from .common import (
    LENGTHS,
    activate,
    activate_grad,
    device_guard,
    load_rows,
    load_vector,
    load_weight,
    matmul_precision,
    normalised,
    padded,
    root_product,
    root_rows,
    row_start,
    rows_of,
    rows_of_unit,
    store_sum,
    task_of,
)
from .weight_gradients import weight_gradients


@triton.jit
def _project(g, WG, GB, GAMMA, k, t, along_bias, along_gamma, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr,
             BK: tl.constexpr, POST: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the share of columns k*BK to (k+1)*BK to three sums over the columns of g, and return the sums.

    They are t = g Wg^T [BM, BB], and if POST along_bias = g . bias [BM] and along_gamma = g . gamma [BM] (the last only
    if SUMS). ``g`` [BM, BK] holds those columns. Pointers to the weights of one task: WG [b, d], GB [d] the folded up
    bias, GAMMA [d] the post-norm's gamma."""
    t = tl.dot(g, tl.trans(load_weight(WG, k, D, BW, BB, BK)), t, input_precision=PRECISION)
    if POST:
        wide = g.to(tl.float32)
        along_bias += tl.sum(wide * load_vector(GB, k, D, BK)[None, :], 1)
        if SUMS:
            along_gamma += tl.sum(wide * load_vector(GAMMA, k, D, BK)[None, :], 1)
    return t, along_bias, along_gamma


@triton.jit(do_not_specialize=LENGTHS)
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
    NK: tl.constexpr = (D + BK - 1) // BK
    V: tl.constexpr = BW + 2 * D if POST else BW + D
    sample, row, row_ok, flat = rows_of_unit(tl.program_id(0), M, BM)
    task, weights, valid = task_of(TASK, sample, T, MIXED)
    g_rows = G + row_start(sample, row, g_stride_sample, g_stride_row, G_ALIGN)
    x_rows = X + row_start(sample, row, stride_sample, stride_row, ALIGN)
    WD += weights * (BW * D)
    WG += weights * (BW * D)
    bias = VECTORS + weights * V + BW
    gamma = PACKED + weights * P + GAMMA_AT
    j = tl.arange(0, BB)
    j_ok = j < BW

    kept = ()
    t = tl.zeros((BM, BB), tl.float32)
    along_bias = tl.zeros((BM,), tl.float32)
    along_gamma = tl.zeros((BM,), tl.float32)
    if KEEP:
        for k in tl.static_range(NK):
            g = load_rows(g_rows, k, row_ok, D, BK)
            kept = kept + (g,)
            t, along_bias, along_gamma = _project(
                g, WG, bias, gamma, k, t, along_bias, along_gamma, D, BW, BB, BK, POST, NEED_SUMS, PRECISION
            )
    else:
        for k in range(NK):
            g = load_rows(g_rows, k, row_ok, D, BK)
            t, along_bias, along_gamma = _project(
                g, WG, bias, gamma, k, t, along_bias, along_gamma, D, BW, BB, BK, POST, NEED_SUMS, PRECISION
            )
    z = tl.load(Z + flat[:, None] * BW + j[None, :], mask=row_ok[:, None] & j_ok[None, :], other=0.0).to(tl.float32)
    dh = t
    if POST:
        h = activate(z, ACT)
        r = tl.load(R + flat, mask=row_ok, other=0.0)
        root = ROOT + weights * ((BW + 1) * (BW + 1))
        q, _ = root_rows(h, root, BW, BM, BB)
        u = root_product(q, root, tl.zeros((BM, BB), tl.float32), False, BW, BM, BB)
        t = t * tl.load(SCALE + weights * BW + j, mask=j_ok, other=0.0)[None, :]
        m2 = (tl.sum(t * h, 1) + along_bias) * r / D
        dh = r[:, None] * (t - (m2 * D * r)[:, None] * u)
    dz = (dh * activate_grad(z, ACT)).to(X.dtype.element_ty)
    if NEED_SUMS:
        at = flat[:, None] * BW + j[None, :]
        at_ok = row_ok[:, None] & j_ok[None, :]
        tl.store(DZ + at, dz, mask=at_ok)
        rh = h * r[:, None] if POST else activate(z, ACT)
        tl.store(RH + at, rh.to(RH.dtype.element_ty), mask=at_ok)
        if POST:
            tl.store(M2 + flat, m2, mask=row_ok)
            tl.store(S + flat, along_gamma, mask=row_ok)

    if NEED_DX:
        dx_rows = DX + flat * D
        if PRE:
            mean = tl.load(PRE_MEAN + flat, mask=row_ok, other=0.0)
            rstd = tl.load(PRE_RSTD + flat, mask=row_ok, other=0.0)
            total = tl.zeros((BM,), tl.float32)
            along = tl.zeros((BM,), tl.float32)
            for k in range(NK):
                branch = tl.dot(dz, load_weight(WD, k, D, BW, BB, BK), input_precision=PRECISION)
                xhat = normalised(load_rows(x_rows, k, row_ok, D, BK).to(tl.float32), mean, rstd, k, D, BK)
                total += tl.sum(branch, 1)
                along += tl.sum(branch * xhat, 1)
            total, along = total / D, along / D
        if KEEP:
            for k in tl.static_range(NK):
                branch = tl.dot(dz, load_weight(WD, k, D, BW, BB, BK), input_precision=PRECISION)
                if PRE:
                    xhat = normalised(load_rows(x_rows, k, row_ok, D, BK).to(tl.float32), mean, rstd, k, D, BK)
                    branch = rstd[:, None] * (branch - total[:, None] - xhat * along[:, None])
                store_sum(dx_rows, kept[k], branch, k, row_ok, task, valid, D, BK, MIXED)
        else:
            for k in range(NK):
                branch = tl.dot(dz, load_weight(WD, k, D, BW, BB, BK), input_precision=PRECISION)
                if PRE:
                    xhat = normalised(load_rows(x_rows, k, row_ok, D, BK).to(tl.float32), mean, rstd, k, D, BK)
                    branch = rstd[:, None] * (branch - total[:, None] - xhat * along[:, None])
                g = load_rows(g_rows, k, row_ok, D, BK)
                store_sum(dx_rows, g, branch, k, row_ok, task, valid, D, BK, MIXED)


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
    d, b, pre, post = layout.arguments
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    xs, gs = rows_of(x, task_index), rows_of(g, task_index)
    N = xs.B * xs.M
    if N == 0 or not (need_dx or need_dpacked):
        return dx, torch.zeros_like(packed) if need_dpacked else packed.new_empty(0)
    need_sums = need_dpacked and T > 0
    wd, wg, vectors, scale, root = readable(folded)
    saved = Saved(*(part.contiguous() for part in saved))
    exact = packed.contiguous() if packed.dtype != torch.float64 else packed.float()
    act = ACTIVATIONS.index(spec.activation)
    dz = torch.empty((N, b) if need_sums else 0, dtype=x.dtype, device=x.device)
    # r h may leave float16's range
    kind = torch.float32 if x.dtype == torch.float16 else x.dtype
    rh = torch.empty(dz.shape, dtype=kind, device=x.device)
    m2, s = (torch.empty(N if need_sums and post else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = tiles.backward(d, b, x.dtype, pre, tiles.architecture(x.device))
    with device_guard(x):
        rows_kernel[(xs.B * triton.cdiv(xs.M, tile.BM),)](
            gs.data, xs.data, *saved, wd, wg, vectors, scale, root, exact if T else wd, task_index, dx, dz, rh, m2, s,
            xs.M, T, gs.stride_sample, gs.stride_row, xs.stride_sample, xs.stride_row,
            D=d, BW=b, P=layout.numel, GAMMA_AT=layout.slices["post_gamma"].start if post else 0, ACT=act,
            PRE=pre, POST=post, NEED_DX=need_dx, NEED_SUMS=need_sums, MIXED=task_index is not None,
            G_ALIGN=gs.align, ALIGN=xs.align, PRECISION=matmul_precision(x.dtype),
            BB=padded(b), BM=tile.BM, BK=tile.BK, KEEP=tile.keep, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if not need_sums:
            return dx, torch.empty_like(packed) if need_dpacked else packed.new_empty(0)
        dpacked = weight_gradients(gs, xs, saved, (dz, rh, m2, s), exact, folded, layout, act, task_index)
    return dx, dpacked.to(packed.dtype)
