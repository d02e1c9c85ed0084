"""What follows the first product of a T5's feed-forward sublayer: dropout(act(a)), or dropout(act(a) * c).

Each number is read once and written once. The backward needs a and c alone: the activation and the mask are computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..layout import Dropout
from . import tiles
from .common import LENGTHS, activate, activate_grad, aligned_rows, device_guard, load_rows, store_rows
from .dropout import dropout_arguments, dropped_out, kept
from .launch import Plans, kind_of, launch

_plans = Plans()


@triton.jit(do_not_specialize=LENGTHS)
def act_dropout_kernel(
    A, C, OUT, SEED, stream, threshold, scale, N, a_stride, c_stride, D: tl.constexpr, ACT: tl.constexpr,
    ALIGN: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute BM rows of BK columns. The grid is N / BM times d / BK, both rounded up.

    Pointers; "compute dtype" is the dtype of a (float32, bfloat16 or float16):
        A     [N, d]  compute dtype; before the activation, rows at a_stride
        C     [N, d]  compute dtype; what the activation is multiplied by, rows at c_stride (None unless GATED)
        OUT   [N, d]  compute dtype, contiguous; output
        SEED  [1]     int64; the key of the dropout (None unless DROPOUT)

    Strides are in units of ALIGN elements.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    k = tl.program_id(0) % NK
    row = (tl.program_id(0) // NK).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    value = activate(load_rows(A + row * a_stride * ALIGN, k, row_ok, D, BK).to(tl.float32), ACT)
    if GATED:
        value *= load_rows(C + row * c_stride * ALIGN, k, row_ok, D, BK).to(tl.float32)
    if DROPOUT:
        value = dropped_out(value, SEED, stream, threshold, scale, row, k * BK, BM, BK)
    store_rows(OUT + row * D, value, k, row_ok, D, BK)


@triton.jit(do_not_specialize=LENGTHS)
def act_dropout_backward_kernel(
    G, A, C, DA, DC, SEED, stream, threshold, scale, N, g_stride, a_stride, c_stride, D: tl.constexpr,
    ACT: tl.constexpr, ALIGN: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of BM rows of BK columns. The grid is N / BM times d / BK, both rounded up.

    Pointers; "compute dtype" is the dtype of a:
        G     [N, d]  compute dtype; gradient of the output, rows at g_stride
        A     [N, d]  compute dtype; before the activation, rows at a_stride
        C     [N, d]  compute dtype; what the activation was multiplied by, rows at c_stride (None unless GATED)
        DA    [N, d]  compute dtype, contiguous; output, gradient of a
        DC    [N, d]  compute dtype, contiguous; output, gradient of c (None unless GATED)
        SEED  [1]     int64; the key of the dropout (None unless DROPOUT)

    Strides are in units of ALIGN elements.
    """
    NK: tl.constexpr = (D + BK - 1) // BK
    k = tl.program_id(0) % NK
    row = (tl.program_id(0) // NK).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = row < N
    g = load_rows(G + row * g_stride * ALIGN, k, row_ok, D, BK).to(tl.float32)
    a = load_rows(A + row * a_stride * ALIGN, k, row_ok, D, BK).to(tl.float32)
    da = g * activate_grad(a, ACT)
    if DROPOUT:
        keep = kept(SEED, stream, threshold, row, k * BK, BM, BK)
    if GATED:
        c = load_rows(C + row * c_stride * ALIGN, k, row_ok, D, BK).to(tl.float32)
        dc = g * activate(a, ACT)
        if DROPOUT:
            dc = tl.where(keep, dc * scale, 0.0)
        store_rows(DC + row * D, dc, k, row_ok, D, BK)
        da *= c
    if DROPOUT:
        da = tl.where(keep, da * scale, 0.0)
    store_rows(DA + row * D, da, k, row_ok, D, BK)


def act_dropout_forward(a: Tensor, c: Tensor | None, activation: str, dropout: Dropout) -> Tensor:
    """Launch ``act_dropout_kernel``: ``Backend.act_dropout_forward`` for float32, bfloat16 and float16."""
    out = a.new_empty(a.shape)
    if a.numel():
        _plans.run(
            ("forward", kind_of(a), kind_of(c), activation, dropout.p, dropout.stream),
            (a, c, dropout.seed, out),
            lambda: _launch(act_dropout_kernel, (a, c), (out,), c is not None, activation, dropout),
        )
    return out


def act_dropout_backward(
    g: Tensor, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Launch ``act_dropout_backward_kernel``: ``Backend.act_dropout_backward``."""
    gated = c is not None
    da = a.new_empty(a.shape)
    dc = a.new_empty(a.shape if gated else 0)
    if a.numel():
        outputs = da, dc if gated else None
        _plans.run(
            ("backward", kind_of(g), kind_of(a), kind_of(c), activation, dropout.p, dropout.stream),
            (g, a, c, dropout.seed, da, dc),
            lambda: _launch(act_dropout_backward_kernel, (g, a, c), outputs, gated, activation, dropout),
        )
    return da, dc


def _launch(
    kernel: Any, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], gated: bool, activation: str,
    dropout: Dropout,
) -> None:  # fmt: skip
    """Launch one of the two kernels, whose arguments are inputs, outputs, dropout and strides."""
    rows, strides, align, N = aligned_rows(*inputs)
    d = rows[0].shape[-1]
    arguments, tile = dropout_arguments(dropout), tiles.parts_of_rows(d)
    with device_guard(rows[0]):
        launch(
            kernel, (triton.cdiv(N, tile.BM) * triton.cdiv(d, tile.BK),),
            *rows, *outputs, *arguments.run_time, N, *strides,
            D=d, ACT=ACTIVATIONS.index(activation), ALIGN=align, GATED=gated, DROPOUT=arguments.on,
            BM=tile.BM, BK=tile.BK, num_warps=tile.warps,
        )  # fmt: skip
