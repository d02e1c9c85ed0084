"""``fold`` in Triton: one launch for all adapters of a stack, one program per adapter.

docs/design.md says what is folded and why. Every sum is computed in float64, as are the centred up-projection and the
Cholesky factor of its Gram matrix. The up-projection W_u and its bias stay two operands: with the bias as a further
column, a power-of-two bottleneck would need a tile twice as wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import AdapterLayout, Folded
from . import tiles
from .common import device_guard, load_weight, padded


@triton.jit
def _vector(base, k, D: tl.constexpr, BK: tl.constexpr):
    """Load [BK] in float64: entries k*BK to (k+1)*BK of the vector [D] at ``base``; zeros beyond it."""
    column = k * BK + tl.arange(0, BK)
    return tl.load(base + column, mask=column < D, other=0.0).to(tl.float64)


@triton.jit
def _up(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Load [BK, BB] in float64: rows k*BK to (k+1)*BK of W_u [d, b], to which ``base`` points; zeros outside it."""
    j = tl.arange(0, BB)
    row = k * BK + tl.arange(0, BK)
    mask = (row < D)[:, None] & (j < BW)[None, :]
    return tl.load(base + row[:, None] * BW + j[None, :], mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _centred(base, bias_base, mean, bias_mean, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """Load rows k*BK to (k+1)*BK of W_u [d, b] at ``base`` and of its bias [d] at ``bias_base``, and subtract the
    column means ``mean`` [BB] and ``bias_mean``. Returns [BK, BB] and [BK] in float64; zeros beyond row d."""
    row_ok = k * BK + tl.arange(0, BK) < D
    wc = tl.where(row_ok[:, None], _up(base, k, D, BW, BB, BK) - mean[None, :], 0.0)
    bc = tl.where(row_ok, _vector(bias_base, k, D, BK) - bias_mean, 0.0)
    return wc, bc


@triton.jit
def _entry(vector, index, BB: tl.constexpr):
    """Return ``vector[index]`` of a vector [BB] in registers."""
    return tl.sum(tl.where(tl.arange(0, BB) == index, vector, 0.0), 0)


@triton.jit
def _square_root(ROOT, gram, border, corner, BW: tl.constexpr, BB: tl.constexpr):
    """Store the upper triangular R with R^T R = [[gram, border], [border^T, corner]], row by row.

    ROOT points to R [b+1, b+1] in float32; ``gram`` [BB, BB], ``border`` [BB] and ``corner`` are in registers, in
    float64. R is the Cholesky factor, except that a pivot lost to rounding leaves a row of zeros, as in
    ``reference.square_root``."""
    C: tl.constexpr = BW + 1
    # A pivot at most this share of its diagonal entry is lost: float64's epsilon times the number of columns.
    LOST: tl.constexpr = C * 2.220446049250313e-16
    j = tl.arange(0, BB)
    diagonal = tl.sum(tl.where(j[:, None] == j[None, :], gram, 0.0), 1)
    lost_corner = corner * LOST
    for c in range(BW):
        column = tl.sum(tl.where(j[None, :] == c, gram, 0.0), 1)
        pivot = _entry(column, c, BB)
        lost = pivot <= _entry(diagonal, c, BB) * LOST  # False for a NaN, so that it stays visible in R
        inverse = tl.where(lost, 0.0, 1.0 / tl.sqrt(tl.where(lost, 1.0, pivot)))
        row = tl.where(j >= c, column * inverse, 0.0)
        at_bias = _entry(border, c, BB) * inverse
        gram -= row[:, None] * row[None, :]
        border -= at_bias * row
        corner -= at_bias * at_bias
        tl.store(ROOT + c * C + j, row.to(tl.float32), mask=j < BW)
        tl.store(ROOT + c * C + BW, at_bias.to(tl.float32))
    lost = corner <= lost_corner
    last = tl.where(lost, 0.0, tl.sqrt(tl.where(lost, 0.0, corner)))
    tl.store(ROOT + BW * C + j, tl.zeros((BB,), tl.float32), mask=j < BW)
    tl.store(ROOT + BW * C + BW, last.to(tl.float32))


@triton.jit
def _power_of_two(m):
    """Return 2^floor(log2 m) for m in float64, clamped to 2^-126 .. 2^126; 1 where m is 0 or not finite."""
    # Clearing the mantissa's bits rounds m down to a power of two.
    bits = m.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    power = bits.to(tl.float64, bitcast=True)
    power = tl.where(power < 1.1754943508222875e-38, 1.1754943508222875e-38, power)
    power = tl.where(power > 8.507059173023462e37, 8.507059173023462e37, power)
    return tl.where((m > 0.0) & (m < float("inf")), power, 1.0)


@triton.jit
def fold_kernel(
    PACKED, WD, WG, VECTORS, SCALE, ROOT, MEAN,
    D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, V: tl.constexpr, DOWN_BIAS: tl.constexpr, UP: tl.constexpr,
    UP_BIAS: tl.constexpr, GAMMA: tl.constexpr, PRE_GAMMA: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Fold one adapter (``reference.fold``). The grid is n, the number of adapters.

    Pointers, all contiguous; "compute dtype" is the dtype of the x to come (float32, bfloat16 or float16):
        PACKED   [n, P]          any floating dtype; the packed adapters
        WD       [n, b, d]       compute dtype; output, the down-projection, times the pre-norm's gamma if PRE
        WG       [n, b, d]       compute dtype; output, the up-projection transposed; if POST centred, times gamma,
                                 divided by SCALE
        VECTORS  [n, V]          float32; output, the folded down bias [b], the folded up bias [d], and if POST beta [d]
        SCALE    [n, b]          float32; output, powers of two, one per row of WG (written if POST)
        ROOT     [n, b+1, b+1]   float32; output, R with R^T R = Wa^T Wa / d (written if POST)
        MEAN     [n, b+1]        float32; output, the column means of [W_u | b_u] (written if POST)

    DOWN_BIAS, UP, UP_BIAS, GAMMA and PRE_GAMMA are the offsets of the parts within a packed adapter; the
    down-projection is at offset 0, and each norm's beta follows its gamma.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    adapter = tl.program_id(0).to(tl.int64)
    PACKED += adapter * P
    WD += adapter * (BW * D)
    WG += adapter * (BW * D)
    VECTORS += adapter * V
    kind = WD.dtype.element_ty
    j = tl.arange(0, BB)
    j_ok = j < BW

    shift = tl.zeros((BB,), tl.float64)
    for k in range(NK):
        column = k * BK + tl.arange(0, BK)
        wd = load_weight(PACKED, k, D, BW, BB, BK)
        if PRE:
            wide = wd.to(tl.float64)
            shift += tl.sum(wide * _vector(PACKED + PRE_GAMMA + D, k, D, BK)[None, :], 1)
            wd = wide * _vector(PACKED + PRE_GAMMA, k, D, BK)[None, :]
        tl.store(WD + j[:, None] * D + column[None, :], wd.to(kind), mask=j_ok[:, None] & (column < D)[None, :])
    down_bias = tl.load(PACKED + DOWN_BIAS + j, mask=j_ok, other=0.0).to(tl.float64) + shift
    tl.store(VECTORS + j, down_bias.to(tl.float32), mask=j_ok)
    VECTORS += BW

    if POST:
        total = tl.zeros((BB,), tl.float64)
        bias_total = tl.zeros((BK,), tl.float64)
        for k in range(NK):
            total += tl.sum(_up(PACKED + UP, k, D, BW, BB, BK), 0)
            bias_total += _vector(PACKED + UP_BIAS, k, D, BK)
        mean = total / D
        bias_mean = tl.sum(bias_total, 0) / D
        tl.store(MEAN + adapter * (BW + 1) + j, mean.to(tl.float32), mask=j_ok)
        tl.store(MEAN + adapter * (BW + 1) + BW, bias_mean.to(tl.float32))

        gram = tl.zeros((BB, BB), tl.float64)
        border = tl.zeros((BB,), tl.float64)
        corner = tl.zeros((BK,), tl.float64)
        peak = tl.zeros((BB,), tl.float64)
        for k in range(NK):
            wc, bc = _centred(PACKED + UP, PACKED + UP_BIAS, mean, bias_mean, k, D, BW, BB, BK)
            gram = tl.dot(tl.trans(wc), wc, gram, out_dtype=tl.float64)
            border += tl.sum(wc * bc[:, None], 0)
            corner += bc * bc
            gamma = _vector(PACKED + GAMMA, k, D, BK)
            peak = tl.maximum(peak, tl.max(tl.abs(wc * gamma[:, None]), 0))
        _square_root(ROOT + adapter * ((BW + 1) * (BW + 1)), gram / D, border / D, tl.sum(corner, 0) / D, BW, BB)
        scale = _power_of_two(peak)
        tl.store(SCALE + adapter * BW + j, scale.to(tl.float32), mask=j_ok)
    for k in range(NK):
        row = k * BK + tl.arange(0, BK)
        row_ok = row < D
        if POST:
            wg, bias = _centred(PACKED + UP, PACKED + UP_BIAS, mean, bias_mean, k, D, BW, BB, BK)
            gamma = _vector(PACKED + GAMMA, k, D, BK)
            wg = wg * gamma[:, None] / scale[None, :]
            bias = bias * gamma
            tl.store(VECTORS + D + row, _vector(PACKED + GAMMA + D, k, D, BK).to(tl.float32), mask=row_ok)
        else:
            wg = _up(PACKED + UP, k, D, BW, BB, BK)
            bias = _vector(PACKED + UP_BIAS, k, D, BK)
        tl.store(VECTORS + row, bias.to(tl.float32), mask=row_ok)
        tl.store(WG + j[None, :] * D + row[:, None], wg.to(kind), mask=row_ok[:, None] & j_ok[None, :])


def fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    """Launch ``fold_kernel``: ``reference.fold`` for packed [..., P] and a compute dtype of float32, bfloat16 or
    float16."""
    d, b, pre, post = layout.arguments
    folded = Folded(*(spec.empty(packed) for spec in Folded.table(layout, packed.shape[:-1], dtype)))
    flat = packed.reshape(-1, layout.numel).contiguous()
    if flat.shape[0] == 0:
        return folded
    at = {name: part.start for name, part in layout.slices.items()}
    tile = tiles.fold(d, b)
    with device_guard(packed):
        fold_kernel[(flat.shape[0],)](
            flat, *folded, D=d, BW=b, P=layout.numel, V=folded.vectors.shape[-1], DOWN_BIAS=at["down_bias"],
            UP=at["up_weight"], UP_BIAS=at["up_bias"], GAMMA=at.get("post_gamma", 0),
            PRE_GAMMA=at.get("pre_gamma", 0), PRE=pre, POST=post,
            BB=padded(b), BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return folded
