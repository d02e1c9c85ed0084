"""``adapter_backward`` in Triton, in three launches (docs/design.md has the formulas).

``rows_kernel``, here: one program for BM rows of one sample makes dx, and leaves dz, m2 and s = g . gamma of each row
for the weight gradients, which ``weight_gradients.py`` sums in two more. Nothing is added with atomics, so two runs
give the same bits.
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
    """Add g Wg^T over chunk k to t, and the products of g with gamma * bc and with gamma to the two sums."""
    t = tl.dot(g, tl.trans(load_weight(WG, k, D, BW, BB, BK)), t, input_precision=PRECISION)
    if POST:
        wide = g.to(tl.float32)
        along_bias += tl.sum(wide * load_vector(GB, k, D, BK)[None, :], 1)
        if SUMS:
            along_gamma += tl.sum(wide * load_vector(GAMMA, k, D, BK)[None, :], 1)
    return t, along_bias, along_gamma


@triton.jit(do_not_specialize=LENGTHS)
def rows_kernel(
    G, X, Z, R, PRE_MEAN, PRE_RSTD, WD, WG, VECTORS, SCALE, ROOT, PACKED, TASK, DX, DZ, M2, S,
    M, T, g_stride_sample, g_stride_row, stride_sample, stride_row,
    D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, GAMMA_AT: tl.constexpr, ACT: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, NEED_DX: tl.constexpr, NEED_SUMS: tl.constexpr, MIXED: tl.constexpr,
    G_ALIGN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
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
        tl.store(DZ + flat[:, None] * BW + j[None, :], dz, mask=row_ok[:, None] & j_ok[None, :])
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
    """``reference.adapter_backward`` for x [..., d] in float32, bfloat16 or float16: dx like x, dpacked [T, P] like
    ``packed``, empty where not needed. A sample without a task has dx = g bit for bit; one out of range has NaN;
    neither reaches dpacked."""
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
    m2, s = (torch.empty(N if need_sums and post else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = tiles.backward(d, b, x.dtype, pre, tiles.architecture(x.device))
    with device_guard(x):
        rows_kernel[(xs.B * triton.cdiv(xs.M, tile.BM),)](
            gs.data, xs.data, *saved, wd, wg, vectors, scale, root, exact if T else wd, task_index, dx, dz, m2, s,
            xs.M, T, gs.stride_sample, gs.stride_row, xs.stride_sample, xs.stride_row,
            D=d, BW=b, P=layout.numel, GAMMA_AT=layout.slices["post_gamma"].start if post else 0, ACT=act,
            PRE=pre, POST=post, NEED_DX=need_dx, NEED_SUMS=need_sums, MIXED=task_index is not None,
            G_ALIGN=gs.align, ALIGN=xs.align, PRECISION=matmul_precision(x.dtype),
            BB=padded(b), BM=tile.BM, BK=tile.BK, KEEP=tile.keep, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if not need_sums:
            return dx, torch.empty_like(packed) if need_dpacked else packed.new_empty(0)
        dpacked = weight_gradients(gs, xs, saved, (dz, m2, s), exact, folded, layout, act, task_index)
    return dx, dpacked.to(packed.dtype)
