"""dropout(softmax(scores + bias + mask)) of attention, and its backward.

The rows of [B, heads, queries, keys] are those of dropout, too. Bias and mask are read where they lie: what they are
broadcast along has a stride of 0. Up to ``tiles.MOST_KEPT`` keys a row is read once; a longer one is read again, from
a cache, once its largest number and its sum are known.

A row whose scores are all -inf, as where a mask leaves nothing to attend to, has probabilities of 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Dropout
from . import tiles
from .common import LENGTHS, aligned_rows, device_guard
from .dropout import dropout_arguments, dropped_out
from .launch import Plans, kind_of, launch

_plans = Plans()

#: The kinds of a mask: none, one to add, and one that says where to attend.
_NO_MASK, _ADDED, _BOOLEAN = range(3)


@triton.jit
def _added_tile(
    SCORES, BIAS, MASK, scores_at, bias_at, mask_at, column, ok, BIAS_STEP: tl.constexpr, MASK_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASK_KIND: tl.constexpr,
):  # fmt: skip
    """Return the columns ``column`` [BK] of scores + bias + mask, in float32, as [BM, BK]; -inf where not ``ok``."""
    total = tl.load(SCORES + scores_at[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(BIAS + bias_at[:, None] + column[None, :] * BIAS_STEP, mask=ok, other=0.0).to(tl.float32)
    if MASK_KIND == 1:
        total += tl.load(MASK + mask_at[:, None] + column[None, :] * MASK_STEP, mask=ok, other=0.0).to(tl.float32)
    if MASK_KIND == 2:
        attended = tl.load(MASK + mask_at[:, None] + column[None, :] * MASK_STEP, mask=ok, other=0)
        total = tl.where(attended != 0, total, float("-inf"))
    return tl.where(ok, total, float("-inf"))


@triton.jit
def _finite(largest):
    """Return what to subtract before exponentials: 0 instead of a largest number of -inf, of which nothing is left."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _store_tile(
    OUT, PROBABILITIES, value, SEED, stream, threshold, scale, row, keys, first, column, ok, SAVE: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store the probabilities ``value`` [BM, BK], and their dropout."""
    at = row[:, None] * keys + column[None, :]
    if SAVE:
        tl.store(PROBABILITIES + at, value.to(PROBABILITIES.dtype.element_ty), mask=ok)
    if DROPOUT:
        value = dropped_out(value, SEED, stream, threshold, scale, row, first, BM, BK)
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=LENGTHS)
def softmax_dropout_kernel(
    SCORES, BIAS, MASK, OUT, PROBABILITIES, SEED, stream, threshold, scale, N, heads, queries, keys,
    scores_b, scores_h, scores_q, bias_b, bias_h, bias_q, mask_b, mask_h, mask_q, ALIGN: tl.constexpr,
    BIAS_STEP: tl.constexpr, MASK_STEP: tl.constexpr, HAS_BIAS: tl.constexpr, MASK_KIND: tl.constexpr,
    SAVE: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute BM of the N = B heads queries rows. The grid is N / BM rounded up.

    Pointers; "compute dtype" is the dtype of the scores (float32, bfloat16 or float16):
        SCORES         [B, heads, queries, keys]  compute dtype
        BIAS           the same shape             float32, bfloat16 or float16; added (None unless HAS_BIAS)
        MASK           the same shape             added as BIAS is (MASK_KIND 1), or uint8, not 0 where to attend (2)
        OUT            [N, keys]                  compute dtype, contiguous; output
        PROBABILITIES  [N, keys]                  compute dtype, contiguous; output, before dropout (None unless SAVE)
        SEED           [1]                        int64; the key of the dropout (None unless DROPOUT)

    ``keys`` and the strides are in units of ALIGN elements; along the keys the scores are contiguous, and BIAS_STEP and
    MASK_STEP are 1 or 0. If WHOLE, a tile has whole rows.
    """
    keys *= ALIGN
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    narrow = row.to(N.dtype)  # 32 bits wherever they suffice, because 64-bit divisions are slow
    query = (narrow % queries).to(tl.int64)
    head = (narrow // queries % heads).to(tl.int64)
    sample = (narrow // queries // heads).to(tl.int64)
    scores_at = (sample * scores_b + head * scores_h + query * scores_q) * ALIGN
    bias_at = (sample * bias_b + head * bias_h + query * bias_q) * ALIGN
    mask_at = (sample * mask_b + head * mask_h + query * mask_q) * ALIGN
    if WHOLE:
        column = tl.arange(0, BK)
        ok = row_ok[:, None] & (column < keys)[None, :]
        total = _added_tile(
            SCORES, BIAS, MASK, scores_at, bias_at, mask_at, column, ok, BIAS_STEP, MASK_STEP, HAS_BIAS, MASK_KIND
        )
        value = tl.exp(total - _finite(tl.max(total, 1))[:, None])
        sums = tl.sum(value, 1)
        value /= tl.where(sums == 0.0, 1.0, sums)[:, None]
        _store_tile(
            OUT, PROBABILITIES, value, SEED, stream, threshold, scale, row, keys, 0, column, ok, SAVE, DROPOUT, BM, BK
        )
    else:
        largest = tl.full((BM,), float("-inf"), tl.float32)
        sums = tl.zeros((BM,), tl.float32)
        for first in range(0, keys, BK):
            column = first + tl.arange(0, BK)
            ok = row_ok[:, None] & (column < keys)[None, :]
            total = _added_tile(
                SCORES, BIAS, MASK, scores_at, bias_at, mask_at, column, ok, BIAS_STEP, MASK_STEP, HAS_BIAS, MASK_KIND
            )
            before = largest
            largest = tl.maximum(largest, tl.max(total, 1))
            shift = _finite(largest)
            sums = sums * tl.exp(before - shift) + tl.sum(tl.exp(total - shift[:, None]), 1)
        shift = _finite(largest)
        sums = tl.where(sums == 0.0, 1.0, sums)
        for first in range(0, keys, BK):
            column = first + tl.arange(0, BK)
            ok = row_ok[:, None] & (column < keys)[None, :]
            total = _added_tile(
                SCORES, BIAS, MASK, scores_at, bias_at, mask_at, column, ok, BIAS_STEP, MASK_STEP, HAS_BIAS, MASK_KIND
            )
            value = tl.exp(total - shift[:, None]) / sums[:, None]
            _store_tile(
                OUT, PROBABILITIES, value, SEED, stream, threshold, scale, row, keys, first, column, ok, SAVE, DROPOUT,
                BM, BK,
            )  # fmt: skip


@triton.jit
def _gradient_tile(
    G, PROBABILITIES, g_at, row, row_ok, keys, first, SEED, stream, threshold, scale, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return BK columns of the gradient of the probabilities, and of the probabilities, in float32; and where they are
    stored, and which of them exist."""
    column = first + tl.arange(0, BK)
    ok = row_ok[:, None] & (column < keys)[None, :]
    at = row[:, None] * keys + column[None, :]
    g = tl.load(G + g_at[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)
    if DROPOUT:
        g = dropped_out(g, SEED, stream, threshold, scale, row, first, BM, BK)
    return g, tl.load(PROBABILITIES + at, mask=ok, other=0.0).to(tl.float32), at, ok


@triton.jit
def _mean(total, weights):
    """``total / weights``. The weights are probabilities that were rounded, so that they do not sum to 1, unless they
    are all 0."""
    return total / tl.where(weights == 0.0, 1.0, weights)


@triton.jit(do_not_specialize=LENGTHS)
def softmax_dropout_backward_kernel(
    G, PROBABILITIES, DSCORES, SEED, stream, threshold, scale, N, keys, g_stride, ALIGN: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of BM rows of scores. The grid is N / BM rounded up.

    Pointers; "compute dtype" is the dtype of the probabilities:
        G              [N, keys]  compute dtype; gradient of the output, rows at g_stride
        PROBABILITIES  [N, keys]  compute dtype, contiguous; before dropout
        DSCORES        [N, keys]  compute dtype, contiguous; output
        SEED           [1]        int64; the key of the dropout (None unless DROPOUT)

    ``keys`` and the stride are in units of ALIGN elements. If WHOLE, a tile has whole rows.

    The gradient is p (g - the mean of g). The mean of what is left, which is 0 but for the rounding of the first mean,
    is subtracted too: that rounding is not small beside g - mean where one probability is nearly 1.
    """
    keys *= ALIGN
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    g_at = row * g_stride * ALIGN
    if WHOLE:
        g, value, at, ok = _gradient_tile(
            G, PROBABILITIES, g_at, row, row_ok, keys, 0, SEED, stream, threshold, scale, DROPOUT, BM, BK
        )
        total = tl.sum(value, 1)
        g -= _mean(tl.sum(g * value, 1), total)[:, None]
        gradient = value * (g - _mean(tl.sum(g * value, 1), total)[:, None])
        tl.store(DSCORES + at, gradient.to(DSCORES.dtype.element_ty), mask=ok)
    else:
        along, total, rest = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
        for first in range(0, keys, BK):
            g, value, at, ok = _gradient_tile(
                G, PROBABILITIES, g_at, row, row_ok, keys, first, SEED, stream, threshold, scale, DROPOUT, BM, BK
            )
            along += tl.sum(g * value, 1)
            total += tl.sum(value, 1)
        along = _mean(along, total)
        for first in range(0, keys, BK):
            g, value, at, ok = _gradient_tile(
                G, PROBABILITIES, g_at, row, row_ok, keys, first, SEED, stream, threshold, scale, DROPOUT, BM, BK
            )
            rest += tl.sum((g - along[:, None]) * value, 1)
        rest = _mean(rest, total)
        for first in range(0, keys, BK):
            g, value, at, ok = _gradient_tile(
                G, PROBABILITIES, g_at, row, row_ok, keys, first, SEED, stream, threshold, scale, DROPOUT, BM, BK
            )
            gradient = value * (g - along[:, None] - rest[:, None])
            tl.store(DSCORES + at, gradient.to(DSCORES.dtype.element_ty), mask=ok)


def softmax_dropout_forward(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool
) -> tuple[Tensor, Tensor]:
    """Launch ``softmax_dropout_kernel``: ``Backend.softmax_dropout_forward`` for float32, bfloat16 and float16."""
    save = save and dropout.p > 0
    out = scores.new_empty(scores.shape)
    probabilities = scores.new_empty(scores.shape if save else 0)
    if scores.numel():
        _plans.run(
            ("forward", kind_of(scores), kind_of(bias), kind_of(mask), dropout.p, dropout.stream, save),
            (scores, bias, mask, dropout.seed, out, probabilities),
            lambda: _launch_forward(scores, bias, mask, dropout, out, probabilities if save else None),
        )
    return out, probabilities


def _launch_forward(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, out: Tensor,
    probabilities: Tensor | None,
) -> None:  # fmt: skip
    B, heads, queries, keys = scores.shape
    kind = _NO_MASK if mask is None else _BOOLEAN if mask.dtype == torch.bool else _ADDED
    if kind == _BOOLEAN:
        mask = mask.view(torch.uint8)
    if scores.stride(-1) != 1 and keys > 1:
        scores = scores.contiguous()
    bias, mask = (None if t is None else _broadcast(t, scores.shape) for t in (bias, mask))
    strides = [[0] * 4 if t is None else _strides(t) for t in (scores, bias, mask)]
    align = math.gcd(16, keys, *(stride for each in strides for stride in each[:3]))
    arguments, tile = dropout_arguments(dropout), tiles.whole_rows(keys)
    N = B * heads * queries
    with device_guard(out):
        launch(
            softmax_dropout_kernel, (triton.cdiv(N, tile.BM),),
            scores, bias, mask, out, probabilities, *arguments.run_time, N, heads, queries, keys // align,
            *(stride // align for each in strides for stride in each[:3]),
            ALIGN=align, BIAS_STEP=strides[1][3], MASK_STEP=strides[2][3], HAS_BIAS=bias is not None, MASK_KIND=kind,
            SAVE=probabilities is not None, DROPOUT=arguments.on, WHOLE=keys <= tile.BK, BM=tile.BM, BK=tile.BK,
            num_warps=tile.warps,
        )  # fmt: skip


def softmax_dropout_backward(g: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
    """Launch ``softmax_dropout_backward_kernel``: ``Backend.softmax_dropout_backward``."""
    dscores = probabilities.new_empty(probabilities.shape)
    if probabilities.numel():
        _plans.run(
            ("backward", kind_of(g), kind_of(probabilities), dropout.p, dropout.stream),
            (g, probabilities, dropout.seed, dscores),
            lambda: _launch_backward(g, probabilities, dropout, dscores),
        )
    return dscores


def _launch_backward(g: Tensor, probabilities: Tensor, dropout: Dropout, dscores: Tensor) -> None:
    keys = probabilities.shape[-1]
    arguments, tile = dropout_arguments(dropout), tiles.whole_rows(keys)
    (g,), (g_stride,), unit, N = aligned_rows(g)
    align = math.gcd(unit, keys)
    with device_guard(dscores):
        launch(
            softmax_dropout_backward_kernel, (triton.cdiv(N, tile.BM),),
            g, probabilities.contiguous(), dscores, *arguments.run_time, N, keys // align, g_stride * (unit // align),
            ALIGN=align, DROPOUT=arguments.on, WHOLE=keys <= tile.BK, BM=tile.BM, BK=tile.BK, num_warps=tile.warps,
        )  # fmt: skip


def _broadcast(t: Tensor, shape: torch.Size) -> Tensor:
    """``t`` expanded to ``shape``, with a stride of 1 or 0 along the keys. It is copied only for that."""
    if t.dim() and t.shape[-1] > 1 and t.stride(-1) not in (0, 1):
        t = t.contiguous()
    return t.expand(shape)


def _strides(t: Tensor) -> list[int]:
    """The strides of ``t``, 0 along what has one element."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride())]
