"""``fold`` in Triton: two launches for all adapters of a stack. docs/design.md says what is folded and why.

The first launch is ``gram.py``'s. ``fold_kernel`` has one program per adapter that adds its sums, centres them and
factors the Gram matrix, and further programs that fold eight units of the bottleneck each: eight rows of W_d and eight
columns of W_u, whole, so that each number is read once. An adapter thus occupies several multiprocessors, and the
factor's serial steps pass while other programs move the weights.

Every sum is computed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import AdapterLayout, Folded
from . import tiles
from .common import device_guard, padded
from .gram import gram_kernel, up_tile, vector_tile

#: Units of the bottleneck that a program of ``fold_kernel`` folds; eight float32 numbers fill a sector of memory.
UNITS = 8


@triton.jit
def _entry(vector, index, BB: tl.constexpr):
    """Return ``vector[index]`` of a vector [BB] in registers, in each of BB places."""
    return tl.gather(vector, tl.full((BB,), index, tl.int32), 0)


@triton.jit
def _inverse_root(pivot, diagonal, BW: tl.constexpr):
    """Return 1 / sqrt(pivot), or 0 for a pivot that is lost to rounding, as ``reference.square_root`` decides it: one
    that is at most this share of its diagonal entry, float64's epsilon times the number of columns."""
    lost = pivot <= diagonal * ((BW + 1) * 2.220446049250313e-16)  # False for a NaN, so that it stays visible in R
    return tl.where(lost, 0.0, tl.rsqrt(tl.where(lost, 1.0, pivot)))


