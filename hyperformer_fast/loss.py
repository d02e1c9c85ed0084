"""The loss of a micro-batch as its share of the whole batch that an optimizer step sees."""

from __future__ import annotations

from typing import Any

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
