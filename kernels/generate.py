"""``generate_weights`` in Triton: one launch generates the adapters of a whole stack for all tasks.

Each program handles BP rows of one generator. It loads those rows of G once and multiplies every embedding by them, so
that G, by far the largest operand, is read from memory once per step.

Plain float32 products would take longer than the memory does, because there are n products for each number of G. On
NVIDIA GPUs a float32 product is therefore three products of tf32, of a rounded part and a rest (``_halves``). At most
2^-20 of a product is lost, where a float32 product loses 2^-24, and of subnormal numbers at most 2^-148. A tile with a
result that is NaN is computed again with plain products, because an infinity has no rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import LENGTHS, device_guard, matmul_precision, rounded


@triton.jit
def _tile(base, row, row_ok, k, K: tl.constexpr, BK: tl.constexpr):
    """Load [rows, BK]: columns k*BK to (k+1)*BK of the rows ``row`` of a contiguous matrix [.., K] at ``base``. Columns
    beyond K and rows that are not ``row_ok`` are zero."""
    column = k * BK + tl.arange(0, BK)
    mask = row_ok[:, None] & (column < K)[None, :] if K % BK else row_ok[:, None]
    return tl.load(base + row.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0)


@triton.jit
def _halves(x):
    """Split float32 ``x`` into x = high + rest / 2^11, where ``high`` is tf32. The scale keeps the rest of a small x
    from underflow. For infinities and NaN the rest is NaN."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    high = bits.to(tl.float32, bitcast=True)
    return high, (x - high) * 2048.0


@triton.jit
def _product(a, b, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + a b for ``a`` [BN, BK] and ``b`` [BK, BP], in float32."""
    if SPLIT:
        # The three products are added to each other first: tensor cores round their sums toward zero, which over many
        # columns would be a bias, while ``total`` is rounded to nearest.
        a_high, a_rest = _halves(a)
        b_high, b_rest = _halves(b)
        small = tl.dot(a_rest, b_high, input_precision="tf32")
        small = tl.dot(a_high, b_rest, small, input_precision="tf32") * 4.8828125e-4  # 2^-11
        total += tl.dot(a_high, b_high, small, input_precision="tf32")
    else:
        total = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), total, input_precision=PRECISION)
    return total


@triton.jit
def _plain_product(E, i, i_ok, G, p, p_ok, K: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """Return rows ``i`` of E times rows ``p`` of G, transposed, in plain float32, as [BN, BP]."""
    total = tl.zeros((BN, BP), tl.float32)
    for k in range((K + 15) // 16):
        piece = tl.trans(_tile(G, p, p_ok, k, K, 16))
        total = tl.dot(_tile(E, i, i_ok, k, K, 16), piece, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=LENGTHS)
def generate_kernel(
    E, G, G0, PACKED, n, P: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute packed[q, i] = G[q] @ E[q, i] + g0[q]. The grid is (P / BP rounded up, Q).

    Pointers, all contiguous and of one dtype (float32, bfloat16 or float16):
        E       [Q, n, K]  embeddings
        G       [Q, P, K]  generators
        G0      [Q, P]     their biases
        PACKED  [Q, n, P]  output

    SPLIT makes a float32 product of three tf32 products. n is the number of embeddings per generator. BN, BP and BK are
    the tile's embeddings, rows of G and columns; NK is how many tiles of BK columns cover K. If NK is 1, the program's
    rows of G stay on chip for all embeddings.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    generator = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    p_ok = p < P
    E += generator * n * K
    G += generator * P * K
    PACKED += generator * n * P
    bias = tl.load(G0 + generator * P + p, mask=p_ok, other=0.0).to(tl.float32)
    if NK == 1:
        held = tl.trans(_tile(G, p, p_ok, 0, K, BK))
    for start in range(0, n, BN):
        i = start + tl.arange(0, BN)
        i_ok = i < n
        total = tl.zeros((BN, BP), tl.float32)
        if NK == 1:
            total = _product(_tile(E, i, i_ok, 0, K, BK), held, total, SPLIT, PRECISION)
        else:
            for k in range(NK):
                piece = tl.trans(_tile(G, p, p_ok, k, K, BK))
                total = _product(_tile(E, i, i_ok, k, K, BK), piece, total, SPLIT, PRECISION)
        if SPLIT:
            if tl.sum(tl.where(total != total, 1.0, 0.0)) > 0.0:
                total = _plain_product(E, i, i_ok, G, p, p_ok, K, BN, BP)
        value = (total + bias[None, :]).to(PACKED.dtype.element_ty)
        tl.store(PACKED + i.to(tl.int64)[:, None] * P + p[None, :], value, mask=i_ok[:, None] & p_ok[None, :])


def generate_weights(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    """Launch ``generate_kernel``: ``reference.generate_weights`` for E [Q, n, k], G [Q, P, k] and g0 [Q, P] in float32,
    bfloat16 or float16."""
    (Q, n, K), P = E.shape, G.shape[1]
    packed = torch.empty(Q, n, P, dtype=E.dtype, device=E.device)
    if packed.numel() == 0:
        return packed
    if K == 0:
        return packed.copy_(g0.unsqueeze(1))
    tile, precision = tiles.generate(K, E.dtype), matmul_precision(E.dtype)
    with device_guard(E):
        generate_kernel[(triton.cdiv(P, tile.BM), Q)](
            E.contiguous(), G.contiguous(), g0.contiguous(), packed, n, P=P, K=K,
            SPLIT=E.dtype == torch.float32 and precision == "ieee" and not torch.version.hip, PRECISION=precision,
            BN=32, BP=tile.BM, BK=tile.BK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return packed
