"""How far rounding moves the results of softmax and attention, worked out in float64.

Where a result is what cancellation leaves, no arithmetic in float32 has the digits that the tolerance rule asks for,
and whether eager PyTorch comes closer is luck. So the rule allows, beside its other terms, what rounding does to first
order for these very inputs. It is a few eps of the result where nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

F32 = torch.finfo(torch.float32).eps


class Rounding(NamedTuple):
    """How far a result may be off."""

    #: What the arithmetic in float32 does at most, in eps of float32: each number counts that goes into a sum.
    arithmetic: Tensor
    #: Of a matrix product, the root of the sum of its terms' squares: what it does to round each operand to the inputs'
    #: dtype, in eps of that, where the errors are independent.
    operands: Tensor | None = None

    def slack(self, dtype: torch.dtype) -> Tensor:
        """Both, as numbers."""
        rounded = 0.0 if self.operands is None else torch.finfo(dtype).eps * self.operands
        return F32 * self.arithmetic + rounded


class _Softmax:
    """p = softmax(scores), where each score is off by up to ``of_scores``."""

    def __init__(self, p: Tensor, of_scores: Tensor):
        self.p = p
        self.of_p = p * (1 + of_scores + self._mean(of_scores))

    def _mean(self, t: Tensor) -> Tensor:
        return (self.p * t).sum(-1, keepdim=True)

    def gradient(self, g: Tensor, of_g: Tensor) -> tuple[Tensor, Tensor]:
        """The scores' gradient, p (g - sum p g), and how far it is off where p's gradient g is off by ``of_g``."""
        centred = g - self._mean(g)
        of_mean = (self.of_p * centred.abs()).sum(-1, keepdim=True) + self._mean(of_g)
        return self.p * centred, self.of_p * centred.abs() + self.p * (of_g + of_mean)


def softmax_rounding(p: Tensor, scores: Tensor, bias: Tensor | None, factor: Tensor, g: Tensor) -> dict[str, Rounding]:
    """By result, for ``factor`` * softmax(scores + bias), where ``factor`` is the dropout's mask and scale.

    Args:
        p: the probabilities, without dropout.
        scores, bias: as the op has them.
        factor: zeros and scales, of p's shape.
        g: the gradient of the result.
    """
    softmax = _Softmax(p, scores.abs() + (0.0 if bias is None else bias.abs()))
    scaled = (g * factor).abs() if (factor != 1).any() else torch.zeros_like(g)  # a product with 1 is exact
    _, of_scores = softmax.gradient(g * factor, scaled)
    found = {"result 0": Rounding(softmax.of_p * factor), "the gradient of scores": Rounding(of_scores)}
    if bias is not None:
        found["the gradient of bias"] = Rounding(of_scores.sum_to_size(bias.shape))
    return found


def attention_rounding(
    p: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, factor: Tensor, g: Tensor
) -> dict[str, Rounding]:
    """By result, for (``factor`` * softmax(q k^T * scaling + bias)) v. The arguments are as in
    :func:`softmax_rounding`."""

    def product(a: Tensor, of_a: Tensor, b: Tensor) -> Rounding:
        return Rounding((of_a + a.abs()) @ b.abs(), (a.square() @ b.square()).sqrt())

    softmax = _Softmax(p, q.abs() @ k.mT.abs() * scaling + (0.0 if bias is None else bias.abs()))
    weights, of_weights = p * factor, softmax.of_p * factor
    ds, of_ds = softmax.gradient(g @ v.mT * factor, g.abs() @ v.mT.abs() * factor)
    found = {
        "result 0": product(weights, of_weights, v),
        "the gradient of q": product(ds * scaling, of_ds * scaling, k),
        "the gradient of k": product(ds.mT * scaling, of_ds.mT * scaling, q),
        "the gradient of v": product(weights.mT, of_weights.mT, g),
    }
    if bias is not None:
        found["the gradient of bias"] = Rounding(of_ds.sum_to_size(bias.shape))
    return found