@triton.jit
def _rows(tile, BB: tl.constexpr, COUNT: tl.constexpr):
    """Take a register tile [BB, COUNT] apart into a tuple of COUNT vectors [BB]."""
    if COUNT == 1:
        return (tl.reshape(tile, (BB,)),)
    else:
        first, second = tl.split(tl.permute(tl.reshape(tile, (BB, 2, COUNT // 2)), (0, 2, 1)))
        return _rows(first, BB, COUNT // 2) + _rows(second, BB, COUNT // 2)


@triton.jit
def _store_row(ROOT, c, row, at_bias, BW: tl.constexpr, BB: tl.constexpr):
    """Store row ``c`` of R: its first b entries ``row`` [BB], and its last, ``at_bias`` in each of BB places."""
    i = tl.arange(0, BB)
    tl.store(ROOT + c * (BW + 1) + i, row.to(tl.float32), mask=i < BW)
    tl.store(ROOT + c * (BW + 1) + BW + i, at_bias.to(tl.float32), mask=i == 0)


@triton.jit
def _factor_rows(ROOT, gram, border, corner, BW: tl.constexpr, BB: tl.constexpr):
    """Factor [[gram, border], [border^T, corner]] for a small b, and store all rows of R but the last. ``corner``, and
    what becomes of it, which is returned, are in each of BB places.

    Every warp holds all rows of ``gram``, one column in each lane, and does the same. A step exchanges numbers within
    the warp and needs no barrier. Which register a row is in must be known at compile time, so the rows move up by one
    place at each step."""
    lane = tl.arange(0, BB)
    rows = _rows(gram, BB, BB)
    diagonal = tl.zeros((BB,), tl.float64)
    for i in tl.static_range(BW):
        diagonal = tl.where(lane == i, rows[i], diagonal)
    rows = rows[:BW]
    for c in range(BW):
        inverse = _inverse_root(_entry(rows[0], c, BB), _entry(diagonal, c, BB), BW)
        row = tl.where(lane >= c, rows[0] * inverse, 0.0)
        at_bias = _entry(border, c, BB) * inverse
        _store_row(ROOT, c, row, at_bias, BW, BB)
        left = ()
        for i in tl.static_range(1, BW):
            # beyond the last row the index wraps around, and what moves up is never used
            left = left + (rows[i] - _entry(row, (c + i) % BB, BB) * row,)
        rows = left + (row,)
        border -= at_bias * row
        corner -= at_bias * at_bias
    return corner


@triton.jit
def _factor_tile(ROOT, gram, border, corner, BW: tl.constexpr, BB: tl.constexpr):
    """``_factor_rows`` for any b: the matrix is one tile, spread over all warps."""
    i = tl.arange(0, BB)
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], gram, 0.0), 1)
    for c in range(BW):
        # gram is symmetric: its row and its column are the same numbers, in the two layouts that the update needs
        column = tl.sum(tl.where(i[None, :] == c, gram, 0.0), 1)
        row = tl.sum(tl.where(i[:, None] == c, gram, 0.0), 0)
        pivot = tl.sum(tl.where(i == c, row, 0.0), 0)
        inverse = _inverse_root(pivot, tl.sum(tl.where(i == c, diagonal, 0.0), 0), BW)
        row = tl.where(i >= c, row * inverse, 0.0)
        column = tl.where(i >= c, column * inverse, 0.0)
        at_bias = tl.zeros((BB,), tl.float64) + tl.sum(tl.where(i == c, border, 0.0), 0) * inverse
        _store_row(ROOT, c, row, at_bias, BW, BB)
        gram -= column[:, None] * row[None, :]
        border -= at_bias * row
        corner -= at_bias * at_bias
    return corner


@triton.jit
def _add(part, gram, border, sums, corner, bias_sum, BW: tl.constexpr, BB: tl.constexpr):
    """Add the partial sums at ``part`` to those of ``_root``."""
    i = tl.arange(0, BB)
    ok = i < BW
    gram += tl.load(part + i[:, None] * BW + i[None, :], mask=ok[:, None] & ok[None, :], other=0.0)
    border += tl.load(part + BW * BW + i, mask=ok, other=0.0)
    sums += tl.load(part + BW * BW + BW + i, mask=ok, other=0.0)
    corner += tl.load(part + BW * BW + 2 * BW)
    bias_sum += tl.load(part + BW * BW + 2 * BW + 1)
    return gram, border, sums, corner, bias_sum


@triton.jit
def _root(SUMS, ROOT, D: tl.constexpr, BW: tl.constexpr, NK: tl.constexpr, SIZE: tl.constexpr, BB: tl.constexpr):
    """Store the upper triangular R with R^T R = Wa^T Wa / d. SUMS [NK, SIZE] and ROOT [b+1, b+1] belong to one adapter.

    R is the Cholesky factor, except that a pivot lost to rounding leaves a row of zeros."""
    gram = tl.zeros((BB, BB), tl.float64)
    border = tl.zeros((BB,), tl.float64)
    sums = tl.zeros((BB,), tl.float64)
    corner = tl.zeros((BB,), tl.float64)
    bias_sum = tl.zeros((BB,), tl.float64)
    if BB <= 32 and NK <= 8:
        for k in tl.static_range(NK):  # unrolled, so that all loads are on their way at once
            gram, border, sums, corner, bias_sum = _add(SUMS + k * SIZE, gram, border, sums, corner, bias_sum, BW, BB)
    else:
        for k in range(NK):
            gram, border, sums, corner, bias_sum = _add(SUMS + k * SIZE, gram, border, sums, corner, bias_sum, BW, BB)
    gram = (gram - sums[:, None] * (sums * (1.0 / D))[None, :]) * (1.0 / D)
    border = (border - sums * (bias_sum * (1.0 / D))) * (1.0 / D)
    whole = (corner - bias_sum * (bias_sum * (1.0 / D))) * (1.0 / D)
    if BB <= 32:
        corner = _factor_rows(ROOT, gram, border, whole, BW, BB)
    else:
        corner = _factor_tile(ROOT, gram, border, whole, BW, BB)
    _store_row(ROOT, BW, tl.zeros((BB,), tl.float64), corner * _inverse_root(corner, whole, BW), BW, BB)


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
def _fold_down(packed, WD, VECTORS, j, D: tl.constexpr, BW: tl.constexpr, DOWN_BIAS: tl.constexpr,
               PRE_GAMMA: tl.constexpr, PRE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Fold rows ``j`` of W_d and entries ``j`` of its bias. ``packed`` points to one packed adapter, WD [b, d] and
    VECTORS [V] to its outputs."""
    kind = WD.dtype.element_ty
    j_ok = j < BW
    shift = tl.zeros((j.shape[0],), tl.float64)
    for k in range((D + BK - 1) // BK):
        column = k * BK + tl.arange(0, BK)
        at = j[:, None] * D + column[None, :]
        ok = j_ok[:, None] & (column < D)[None, :]
        wd = tl.load(packed + at, mask=ok, other=0.0)
        if PRE:
            wide = wd.to(tl.float64)
            shift += tl.sum(wide * vector_tile(packed + PRE_GAMMA + D, k, D, BK)[None, :], 1)
            wd = wide * vector_tile(packed + PRE_GAMMA, k, D, BK)[None, :]
        tl.store(WD + at, wd.to(kind), mask=ok)
    bias = tl.load(packed + DOWN_BIAS + j, mask=j_ok, other=0.0).to(tl.float64) + shift
    tl.store(VECTORS + j, bias.to(tl.float32), mask=j_ok)


@triton.jit
def _fold_up(packed, WG, SCALE, MEAN, j, D: tl.constexpr, BW: tl.constexpr, UP: tl.constexpr, GAMMA: tl.constexpr,
             POST: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Fold columns ``j`` of W_u. ``packed`` points to one packed adapter, WG [b, d], SCALE [b] and MEAN [b+1] to its
    outputs. If the columns fit into one tile of BK rows, they are read once."""
    NK: tl.constexpr = (D + BK - 1) // BK
    kind = WG.dtype.element_ty
    j_ok = j < BW
    held = up_tile(packed + UP, 0, j, D, BW, BK)
    if POST:
        total = tl.sum(held, 0)
        for k in range(1, NK):
            total += tl.sum(up_tile(packed + UP, k, j, D, BW, BK), 0)
        mean = total / D
        tl.store(MEAN + j, mean.to(tl.float32), mask=j_ok)
        gamma = vector_tile(packed + GAMMA, 0, D, BK)
        held = (held - mean[None, :]) * gamma[:, None]  # gamma is 0 beyond row d
        peak = tl.max(tl.abs(held), 0)
        for k in range(1, NK):
            wide = up_tile(packed + UP, k, j, D, BW, BK) - mean[None, :]
            wide *= vector_tile(packed + GAMMA, k, D, BK)[:, None]
            peak = tl.maximum(peak, tl.max(tl.abs(wide), 0))
        scale = _power_of_two(peak)
        tl.store(SCALE + j, scale.to(tl.float32), mask=j_ok)
        inverse = 1.0 / scale  # exact
        held *= inverse[None, :]
    row = tl.arange(0, BK)
    at = j[None, :] * D + row[:, None]
    tl.store(WG + at, held.to(kind), mask=(row < D)[:, None] & j_ok[None, :])
    for k in range(1, NK):
        wide = up_tile(packed + UP, k, j, D, BW, BK)
        if POST:
            gamma = vector_tile(packed + GAMMA, k, D, BK)
            wide = (wide - mean[None, :]) * gamma[:, None] * inverse[None, :]
        row_ok = k * BK + row < D
        tl.store(WG + k * BK + at, wide.to(kind), mask=row_ok[:, None] & j_ok[None, :])


@triton.jit
def _fold_bias(packed, UP_BIAS_OUT, MEAN, D: tl.constexpr, UP_BIAS: tl.constexpr, GAMMA: tl.constexpr,
               POST: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Fold the bias of W_u, and copy beta. ``packed`` points to one packed adapter, UP_BIAS_OUT [2d] (or [d] without a
    post-norm) to the place of both in its vectors, and MEAN to the last entry of its means."""
    NK: tl.constexpr = (D + BK - 1) // BK
    mean = tl.zeros((), tl.float64)
    if POST:
        for k in range(NK):
            mean += tl.sum(vector_tile(packed + UP_BIAS, k, D, BK), 0)
        mean = mean / D
        tl.store(MEAN, mean.to(tl.float32))
    for k in range(NK):
        row = k * BK + tl.arange(0, BK)
        bias = vector_tile(packed + UP_BIAS, k, D, BK)
        if POST:
            bias = (bias - mean) * vector_tile(packed + GAMMA, k, D, BK)
            tl.store(UP_BIAS_OUT + D + row, vector_tile(packed + GAMMA + D, k, D, BK).to(tl.float32), mask=row < D)
        tl.store(UP_BIAS_OUT + row, bias.to(tl.float32), mask=row < D)


@triton.jit
def fold_kernel(
    PACKED, SUMS, WD, WG, VECTORS, SCALE, ROOT, MEAN,
    D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, V: tl.constexpr, DOWN_BIAS: tl.constexpr, UP: tl.constexpr,
    UP_BIAS: tl.constexpr, GAMMA: tl.constexpr, PRE_GAMMA: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    NK: tl.constexpr, SIZE: tl.constexpr, BB: tl.constexpr, UNITS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Fold a part of one adapter (``reference.fold``). The grid is (n, 1 + b / UNITS rounded up), n adapters.

    Programs (.., 0), which start first because they take longest, compute R and fold the bias of W_u; programs
    (.., 1 + i) fold the i-th group of UNITS units of the bottleneck.

    Pointers, all contiguous; "compute dtype" is the dtype of the x to come (float32, bfloat16 or float16):
        PACKED   [n, P]          float32 or float64; the packed adapters
        SUMS     [n, NK, SIZE]   float64; the partial sums of ``gram_kernel`` (read if POST)
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
    adapter = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) - 1
    PACKED += adapter * P
    VECTORS += adapter * V
    MEAN += adapter * (BW + 1)
    if group < 0:
        _fold_bias(PACKED, VECTORS + BW, MEAN + BW, D, UP_BIAS, GAMMA, POST, BK)
        if POST:
            ROOT += adapter * ((BW + 1) * (BW + 1))
            SUMS += adapter * (NK * SIZE)
            _root(SUMS, ROOT, D, BW, NK, SIZE, BB)
    else:
        j = group * UNITS + tl.arange(0, UNITS)
        _fold_down(PACKED, WD + adapter * (BW * D), VECTORS, j, D, BW, DOWN_BIAS, PRE_GAMMA, PRE, BK)
        _fold_up(
            PACKED, WG + adapter * (BW * D), SCALE + adapter * BW, MEAN, j, D, BW, UP, GAMMA, POST, BK
        )  # fmt: skip


def fold(packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    """Launch the kernels: ``reference.fold`` for packed [..., P] and a compute dtype of float32, bfloat16 or
    float16."""
    d, b, pre, post = layout.arguments
    folded = Folded(*(spec.empty(packed) for spec in Folded.table(layout, packed.shape[:-1], dtype)))
    flat = packed.reshape(-1, layout.numel).contiguous()
    n = flat.shape[0]
    if n == 0:
        return folded
    # Triton before 3.9 does not compile a conversion of 16 bits to float64.
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    at = {name: part.start for name, part in layout.slices.items()}
    tile, sums_tile, BB = tiles.fold(d, b), tiles.gram(tiles.architecture(packed.device)), padded(b)
    NK, size, pairs = triton.cdiv(d, sums_tile.BM), b * b + 2 * b + 2, triton.cdiv(BB, 32)
    sums = torch.empty((n, NK, size) if post else 0, dtype=torch.float64, device=packed.device)
    with device_guard(packed):
        if post:
            gram_kernel[(NK, n, pairs * (pairs + 1) // 2)](
                flat, sums, D=d, BW=b, P=layout.numel, UP=at["up_weight"], UP_BIAS=at["up_bias"],
                SIZE=size, BB=BB, BJ=min(BB, 32), BM=sums_tile.BM, BK=sums_tile.BK,
                num_warps=sums_tile.warps, num_stages=sums_tile.stages,
            )  # fmt: skip
        fold_kernel[(n, 1 + triton.cdiv(b, UNITS))](
            flat, sums, *folded, D=d, BW=b, P=layout.numel, V=folded.vectors.shape[-1], DOWN_BIAS=at["down_bias"],
            UP=at["up_weight"], UP_BIAS=at["up_bias"], GAMMA=at.get("post_gamma", 0),
            PRE_GAMMA=at.get("pre_gamma", 0), PRE=pre, POST=post, NK=NK, SIZE=size, BB=BB,
            UNITS=UNITS, BK=tile.BK,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return folded
