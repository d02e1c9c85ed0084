"""The residual stream between two sublayers of a T5: hidden + dropout(y), and T5's RMS norm of the sum, in one pass.

A program has whole rows, whose squares it adds. Up to ``tiles.MOST_KEPT`` columns a row stays in registers between the
sum and its norm; a wider one is computed a second time.

The gradient of the norm's weight is a sum over rows. Every program adds up its own stretch of rows, which depends on
the number of rows alone, and ``sum_parts_kernel`` adds the stretches in their order. So all runs give the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Dropout, normed_dtype
from . import tiles
from .common import LENGTHS, aligned_rows, device_guard, load_rows, load_vector, store_rows
from .dropout import dropout_arguments, dropped_out
from .launch import Plans, kind_of, launch

#: How many stretches of rows the gradient of a norm's weight is summed in: four waves on a GPU of 132 multiprocessors.
_STRETCHES = 528

_plans = Plans()


@triton.jit
def _sum_tile(
    HIDDEN, Y, hidden_at, y_at, row, row_ok, k, SEED, stream, threshold, scale, D: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Return columns k*BK to (k+1)*BK of hidden + dropout(y), rounded to y's dtype, as [BM, BK]."""
    value = load_rows(Y + y_at, k, row_ok, D, BK)
    if ADD:
        total = value.to(tl.float32)
        if DROPOUT:
            total = dropped_out(total, SEED, stream, threshold, scale, row, k * BK, BM, BK)
        total += load_rows(HIDDEN + hidden_at, k, row_ok, D, BK).to(tl.float32)
        value = total.to(Y.dtype.element_ty)
    return value


