"""``fold`` in Triton: all adapters of a stack in one launch, one program each (docs/design.md says what is folded and
why).

Every sum is float64, as are the centred up-projection and the Cholesky factor of its Gram matrix. W_u and its bias
stay two operands: as a column of one matrix the bias would double the tile where b is a power of two.
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
    column = k * BK + tl.arange(0, BK)
    return tl.load(base + column, mask=column < D, other=0.0).to(tl.float64)


@triton.jit
def _up(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Rows k*BK .. of W_u [d, b] as [BK, BB], zeros outside."""
    j = tl.arange(0, BB)
    row = k * BK + tl.arange(0, BK)
    mask = (row < D)[:, None] & (j < BW)[None, :]
    return tl.load(base + row[:, None] * BW + j[None, :], mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _centred(base, bias_base, mean, bias_mean, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """Rows k*BK .. of W_u and of its bias, without their means; zeros outside."""
    row_ok = k * BK + tl.arange(0, BK) < D
    wc = tl.where(row_ok[:, None], _up(base, k, D, BW, BB, BK) - mean[None, :], 0.0)
    bc = tl.where(row_ok, _vector(bias_base, k, D, BK) - bias_mean, 0.0)
    return wc, bc


@triton.jit
def _entry(vector, index, BB: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BB) == index, vector, 0.0), 0)


@triton.jit
def _square_root(ROOT, gram, border, corner, BW: tl.constexpr, BB: tl.constexpr):
    """Write the upper-triangular R with R^T R = [[gram, border], [border^T, corner]]: Cholesky's factor, row by row,
    where a pivot lost to rounding leaves an empty row (``reference.square_root``)."""
    C: tl.constexpr = BW + 1
    LOST: tl.constexpr = C * 2.220446049250313e-16
    j = tl.arange(0, BB)
    diagonal = tl.sum(tl.where(j[:, None] == j[None, :], gram, 0.0), 1)
    lost_corner = corner * LOST
    for c in range(BW):
        column = tl.sum(tl.where(j[None, :] == c, gram, 0.0), 1)
        pivot = _entry(column, c, BB)
        lost = pivot <= _entry(diagonal, c, BB) * LOST  # False for a NaN, which therefore stays visible in R
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
    """2^floor(log2 m) within float32's normal range; 1 where m is 0 or not finite."""
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
    """``reference.fold`` for packed [..., P] and a compute dtype of float32, bfloat16 or float16."""
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
