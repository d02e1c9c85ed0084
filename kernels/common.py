"""What the Triton kernels share: activations, the map from programs to rows, and how their hosts read tensors.

A tile of rows belongs to one sample, hence to one task. Rows of x and g lie at ``sample * stride_sample + row *
stride_row``, both counted in units of ALIGN numbers: the compiler then knows how a row is aligned, and vectorises,
without a specialisation on the strides' values (which would compile again when a batch's length changes).

Letters: N rows, d width, b bottleneck, T tasks, P packed numbers per adapter, B samples of M rows each. In kernels D
and b's padded power of two BB are constants, as are the flags; lengths never are.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Lengths and strides: no kernel is compiled anew for one of their values.
LENGTHS = (
    "B",
    "M",
    "T",
    "n",
    "stride_sample",
    "stride_row",
    "g_stride_sample",
    "g_stride_row",
    "units_per_split",
    "splits",
)


@triton.jit
def sigmoid_parts(u):
    """sigmoid(u) and its derivative. Both come from exp(-|u|), which is at most 1: nothing overflows or cancels."""
    e = tl.exp(-tl.abs(u))
    q = 1.0 / (1.0 + e)
    return tl.where(u < 0.0, e, 1.0) * q, e * q * q


@triton.jit
def gelu_new_argument(z):
    """The u of gelu_new(z) = z sigmoid(u), and du/dz.

    Beyond z^2 = 200 the sigmoid's derivative is exactly 0. There z^2 is limited, so that du/dz stays finite and their
    product is 0, not NaN."""
    square = tl.minimum(z * z, 200.0)
    return 1.5957691216057308 * z * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z) in float32; ACT is the index in ``activations.ACTIVATIONS``: gelu_new, gelu, relu, silu."""
    if ACT == 0:
        u, _ = gelu_new_argument(z)
        s, _ = sigmoid_parts(u)
        h = z * s
    elif ACT == 1:
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == 2:
        h = tl.where(z <= 0.0, 0.0, z)  # not z > 0: a NaN must pass
    else:
        s, _ = sigmoid_parts(z)
        h = z * s
    return h


@triton.jit
def activate_grad(z, ACT: tl.constexpr):
    """d act(z) / dz in float32."""
    if ACT == 0:
        u, du = gelu_new_argument(z)
        s, ds = sigmoid_parts(u)
        slope = s + z * ds * du
    elif ACT == 1:
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == 2:
        slope = tl.where(z <= 0.0, 0.0, 1.0)  # NaN has the derivative 1, as in torch
    else:
        s, ds = sigmoid_parts(z)
        slope = s + z * ds
    return slope


@triton.jit
def task_of(TASK, sample, T, MIXED: tl.constexpr):
    """The sample's task, the row of weights that may be read for it, and whether the two are the same."""
    task = tl.load(TASK + sample).to(tl.int64) if MIXED else tl.full((), 0, tl.int64)
    valid = (task >= 0) & (task < T)
    return task, tl.where(valid, task, 0), valid


@triton.jit
def rows_of_unit(unit, M, BM: tl.constexpr):
    """The ``unit``-th tile of BM rows: its sample, the rows within it, which of them there are, and their places among
    all rows, in 64 bits."""
    per_sample = (M + BM - 1) // BM
    sample = unit // per_sample
    row = (unit - sample * per_sample) * BM + tl.arange(0, BM)
    return sample, row, row < M, sample.to(tl.int64) * M + row


@triton.jit
def row_start(sample, row, stride_sample, stride_row, ALIGN: tl.constexpr):
    """Where rows start, in 64 bits: N d may pass 2^31."""
    return (sample.to(tl.int64) * stride_sample + row.to(tl.int64) * stride_row) * ALIGN


