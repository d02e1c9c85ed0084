"""The loss of a micro-batch: of smoothed labels, and as its share of the whole batch that an optimizer step sees."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def as_share(output: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Any:
    """Return a T5's output whose loss is divided by the number of labels in the whole batch, and not by its own.

    The sum over micro-batches and processes is then the mean over all labels, however unequally they are divided. A T5
    takes the mean over the labels of its own micro-batch; the mean of such means weighs labels of short targets more.

    Args:
        output: the T5's output, an object or a tuple; one without a loss is returned as it is.
        labels: its labels; -100 does not count.
        num_items_in_batch: how many labels the whole batch has, as transformers' Trainer counts them. None: the T5's
            mean is left as it is.
    """
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if num_items_in_batch is None or labels is None or loss is None:
        return output
    count = (labels != -100).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    # A micro-batch without labels has the mean 0 / 0.
    share = (loss * (count / num_items_in_batch)).where(count > 0, 0.0)
    if isinstance(output, tuple):
        return (share, *output[1:])
    output.loss = share
    return output


def summed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the sum of the tokens' label-smoothed cross-entropy, in float32; -100 does not count.

    Each of V tokens has ``smoothing / V`` of the smoothing, as in transformers and in fairseq.
    """
    logits = logits.flatten(0, -2)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels.flatten().to(logits.device),
        reduction="sum", label_smoothing=smoothing,
    )  # fmt: skip


def smoothed(output: Any, labels: Tensor | None, smoothing: float) -> Any:
    """Return a T5's output, an object or a tuple, whose loss is that of smoothed labels.

    Raises:
        ValueError: its labels are not tokens or classes, one for each row of its logits.
    """
    if not smoothing or labels is None:
        return output
    logits = output[1] if isinstance(output, tuple) else output.get("logits")
    if logits is None or logits.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError("smoothing needs labels that are tokens or classes, one for each row of the logits")
    loss = summed(logits, labels, smoothing) / (labels != -100).sum()
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output