@triton.jit(do_not_specialize=LENGTHS)
def residual_kernel(
    HIDDEN, Y, WEIGHT, OUT, NORMED, RSTD, SEED, stream, threshold, scale, eps, N, hidden_stride, y_stride,
    D: tl.constexpr, ALIGN: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, SAVE: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add BM rows, and normalise the sums. The grid is N / BM rounded up.

    Pointers; "compute dtype" is the dtype of y (float32, bfloat16 or float16):
        HIDDEN  [N, d]  compute dtype; the residual stream (None unless ADD), rows at hidden_stride
        Y       [N, d]  compute dtype; what is added, rows at y_stride; without ADD what is normalised
        WEIGHT  [d]     float32, bfloat16 or float16; the norm's weight (None unless NORM)
        OUT     [N, d]  compute dtype, contiguous; output, the sum (None unless ADD)
        NORMED  [N, d]  WEIGHT's dtype, contiguous; output, the normed sum (None unless NORM)
        RSTD    [N]     float32; output, 1 / sqrt(mean of squares + eps) of each row (None unless NORM and SAVE)
        SEED    [1]     int64; the key of the dropout (None unless DROPOUT)

    Strides are in units of ALIGN elements. With a weight in 16 bits the normalised number is rounded to them before the
    product, as in transformers' T5LayerNorm.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    hidden_at = row * hidden_stride * ALIGN
    y_at = row * y_stride * ALIGN
    squares = tl.zeros((BM,), tl.float32)
    for k in tl.static_range(NK):
        value = _sum_tile(
            HIDDEN, Y, hidden_at, y_at, row, row_ok, k, SEED, stream, threshold, scale, D, BM, BK, ADD, DROPOUT
        )
        if ADD:
            store_rows(OUT + row * D, value, k, row_ok, D, BK)
        if NORM:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
    if NORM:
        rstd = tl.rsqrt(squares / D + eps)
        if SAVE:
            tl.store(RSTD + row, rstd, mask=row_ok)
        for k in tl.static_range(NK):
            if NK > 1:
                value = _sum_tile(
                    HIDDEN, Y, hidden_at, y_at, row, row_ok, k, SEED, stream, threshold, scale, D, BM, BK, ADD, DROPOUT
                )
            normal = (value.to(tl.float32) * rstd[:, None]).to(NORMED.dtype.element_ty).to(tl.float32)
            store_rows(NORMED + row * D, normal * load_vector(WEIGHT, k, D, BK)[None, :], k, row_ok, D, BK)


@triton.jit
def _scaled_gradient(G_NORMED, WEIGHT, g_at, row_ok, k, D: tl.constexpr, BK: tl.constexpr):
    """Return columns k*BK to (k+1)*BK of the gradient of the normed rows, and the same times the norm's weight, in
    float32."""
    g = load_rows(G_NORMED + g_at, k, row_ok, D, BK).to(tl.float32)
    return g, g * load_vector(WEIGHT, k, D, BK)[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def residual_backward_kernel(
    G_OUT, G_NORMED, OUT, WEIGHT, RSTD, DHIDDEN, DY, PART, SEED, stream, threshold, scale, N, share, g_out_stride,
    g_normed_stride, out_stride, D: tl.constexpr, ALIGN: tl.constexpr, STREAM: tl.constexpr, NORM: tl.constexpr,
    DROPOUT: tl.constexpr, DWEIGHT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of ``share`` tiles of BM rows. The grid is N / (BM share) rounded up.

    Pointers; "compute dtype" is the dtype of the sum:
        G_OUT     [N, d]         compute dtype; gradient of the sum (None unless STREAM)
        G_NORMED  [N, d]         the dtype of the forward's NORMED; gradient of the normed sum (None unless NORM)
        OUT       [N, d]         compute dtype; the sum (None unless NORM)
        WEIGHT    [d]            float32, bfloat16 or float16; the norm's weight (None unless NORM)
        RSTD      [N]            float32; the forward's (None unless NORM)
        DHIDDEN   [N, d]         compute dtype, contiguous; output, gradient of hidden (None unless NORM)
        DY        [N, d]         compute dtype, contiguous; output, gradient of y (None unless DROPOUT)
        PART      [programs, d]  float32; output, the gradient of the weight from these rows (None unless DWEIGHT)
        SEED      [1]            int64; the key of the dropout (None unless DROPOUT)

    Strides are in units of ALIGN elements. If a row takes more than one tile of BK columns, ``share`` is 1.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    program = tl.program_id(0).to(tl.int64)
    dweight = tl.zeros((BK,), tl.float32)
    for tile in range(share):
        row = (program * share + tile) * BM + tl.arange(0, BM)
        row_ok = row < N
        g_out_at = row * g_out_stride * ALIGN
        g_normed_at = row * g_normed_stride * ALIGN
        out_at = row * out_stride * ALIGN
        if NORM:
            rstd = tl.load(RSTD + row, mask=row_ok, other=0.0)
            along = tl.zeros((BM,), tl.float32)
            for k in tl.static_range(NK):
                g, scaled = _scaled_gradient(G_NORMED, WEIGHT, g_normed_at, row_ok, k, D, BK)
                value = load_rows(OUT + out_at, k, row_ok, D, BK).to(tl.float32)
                along += tl.sum(scaled * value, 1)
            along *= rstd * rstd / D
        for k in tl.static_range(NK):
            gradient = tl.zeros((BM, BK), tl.float32)
            if NORM:
                if NK > 1:
                    g, scaled = _scaled_gradient(G_NORMED, WEIGHT, g_normed_at, row_ok, k, D, BK)
                    value = load_rows(OUT + out_at, k, row_ok, D, BK).to(tl.float32)
                gradient = (scaled - value * along[:, None]) * rstd[:, None]
                if DWEIGHT:
                    of_rows = tl.sum(g * value * rstd[:, None], 0)
                    if NK > 1:
                        column = k * BK + tl.arange(0, BK)
                        tl.store(PART + program * D + column, of_rows, mask=column < D)
                    else:
                        dweight += of_rows
            if STREAM:
                gradient += load_rows(G_OUT + g_out_at, k, row_ok, D, BK).to(tl.float32)
            if NORM:
                store_rows(DHIDDEN + row * D, gradient, k, row_ok, D, BK)
            if DROPOUT:
                dy = dropped_out(gradient, SEED, stream, threshold, scale, row, k * BK, BM, BK)
                store_rows(DY + row * D, dy, k, row_ok, D, BK)
    if DWEIGHT and NK == 1:
        column = tl.arange(0, BK)
        tl.store(PART + program * D + column, dweight, mask=column < D)


@triton.jit(do_not_specialize=LENGTHS)
def sum_parts_kernel(PART, TOTAL, n, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr):
    """Add n rows of BK columns, BM rows at a time. The grid is d / BK rounded up.

    Pointers, contiguous:
        PART   [n, d]  float32
        TOTAL  [d]     float32, bfloat16 or float16; output
    """
    k = tl.program_id(0)
    total = tl.zeros((BM, BK), tl.float32)
    # Several tiles at a time: their loads do not wait for each other.
    for start in tl.range(0, n, BM, loop_unroll_factor=UNROLL):
        row = start + tl.arange(0, BM)
        total += load_rows(PART + row.to(tl.int64) * D, k, row < n, D, BK)
    column = k * BK + tl.arange(0, BK)
    tl.store(TOTAL + column, tl.sum(total, 0).to(TOTAL.dtype.element_ty), mask=column < D)


def residual_forward(
    hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``residual_kernel``: ``Backend.residual_forward`` for float32, bfloat16 and float16."""
    add, norm = hidden is not None, weight is not None
    save = save and norm
    out = y.new_empty(y.shape if add else 0)
    normed = y.new_empty(y.shape if norm else 0, dtype=normed_dtype(y.dtype, weight.dtype) if norm else y.dtype)
    rstd = y.new_empty(y.shape[:-1] if save else 0, dtype=torch.float32)
    if y.numel() == 0:
        return out, normed, rstd.fill_(math.nan)
    if add or norm:
        _plans.run(
            ("forward", kind_of(hidden), kind_of(y), kind_of(weight), dropout.p, dropout.stream, eps, save),
            (hidden, y, weight, dropout.seed, out, normed, rstd),
            lambda: _launch_forward(hidden, y, dropout, weight, eps, out, normed, rstd, save),
        )
    return out, normed, rstd


def _launch_forward(
    hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, eps: float, out: Tensor,
    normed: Tensor, rstd: Tensor, save: bool,
) -> None:  # fmt: skip
    d, add, norm = y.shape[-1], hidden is not None, weight is not None
    (hidden, y), strides, align, N = aligned_rows(hidden, y)
    arguments, tile = dropout_arguments(dropout), tiles.whole_rows(d)
    with device_guard(y):
        launch(
            residual_kernel, (triton.cdiv(N, tile.BM),),
            hidden, y, weight.contiguous() if norm else None, out if add else None, normed if norm else None,
            rstd if save else None, *arguments.run_time, eps, N, *strides,
            D=d, ALIGN=align, ADD=add, NORM=norm, SAVE=save, DROPOUT=arguments.on and add,
            BM=tile.BM, BK=tile.BK, num_warps=tile.warps,
        )  # fmt: skip


def residual_backward(
    g_out: Tensor | None, g_normed: Tensor | None, out: Tensor | None, weight: Tensor | None, rstd: Tensor | None,
    dropout: Dropout, need_dy: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch ``residual_backward_kernel`` and, if the weight's gradient is needed, ``sum_parts_kernel``:
    ``Backend.residual_backward``."""
    like, norm = (out, True) if g_normed is not None else (g_out, False)
    need_dy, need_dweight = need_dy and dropout.p > 0, need_dweight and norm
    dhidden = like.new_empty(like.shape if norm else 0)
    dy = like.new_empty(like.shape if need_dy else 0)
    dweight = like.new_empty(weight.shape if need_dweight else 0, dtype=like.dtype if weight is None else weight.dtype)
    if like.numel() == 0:
        return dhidden, dy, dweight.zero_()
    if not (norm or need_dy):
        return dhidden, dy, dweight
    d = like.shape[-1]
    programs, share = _stretches(like.numel() // d, d, need_dweight)
    part = like.new_empty(programs, d, dtype=torch.float32) if need_dweight else None
    kinds = [kind_of(t) for t in (g_out, g_normed, out, weight, rstd)] if norm else [kind_of(g_out)]
    _plans.run(
        ("backward", norm, *kinds, dropout.p, dropout.stream, need_dy, need_dweight),
        (g_out, g_normed, out, weight, rstd, dropout.seed, dhidden, dy, dweight, part),
        lambda: _launch_backward(
            g_out, g_normed, out, weight, rstd, dropout, dhidden, dy if need_dy else None, dweight, part, share
        ),
    )
    return dhidden, dy, dweight


def _stretches(N: int, d: int, summed: bool) -> tuple[int, int]:
    """How many programs the backward of N rows has, and how many tiles of rows each of them."""
    tile = tiles.residual_backward(d)
    units = triton.cdiv(N, tile.BM)
    share = triton.cdiv(units, _STRETCHES) if summed and d <= tile.BK else 1
    return triton.cdiv(units, share), share


def _launch_backward(
    g_out: Tensor | None, g_normed: Tensor | None, out: Tensor | None, weight: Tensor | None, rstd: Tensor | None,
    dropout: Dropout, dhidden: Tensor, dy: Tensor | None, dweight: Tensor, part: Tensor | None, share: int,
) -> None:  # fmt: skip
    norm = g_normed is not None
    (g_out, g_normed, out), strides, align, N = aligned_rows(g_out, g_normed, out if norm else None)
    d = (out if norm else g_out).shape[-1]
    arguments, tile, columns = dropout_arguments(dropout), tiles.residual_backward(d), tiles.sum_parts(d)
    programs, _ = _stretches(N, d, part is not None)
    with device_guard(dweight):
        launch(
            residual_backward_kernel, (programs,),
            g_out, g_normed, out, weight.contiguous() if norm else None, rstd.contiguous() if norm else None,
            dhidden if norm else None, dy, part, *arguments.run_time, N, share, *strides,
            D=d, ALIGN=align, STREAM=g_out is not None, NORM=norm, DROPOUT=dy is not None, DWEIGHT=part is not None,
            BM=tile.BM, BK=tile.BK, num_warps=tile.warps,
        )  # fmt: skip
        if part is not None:
            launch(
                sum_parts_kernel, (triton.cdiv(d, columns.BK),), part, dweight, programs,
                D=d, BM=columns.BM, BK=columns.BK, UNROLL=columns.stages, num_warps=columns.warps,
            )  # fmt: skip
