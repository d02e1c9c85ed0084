"""What the Triton kernels share: activations, the mapping from programs to rows, and how the host reads tensors.

A tile of rows belongs to one sample, and therefore to one task. A row of x or g starts ``(sample * stride_sample + row
* stride_row) * ALIGN`` elements behind the pointer: strides are counted in units of ALIGN elements, so that the
compiler knows how every row is aligned and can vectorise its loads without specialising on the strides' values. Such a
specialisation would recompile whenever the length of a batch changes.

Letters: N rows, d width, b bottleneck, T tasks, P packed numbers per adapter, B samples of M rows each.

Pointers and compile-time constants have upper-case names. These constants mean the same in every kernel:

    D, BW           d and b
    BB              b padded to a power of two, at least 16 (``padded``)
    BM, BK          rows and columns of a tile (tiles.py)
    NK              how many tiles of BK columns cover d
    ACT             index of the activation in ``activations.ACTIVATIONS``
    PRE, POST       whether the adapter has a pre-norm, a post-norm
    MIXED           whether TASK names a task per sample; otherwise it is None and all rows use the weights of task 0
    KEEP            whether whole rows stay in registers between two passes over their columns
    ALIGN, G_ALIGN  the unit of the strides of x and of g
    PRECISION       how ``tl.dot`` multiplies float32 operands (``matmul_precision``); they pass ``rounded`` before

Lengths (M, T, n, ...) and strides are run-time arguments.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Passed to do_not_specialize: new lengths or strides must not recompile.
LENGTHS = (
    "B",
    "M",
    "T",
    "n",
    "stride_sample",
    "stride_row",
    "g_stride_sample",
    "g_stride_row",
    "splits",
    "segments",
    "share",
    "per_sample",
    "N",
    "hidden_stride",
    "y_stride",
    "g_out_stride",
    "g_normed_stride",
    "out_stride",
    "a_stride",
    "c_stride",
    "g_stride",
    "stream",
    "threshold",
    "heads",
    "queries",
    "keys",
    "scores_b",
    "scores_h",
    "scores_q",
    "bias_b",
    "bias_h",
    "bias_q",
    "mask_b",
    "mask_h",
    "mask_q",
    "ignore_index",
)

#: Passed to do_not_specialize_on_alignment: a site's part of a stack's tensors starts at any multiple of 4 bytes, for
#: example [b+1, b+1] matrices of an even b. Each kernel would be compiled once for the sites that happen to start at a
#: multiple of 16 bytes, and once for the others. These tensors are read a number at a time, so nothing is lost.
#: VECTORS is not among them: its loads of whole rows would become narrow, and where d and b are multiples of 4 every
#: site's part is aligned.
UNALIGNED = ("ROOT", "MEAN", "SCALE", "R", "M2", "S", "PRE_MEAN", "PRE_RSTD")


@triton.jit
def sigmoid(u):
    """Return sigmoid(u). Where exp(-u) overflows to infinity, the result is exactly 0."""
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def sigmoid_parts(u):
    """Return sigmoid(u) and its derivative.

    Both are computed from exp(-|u|), which is at most 1, so that nothing overflows or cancels."""
    e = tl.exp(-tl.abs(u))
    q = 1.0 / (1.0 + e)
    return tl.where(u < 0.0, e, 1.0) * q, e * q * q


@triton.jit
def gelu_new_argument(z):
    """Return u and du/dz, where gelu_new(z) = z sigmoid(u) and u = 2 sqrt(2 / pi) (z + 0.044715 z^3).

    For z^2 > 200 the sigmoid's derivative is exactly 0 in float32. z^2 is clamped there, so that du/dz stays finite and
    the product of the two is 0 instead of NaN."""
    square = tl.minimum(z * z, 200.0)
    # 1.5957... is 2 sqrt(2 / pi), 0.134145 is 3 * 0.044715.
    return 1.5957691216057308 * z * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """Return act(z) for z in float32. ACT = 0 is gelu_new, 1 gelu, 2 relu, 3 silu."""
    if ACT == 0:
        # A value alone needs no clamp, and fewer registers without: z^3 may overflow, since sigmoid takes infinities.
        h = z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == 1:
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # 0.7071... is 1 / sqrt(2)
    elif ACT == 2:
        h = tl.where(z <= 0.0, 0.0, z)  # z <= 0 rather than z > 0: a NaN must propagate
    else:
        h = z * sigmoid(z)
    return h


@triton.jit
def activate_grad(z, ACT: tl.constexpr):
    """Return d act(z) / dz for z in float32."""
    if ACT == 0:
        u, du = gelu_new_argument(z)
        s, ds = sigmoid_parts(u)
        slope = s + z * ds * du
    elif ACT == 1:
        # Phi(z) + z phi(z), the normal distribution and its density; 0.3989... is 1 / sqrt(2 pi).
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == 2:
        slope = tl.where(z <= 0.0, 0.0, 1.0)  # a NaN has the derivative 1, as in torch
    else:
        s, ds = sigmoid_parts(z)
        slope = s + z * ds
    return slope


@triton.jit
def task_of(TASK, sample, T, MIXED: tl.constexpr):
    """Return the sample's task, the index of the weights to read for it, and whether the task is valid (0 .. T-1).

    TASK points to [B] int32 or int64, and is read only if MIXED. A sample with another task (-1 for none, or out of
    range) reads the weights of task 0, which are always there; its results are replaced before they are stored."""
    task = tl.load(TASK + sample).to(tl.int64) if MIXED else tl.full((), 0, tl.int64)
    valid = (task >= 0) & (task < T)
    return task, tl.where(valid, task, 0), valid


@triton.jit
def rows_of_unit(unit, M, BM: tl.constexpr):
    """Locate the ``unit``-th tile of BM rows.

    Returns its sample, the indices [BM] of its rows within the sample, a mask [BM] of the rows that exist, and the
    indices [BM] of its rows among all N rows, as int64."""
    per_sample = (M + BM - 1) // BM
    sample = unit // per_sample
    row = (unit - sample * per_sample) * BM + tl.arange(0, BM)
    return sample, row, row < M, sample.to(tl.int64) * M + row


@triton.jit
def row_start(sample, row, stride_sample, stride_row, ALIGN: tl.constexpr):
    """Return the offset in elements at which each row starts, as int64 because N d may exceed 2^31."""
    return (sample.to(tl.int64) * stride_sample + row.to(tl.int64) * stride_row) * ALIGN


@triton.jit
def to_tf32(x):
    """Round float32 to tf32: magnitudes to nearest, ties away from zero. Tensor cores read the first 19 bits of
    float32 and drop the others, which would shrink every operand by 2^-12 on average.

    Finite numbers stay finite: those that would round to infinity are truncated. Infinities and NaN stay what they
    are."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    nearest = (bits + tl.where(magnitude < 0x7F7FF000, 0x1000, 0)) & -0x2000
    return tl.where(magnitude > 0x7F800000, bits, nearest).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """Return ``x`` as an operand of a ``tl.dot`` whose ``input_precision`` is PRECISION: float32 is rounded to tf32 if
    PRECISION is "tf32". Anything else is returned as it is."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = to_tf32(x)
    return x


@triton.jit
def load_rows(base, k, row_ok, D: tl.constexpr, BK: tl.constexpr):
    """Load [BM, BK]: columns k*BK to (k+1)*BK of the rows that start at the pointers ``base`` [BM]. Columns beyond D
    and rows that are not ``row_ok`` are zero."""
    column = k * BK + tl.arange(0, BK)
    mask = row_ok[:, None] & (column < D)[None, :] if D % BK else row_ok[:, None]
    return tl.load(base[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, value, k, row_ok, D: tl.constexpr, BK: tl.constexpr):
    """Store ``value`` [BM, BK], converted to the dtype of ``base``, where ``load_rows`` would read it."""
    column = k * BK + tl.arange(0, BK)
    mask = row_ok[:, None] & (column < D)[None, :] if D % BK else row_ok[:, None]
    tl.store(base[:, None] + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def copy_or_nan(base, source, task, row_ok, D: tl.constexpr, BK: tl.constexpr):
    """Store the results of a sample without a valid task into the rows at ``base`` [BM], BK columns at a time: for no
    task (-1) the rows at ``source`` [BM], bit for bit, and NaN for a task out of range."""
    for k in range((D + BK - 1) // BK):
        row = load_rows(source, k, row_ok, D, BK)
        store_rows(base, tl.where(task == -1, row, float("nan")), k, row_ok, D, BK)


@triton.jit
def load_weight(base, k, D: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr):
    """Load [BB, BK]: columns k*BK to (k+1)*BK of the contiguous matrix [BW, D] at ``base``; zeros outside it."""
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
    """Load [BK] in float32: entries k*BK to (k+1)*BK of the vector [D] at ``base``; zeros beyond it."""
    column = k * BK + tl.arange(0, BK)
    value = tl.load(base + column) if D % BK == 0 else tl.load(base + column, mask=column < D, other=0.0)
    return value.to(tl.float32)


@triton.jit
def normalised(x, mean, rstd, k, D: tl.constexpr, BK: tl.constexpr):
    """Return xhat = (x - mean) * rstd in x's dtype, for columns k*BK to (k+1)*BK. The padded columns are set to zero,
    because -mean * rstd could overflow there in float16."""
    column = k * BK + tl.arange(0, BK)
    value = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if D % BK:
        value = tl.where((column < D)[None, :], value, 0.0)
    return value.to(x.dtype)


@triton.jit
def settled(a):
    """Return ``a`` [M, K]. Triton repeats the computation of a tensor for each of the ways in which its users need it
    distributed, however many threads then compute the same; it never repeats a sum."""
    return tl.sum(a[:, :, None], 2)


@triton.jit
def some_columns(a, c, M: tl.constexpr, K: tl.constexpr):
    """Return columns 16c to 16c+15 of the register tile ``a`` [M, K], as [M, 16]."""
    pieces = tl.reshape(a, (M, K // 16, 16))
    mine = tl.arange(0, K // 16) == c
    return tl.sum(tl.where(mine[None, :, None], pieces, 0.0), 1)


@triton.jit
def load_root(base, c, TRANSPOSED: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr, STEP: tl.constexpr):
    """Load rows STEP*c to STEP*(c+1) of R_b, or of R_b^T if TRANSPOSED, as [STEP, BB]; zeros beyond b.

    ``base`` points to R [b+1, b+1] in float32; R_b is R without its last row and column."""
    # Loaded as a vector, because Triton gives a transposed load a transposed place in shared memory, where the threads'
    # reads of the product would collide.
    at = tl.arange(0, STEP * BB)
    i = c * STEP + at // BB
    j = at % BB
    offset = j * (BW + 1) + i if TRANSPOSED else i * (BW + 1) + j
    return tl.reshape(tl.load(base + offset, mask=(i < BW) & (j < BW), other=0.0), (STEP, BB))


@triton.jit
def root_product(
    a, base, start, TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BW: tl.constexpr, M: tl.constexpr, BB: tl.constexpr
):  # fmt: skip
    """Return start + a R_b, or start + a R_b^T if TRANSPOSED, for ``a`` and ``start`` [M, BB] in float32.

    ``base`` points to R [b+1, b+1] in float32; R_b is R without its last row and column. The product is never computed
    in tf32, because columns that nearly cancel are added here. It takes sixteen columns of ``a`` at a time, because
    without tensor cores ``tl.dot`` holds both operands in registers. If WHOLE, and BB is at most 32, it takes all."""
    if BB <= 16 or (WHOLE and BB <= 32):
        start = tl.dot(a, load_root(base, 0, TRANSPOSED, BW, BB, BB), start, input_precision="ieee")
    else:
        for c in range(BB // 16):
            piece = load_root(base, c, TRANSPOSED, BW, BB, 16)
            start = tl.dot(some_columns(a, c, M, BB), piece, start, input_precision="ieee")
    return start


@triton.jit
def load_last(base, BW: tl.constexpr, BB: tl.constexpr):
    """Load the last column of R but for its end, as [BB] with zeros beyond b, and its end, R's last diagonal entry.
    R is upper triangular, so that entry is also the last of R [h ; 1], whatever h."""
    j = tl.arange(0, BB)
    return tl.load(base + j * (BW + 1) + BW, mask=j < BW, other=0.0), tl.load(base + (BW + 1) * (BW + 1) - 1)


class Rows(NamedTuple):
    """The rows of x as a kernel reads them."""

    data: Tensor  #: [B, M, d] with contiguous rows
    B: int  #: samples; 1 without ``task_index``
    M: int  #: rows per sample
    stride_sample: int  #: in units of ``align`` elements
    stride_row: int  #: in units of ``align`` elements
    align: int  #: elements; divides both strides of ``data``


def rows_of(x: Tensor, task_index: Tensor | None, align: int | None = None) -> Rows:
    """View x [..., d] as B samples of M rows. x is copied only if the elements of a row are not contiguous, or if the
    rows of a sample have no common stride.

    Args:
        x: the tensor whose rows a kernel reads.
        task_index: [B] with several tasks in the batch; None makes all rows one sample.
        align: what the unit of the strides must divide; None is 16.
    """
    d = x.shape[-1]
    B = 1 if task_index is None else x.shape[0]
    M = math.prod(x.shape[:-1]) // B if B else 0
    data = x.reshape(B, M, d)
    if data.stride(2) != 1 and d > 1:
        data = data.contiguous()
    sample, row = (0 if B == 1 else data.stride(0)), (0 if M == 1 else data.stride(1))
    unit = math.gcd(sample, row, align or 16) or 16
    return Rows(data, B, M, sample // unit, row // unit, unit)


def aligned_rows(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int], int, int]:
    """View tensors [..., n] of one shape as N rows each, as :func:`rows_of` does.

    Returns:
        The tensors, None where one is None; the stride of each one's rows, in units that are the same for all; that
        unit, in elements; and N.
    """
    found = [None if t is None else rows_of(t, None) for t in tensors]
    unit = math.gcd(*(rows.align for rows in found if rows is not None))
    strides = [0 if rows is None else rows.stride_row * (rows.align // unit) for rows in found]
    N = next(rows.M for rows in found if rows is not None)
    return [None if rows is None else rows.data for rows in found], strides, unit, N


def matmul_precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of ``tl.dot``: "tf32" for float32 operands if torch allows it, otherwise "ieee".

    ``torch.backends.cuda.matmul.fp32_precision`` answers whichever of torch's settings was used, and inherits from
    ``torch.backends.fp32_precision``. The older getters raise once a newer setting was used, as
    ``TrainingArguments(tf32=True)`` uses it."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def device_guard(t: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def padded(b: int) -> int:
    """b rounded up to a power of two of at least 16, the smallest side that ``tl.dot`` accepts."""
    return max(16, next_power_of_two(b))
