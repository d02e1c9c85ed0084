"""Cross-entropy of rows of logits with label smoothing, and its gradient in the same launch.

A program has one row and reads it twice: once for the largest logit and the sum of exponentials, once for the
gradient. The second time it comes from a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import LENGTHS, device_guard, rows_of
from .launch import Plans, kind_of, launch

_plans = Plans()


@triton.jit(do_not_specialize=LENGTHS)
def cross_entropy_kernel(
    LOGITS, LABELS, LOSS, DLOGITS, smoothing, ignore_index, stride_row, D: tl.constexpr, ALIGN: tl.constexpr,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the loss of one row, and the gradient of its logits. The grid is (N,).

    Pointers:
        LOGITS   [N, V]  float32, bfloat16 or float16; rows at stride_row
        LABELS   [N]     int64
        LOSS     [N]     float32; output, (1 - smoothing) * -log p[label] + smoothing * mean of -log p
        DLOGITS  [N, V]  LOGITS' dtype, contiguous; output, the gradient of LOSS (None unless GRADIENT)

    V is D. The stride is in units of ALIGN elements. A row whose label is ``ignore_index`` has loss and gradient 0,
    whatever its logits are; one whose label is out of range has NaN. Without SMOOTH ``smoothing`` is not read, so that
    a logit of -inf does no harm.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    valid = (label >= 0) & (label < D)
    at_label = tl.where(valid, label, -1).to(tl.int32)  # 64-bit columns would take registers
    LOGITS += row * stride_row * ALIGN
    if GRADIENT:
        DLOGITS += row * D
    if label == ignore_index:
        tl.store(LOSS + row, 0.0)
        if GRADIENT:
            for start in range(0, D, BK):
                column = start + tl.arange(0, BK)
                tl.store(DLOGITS + column, tl.zeros((BK,), DLOGITS.dtype.element_ty), mask=column < D)
    else:
        largest = tl.full((), float("-inf"), tl.float32)
        others = tl.zeros((), tl.float32)  # the exponentials of all classes but the label
        plain = tl.zeros((), tl.float32)
        for start in range(0, D, BK):
            column = start + tl.arange(0, BK)
            logit = tl.load(LOGITS + column, mask=column < D, other=float("-inf")).to(tl.float32)
            before = largest
            largest = tl.maximum(largest, tl.max(logit, 0))
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            others = others * tl.exp(before - shift)
            others += tl.sum(tl.where(column == at_label, 0.0, tl.exp(logit - shift)), 0)
            if SMOOTH:
                plain += tl.sum(tl.where(column < D, logit, 0.0), 0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        absent = tl.where(valid, 0.0, float("nan"))
        chosen = tl.load(LOGITS + tl.where(valid, label, 0)).to(tl.float32)
        mine = tl.exp(chosen - shift)
        total = others + mine
        log_sum = tl.log(total) + shift
        loss = log_sum - chosen + absent
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * (log_sum - plain / D)
        tl.store(LOSS + row, loss)
        if GRADIENT:
            # p - (1 - s) at the label. That is s less the other probabilities, too, and keeps its digits where p is
            # nearly 1; the difference keeps them where p is small.
            few = -others / total
            most = mine / total - 1.0
            of_all = tl.full((), 0.0, tl.float32)
            if SMOOTH:
                few += smoothing
                most = mine / total - (1.0 - smoothing)
                of_all += smoothing / D
            of_label = tl.where(others < mine, few, most)
            for start in range(0, D, BK):
                column = start + tl.arange(0, BK)
                logit = tl.load(LOGITS + column, mask=column < D, other=0.0).to(tl.float32)
                share = tl.where(column == at_label, of_label, tl.exp(logit - shift) / total)
                gradient = share - of_all + absent
                tl.store(DLOGITS + column, gradient.to(DLOGITS.dtype.element_ty), mask=column < D)


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Launch ``cross_entropy_kernel``: ``Backend.cross_entropy_forward`` for float32, bfloat16 and float16."""
    N, classes = logits.shape
    loss = logits.new_empty(N, dtype=torch.float32)
    dlogits = logits.new_empty(logits.shape if need_grad else 0)
    if logits.numel() == 0:  # no class: every label is out of range
        return torch.where(labels == ignore_index, 0.0, loss.fill_(torch.nan)), dlogits
    _plans.run(
        (kind_of(logits), kind_of(labels), label_smoothing, ignore_index, need_grad),
        (logits, labels, loss, dlogits),
        lambda: _launch(logits, labels, label_smoothing, ignore_index, loss, dlogits if need_grad else None),
    )
    return loss, dlogits


def _launch(
    logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, loss: Tensor, dlogits: Tensor | None
) -> None:
    N, classes = logits.shape
    rows, tile = rows_of(logits, None), tiles.cross_entropy(classes)
    with device_guard(logits):
        launch(
            cross_entropy_kernel, (N,),
            rows.data, labels.contiguous(), loss, dlogits, label_smoothing, ignore_index, rows.stride_row,
            D=classes, ALIGN=rows.align, SMOOTH=label_smoothing > 0, GRADIENT=dlogits is not None, BK=tile.BK,
            num_warps=tile.warps,
        )  # fmt: skip