@triton.jit
def load_rows(base, k, row_ok, D: tl.constexpr, BK: tl.constexpr):
    """Columns k*BK .. of the rows at ``base`` [BM]; zeros outside."""
    column = k * BK + tl.arange(0, BK)
    mask = row_ok[:, None] & (column < D)[None, :] if D % BK else row_ok[:, None]
    return tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, value, k, row_ok, D: tl.constexpr, BK: tl.constexpr):
    column = k * BK + tl.arange(0, BK)
    mask = row_ok[:, None] & (column < D)[None, :] if D % BK else row_ok[:, None]
    tl.store(base[:, None] + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_sum(base, a, branch, k, row_ok, task, valid, D: tl.constexpr, BK: tl.constexpr, MIXED: tl.constexpr):
    """Write a + branch; a itself, bit for bit, where the sample has no task; NaN where it has one that is not there."""
    out = (a.to(tl.float32) + branch).to(a.dtype)
    if MIXED:
        out = tl.where(task == -1, a, tl.where(valid, out, float("nan")))
    store_rows(base, out, k, row_ok, D, BK)


@triton.jit
def load_weight(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """[BB, BK]: columns k*BK .. of the BW rows of D numbers at ``base``; zeros outside."""
    j = tl.arange(0, BB)
    column = k * BK + tl.arange(0, BK)
    pointer = base + j[:, None] * D + column[None, :]
    if D % BK == 0 and BW == BB:
        tile = tl.load(pointer)
    else:
        tile = tl.load(pointer, mask=(j < BW)[:, None] & (column < D)[None, :], other=0.0)
    return tile


@triton.jit
def load_vector(base, k, D: tl.constexpr, BK: tl.constexpr):
    """[BK] in float32: numbers k*BK .. of the D at ``base``; zeros outside."""
    column = k * BK + tl.arange(0, BK)
    value = tl.load(base + column) if D % BK == 0 else tl.load(base + column, mask=column < D, other=0.0)
    return value.to(tl.float32)


@triton.jit
def normalised(x, mean, rstd, k, D: tl.constexpr, BK: tl.constexpr):
    """xhat, zero in the padded columns, where -mean / std could be infinite in float16."""
    column = k * BK + tl.arange(0, BK)
    value = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if D % BK:
        value = tl.where((column < D)[None, :], value, 0.0)
    return value.to(x.dtype)


@triton.jit
def some_columns(a, c, M: tl.constexpr, K: tl.constexpr):
    """Columns 16c .. 16c+15 of a [M, K]."""
    pieces = tl.reshape(a, (M, K // 16, 16))
    mine = tl.arange(0, K // 16) == c
    return tl.sum(tl.where(mine[None, :, None], pieces, 0.0), 1)


@triton.jit
def root_product(a, base, start, TRANSPOSED: tl.constexpr, BW: tl.constexpr, M: tl.constexpr, BB: tl.constexpr):
    """start + a R_b for a [M, BB], or a R_b^T; R [b+1, b+1] at ``base``, R_b all of it but its last row and column.

    Never in tf32: columns that nearly cancel meet here. Sixteen columns of ``a`` at a time, because a float32 product
    without tensor cores holds both operands in registers, and a bottleneck of 64 would spill."""
    j = tl.arange(0, BB)
    for c in range(BB // 16):
        i = c * 16 + tl.arange(0, 16)
        ok = (i < BW)[:, None] & (j < BW)[None, :]
        if TRANSPOSED:
            piece = tl.load(base + j[None, :] * (BW + 1) + i[:, None], mask=ok, other=0.0)
        else:
            piece = tl.load(base + i[:, None] * (BW + 1) + j[None, :], mask=ok, other=0.0)
        start = tl.dot(some_columns(a, c, M, BB), piece, start, input_precision="ieee")
    return start


@triton.jit
def root_rows(h, base, BW: tl.constexpr, M: tl.constexpr, BB: tl.constexpr):
    """The first b entries of q = R [h ; 1] for rows h [M, BB], and the last one, which all rows have in common."""
    j = tl.arange(0, BB)
    bias = tl.load(base + j * (BW + 1) + BW, mask=j < BW, other=0.0)
    q = root_product(h, base, tl.zeros((M, BB), tl.float32) + bias[None, :], True, BW, M, BB)
    return q, tl.load(base + (BW + 1) * (BW + 1) - 1)


class Rows(NamedTuple):
    """x's rows as a kernel takes them: B samples of M rows."""

    data: Tensor
    B: int
    M: int
    stride_sample: int
    stride_row: int
    align: int


def rows_of(x: Tensor, task_index: Tensor | None, align: int | None = None) -> Rows:
    """View x [..., d] as B samples of M rows; it is copied only where its rows are not contiguous, or have no common
    stride."""
    d = x.shape[-1]
    B = 1 if task_index is None else x.shape[0]
    M = math.prod(x.shape[:-1]) // B if B else 0
    data = x.reshape(B, M, d)
    if data.stride(2) != 1 and d > 1:
        data = data.contiguous()
    sample, row = (0 if B == 1 else data.stride(0)), (0 if M == 1 else data.stride(1))
    unit = math.gcd(sample, row, align or 16) or 16
    return Rows(data, B, M, sample // unit, row // unit, unit)


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's name for how float32 operands are multiplied; torch's setting decides."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if dtype != torch.float32 or highest or torch.version.hip else "tf32"


def device_guard(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(b: int) -> int:
    """The bottleneck's tile: a power of two that tensor cores take."""
    return max(16, next_power_of_two(b))
