"""The first launch of ``fold``: sums of products of columns of [W_u | b_u] over stretches of rows, in float64.

The sums are taken of W_u minus its first row, so that a large common mean costs no digits: with s the column sums, the
centred sums are S - s s^T / d, which loses at most a factor of d + 1. The products are tiles of 32 columns, because
some versions of Triton send wider float64 products to Blackwell's tcgen05, which has none.

The partial sums of one adapter over one stretch of rows are SIZE numbers in float64, all of columns minus their first
entry:

    gram [b, b]     products of two columns of W_u
    border [b]      products with b_u
    sums [b]        of each column of W_u
    corner          products of b_u with itself
    bias_sum        of b_u
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vector_tile(base, k, D: tl.constexpr, BK: tl.constexpr):
    """Load [BK] in float64: entries k*BK to (k+1)*BK of the vector [D] at ``base``; zeros beyond it."""
    column = k * BK + tl.arange(0, BK)
    return tl.load(base + column, mask=column < D, other=0.0).to(tl.float64)


@triton.jit
def up_tile(base, k, j, D: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr):
    """Load [BK, len(j)] in float64: rows k*BK to (k+1)*BK and columns ``j`` of W_u [d, b], to which ``base`` points;
    zeros outside it."""
    row = k * BK + tl.arange(0, BK)
    mask = (row < D)[:, None] & (j < BW)[None, :]
    return tl.load(base + row[:, None] * BW + j[None, :], mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _shifted(base, k, j, D: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr):
    """``up_tile`` minus the first row of W_u; zeros outside it."""
    row_ok = k * BK + tl.arange(0, BK) < D
    first = tl.load(base + j, mask=j < BW, other=0.0).to(tl.float64)
    return tl.where(row_ok[:, None], up_tile(base, k, j, D, BW, BK) - first[None, :], 0.0)


@triton.jit
def _shifted_bias(base, k, D: tl.constexpr, BK: tl.constexpr):
    """``vector_tile`` minus the vector's first entry; zeros beyond it."""
    row_ok = k * BK + tl.arange(0, BK) < D
    return tl.where(row_ok, vector_tile(base, k, D, BK) - tl.load(base).to(tl.float64), 0.0)


@triton.jit
def gram_kernel(
    PACKED, SUMS, D: tl.constexpr, BW: tl.constexpr, P: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr,
    SIZE: tl.constexpr, BB: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum products of columns of [W_u | b_u] over BM rows. The grid is (d / BM rounded up, n, pairs of BJ columns).

    Pointers, all contiguous:
        PACKED   [n, P]           float32 or float64; the packed adapters
        SUMS     [n, NK, SIZE]    float64; output, the partial sums

    BK, which divides BM, is how many rows one product takes. BJ divides BB; NJ tiles of BJ columns have NJ (NJ + 1) / 2
    pairs, and the product of a pair is stored on both sides of the diagonal. UP and UP_BIAS are the offsets of W_u and
    b_u within a packed adapter.
    """
    NK: tl.constexpr = (D + BM - 1) // BM
    stretch = tl.program_id(0)
    adapter = tl.program_id(1).to(tl.int64)
    left = tl.program_id(2)
    right = tl.full((), 0, tl.int32)
    for _ in tl.static_range(BB // BJ - 1):  # pairs (0, 0), (0, 1), (1, 1), (0, 2), ...
        beyond = left > right
        left -= tl.where(beyond, right + 1, 0)
        right += tl.where(beyond, 1, 0)
    PACKED += adapter * P
    SUMS += (adapter * NK + stretch) * SIZE
    i = left * BJ + tl.arange(0, BJ)
    j = right * BJ + tl.arange(0, BJ)
    gram = tl.zeros((BJ, BJ), tl.float64)
    border = tl.zeros((BJ,), tl.float64)
    sums = tl.zeros((BJ,), tl.float64)
    corner = tl.zeros((), tl.float64)
    bias_sum = tl.zeros((), tl.float64)
    for k in range(BM // BK):
        k += stretch * (BM // BK)
        b = _shifted(PACKED + UP, k, j, D, BW, BK)
        if BB == BJ:
            a = b
        else:
            a = _shifted(PACKED + UP, k, i, D, BW, BK)
        gram = tl.dot(tl.trans(a), b, gram, out_dtype=tl.float64)
        bias = _shifted_bias(PACKED + UP_BIAS, k, D, BK)
        border += tl.sum(b * bias[:, None], 0)
        sums += tl.sum(b, 0)
        corner += tl.sum(bias * bias, 0)
        bias_sum += tl.sum(bias, 0)
    ok = (i < BW)[:, None] & (j < BW)[None, :]
    tl.store(SUMS + i[:, None] * BW + j[None, :], gram, mask=ok)
    if left == right:
        tl.store(SUMS + BW * BW + j, border, mask=j < BW)
        tl.store(SUMS + BW * BW + BW + j, sums, mask=j < BW)
        if left == 0:
            tl.store(SUMS + BW * BW + 2 * BW, corner)
            tl.store(SUMS + BW * BW + 2 * BW + 1, bias_sum)
    else:
        tl.store(SUMS + j[None, :] * BW + i[:, None], gram, mask=ok)
