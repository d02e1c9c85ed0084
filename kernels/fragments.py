"""Tiles in the order in which tensor cores take their operands, for the kernels that keep whole rows in registers.

A product of a tile of rows with a weight needs no shared memory if every thread loads exactly the numbers that the
tensor core expects of it. That is possible here because a sum over columns may run in any order, and because the
columns of a result may be computed in any order. A tile of BK columns is C = BK / 32 chunks of 32 columns, one for each
warp, and a product is C products, one per warp (``tl.dot`` in three dimensions).

- A tile of R rows is a matrix [R C, 32]: line (8 C i + 8 c + e) is chunk c of row 8 i + e. Triton gives 8 lines and 4
  groups of 8 columns to a warp at a time: 16 bytes a thread, and just the rows that the thread holds in an operand of
  the instruction m16n8k16.
- ``left`` and ``right`` name a thread's 8 columns so that they become its part of an operand. The sum runs over the 32
  columns of a warp's chunk, and ``summed`` adds the warps' sums.
- ``load_across`` loads a weight whose columns are those of the result, in such an order that a thread's part of the
  result is 8 neighbouring columns of each of its rows, as in a tile of rows (``as_rows``, ``as_product``).

Only speed depends on how Triton distributes tensors: other tiles, dtypes and GPUs give the same numbers. Matrices are
loaded in two dimensions, because Triton's versions differ in the order in which they distribute further ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import settled


@triton.jit
def lines(R: tl.constexpr, BK: tl.constexpr):
    """Return the row [R C] and the first column [R C] of every line of a tile of R rows."""
    C: tl.constexpr = BK // 32
    line = tl.arange(0, R * C)
    return line // (8 * C) * 8 + line % 8, line // 8 % C * 32


@triton.jit
def columns_of(k, first, BK: tl.constexpr):
    """Return the columns [R C, 32] of the tile of columns k*BK to (k+1)*BK. ``first`` is from ``lines``."""
    return (k * BK + first)[:, None] + tl.arange(0, 32)[None, :]


@triton.jit
def load_tile(base, first, k, ok, D: tl.constexpr, BK: tl.constexpr):
    """Load columns k*BK to (k+1)*BK of rows. ``base`` [R C] points to the start of each line's row, ``first`` is from
    ``lines``. Columns beyond D and lines that are not ``ok`` [R C] are zero."""
    column = columns_of(k, first, BK)
    mask = ok[:, None] & (column < D) if D % BK else ok[:, None]
    return tl.load(base[:, None] + column, mask=mask, other=0.0)


@triton.jit
def store_tile(base, first, value, k, ok, D: tl.constexpr, BK: tl.constexpr):
    """Store ``value``, converted to the dtype of ``base``, where ``load_tile`` would read it."""
    column = columns_of(k, first, BK)
    mask = ok[:, None] & (column < D) if D % BK else ok[:, None]
    tl.store(base[:, None] + column, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def normalised_tile(tile, mean, rstd, first, k, D: tl.constexpr, BK: tl.constexpr):
    """Return xhat = (x - mean) * rstd in float32 for the tile of columns k*BK to (k+1)*BK; ``mean`` and ``rstd`` are
    [R C, 1]. The padded columns are zero, because -mean * rstd could overflow there."""
    value = (tile.to(tl.float32) - mean) * rstd
    if D % BK:
        value = tl.where(columns_of(k, first, BK) < D, value, 0.0)
    return value


@triton.jit
def left(tile, R: tl.constexpr):
    """Return a tile of R rows as the left operands [C, R, 32] of a product over columns."""
    C: tl.constexpr = tile.shape[0] // R
    # pair p of the 4 pairs of columns of a thread q becomes columns 2q and 2q+1 of the p-th eighth
    pairs = tl.permute(tl.reshape(tile, (R // 8, C, 8, 4, 4, 2)), (1, 0, 2, 4, 3, 5))
    return tl.reshape(pairs, (C, R, 32))


@triton.jit
def load_right(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Load columns k*BK to (k+1)*BK of the contiguous matrix [BW, D] at ``base`` as the right operands [C, 32, BB] of a
    product with ``left``; zeros outside the matrix."""
    j, first = lines(BB, BK)
    return tl.permute(left(load_tile(base + j * D, first, k, j < BW, D, BK), BB), (0, 2, 1))


@triton.jit
def summed(parts):
    """Return the sum [R, BB] of the C matrices of ``parts`` [C, R, BB], added in pairs. ``tl.sum`` would pass them
    through shared memory four numbers of a thread at a time, with two barriers each."""
    C: tl.constexpr = parts.shape[0]
    R: tl.constexpr = parts.shape[1]
    BB: tl.constexpr = parts.shape[2]
    if C == 8:
        a, b = tl.split(tl.permute(tl.reshape(parts, (2, 2, 2, R, BB)), (3, 4, 0, 1, 2)))
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
    elif C == 4:
        a, b = tl.split(tl.permute(tl.reshape(parts, (2, 2, R, BB)), (2, 3, 0, 1)))
        a, b = tl.split(a + b)
    elif C == 2:
        a, b = tl.split(tl.permute(parts, (1, 2, 0)))
    else:
        a, b = tl.reshape(parts, (R, BB)), 0.0
    return settled(a + b)


@triton.jit
def by_thread(tile):
    """Return the sums [R C, 4] of each group of 8 columns of ``tile`` [R C, 32]: a thread's own."""
    return tl.sum(tl.reshape(tile, (tile.shape[0], 4, 8)), 2)


@triton.jit
def of_rows(sums, R: tl.constexpr):
    """Return the sums [R/8, 8] of R rows, from the sums [R C, 4] of the groups of their columns."""
    C: tl.constexpr = sums.shape[0] // R
    return tl.sum(tl.reshape(tl.sum(sums, 1), (R // 8, C, 8)), 1)


@triton.jit
def two_of_rows(a, b, R: tl.constexpr):
    """Return two times the sums [R] of R rows, from two times the sums [R C, 4] of the groups of their columns."""
    C: tl.constexpr = a.shape[0] // R
    parts = tl.reshape(tl.permute(tl.reshape(tl.join(a, b), (R // 8, C, 8, 8)), (1, 0, 2, 3)), (C, R, 8))
    return tl.split(tl.sum(tl.reshape(summed(parts), (R, 4, 2)), 1))


@triton.jit
def on_lines(rows, C: tl.constexpr):
    """Return one number for each of R rows, given as [R/8, 8], as [R C, 1] for the lines of a tile."""
    R8: tl.constexpr = rows.shape[0]
    return tl.reshape(tl.broadcast_to(rows[:, None, :], (R8, C, 8)), (R8 * C * 8,))[:, None]


@triton.jit
def load_across(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Load columns k*BK to (k+1)*BK of the contiguous matrix [BW, D] at ``base`` as the right operands [C, BB, 32] of a
    product that is summed over the matrix's rows; zeros outside the matrix."""
    C: tl.constexpr = BK // 32
    # Line (((2 i0 + i1) C + c) 8 + g) 4 + q is row 8 i0 + 2 q + i1 and columns 32 c + 4 g to 32 c + 4 g + 3: a thread
    # loads a pair of rows, as the operand has it, and 4 columns, which go to 4 instructions.
    line = tl.arange(0, BB * C * 8)
    j = line // (64 * C) * 8 + line % 4 * 2 + line // (32 * C) % 2
    column = (k * BK + line // 32 % C * 32 + line // 4 % 8 * 4)[:, None] + tl.arange(0, 4)[None, :]
    pointer = base + (j * D)[:, None] + column
    if D % BK == 0 and BW == BB:
        tile = tl.load(pointer)
    else:
        tile = tl.load(pointer, mask=(j < BW)[:, None] & (column < D), other=0.0)
    return tl.reshape(tl.permute(tl.reshape(tile, (BB // 8, 2, C, 8, 4, 4)), (2, 0, 4, 1, 5, 3)), (C, BB, 32))


@triton.jit
def as_rows(product):
    """Return a product [C, R, 32] with ``load_across`` as a tile of R rows."""
    C: tl.constexpr = product.shape[0]
    R: tl.constexpr = product.shape[1]
    return tl.reshape(tl.permute(tl.reshape(product, (C, R // 8, 8, 4, 4, 2)), (1, 0, 2, 4, 5, 3)), (R * C, 32))


@triton.jit
def as_product(tile, R: tl.constexpr):
    """The inverse of ``as_rows``."""
    C: tl.constexpr = tile.shape[0] // R
    return tl.reshape(tl.permute(tl.reshape(tile, (R // 8, C, 8, 4, 2, 4)), (1, 0, 2, 5, 3, 4)), (C, R, 32))


@triton.jit
def load_columns(base, k, R: tl.constexpr, D: tl.constexpr, BK: tl.constexpr):
    """Load entries k*BK to (k+1)*BK of the vector [D] at ``base`` in float32, the same for each of R rows of a tile;
    zeros beyond D."""
    C: tl.constexpr = BK // 32
    # Line ((4-column half h) C + c) 32 + 4 e + q: a thread loads 16 bytes of float32 twice, its neighbours the same.
    line = tl.arange(0, C * 64)
    column = (k * BK + line // 32 % C * 32 + line % 4 * 8 + line // (32 * C) * 4)[:, None] + tl.arange(0, 4)[None, :]
    value = tl.load(base + column) if D % BK == 0 else tl.load(base + column, mask=column < D, other=0.0)
    value = tl.permute(tl.reshape(value.to(tl.float32), (2, C, 8, 4, 4)), (1, 2, 3, 0, 4))
    value = tl.broadcast_to(tl.reshape(value, (1, C * 8, 32)), (R // 8, C * 8, 32))
    return tl.reshape(value, (R * C, 32))
