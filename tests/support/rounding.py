"""How far rounding moves the results of activations, softmax, attention and the cross-entropy, worked out in float64.

Where a result is what cancellation leaves, no arithmetic in float32 has the digits that the tolerance rule asks for,
and whether eager PyTorch comes closer is luck. So the rule allows, beside its other terms, what rounding does to first
order for these very inputs. It is a few eps of the result where nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable
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
    operands: Tensor | float = 0.0
    #: What it does at most that the inputs' dtype has a smallest number, in that number. float16 ends at 6e-8.
    underflow: Tensor | float = 0.0

    def slack(self, dtype: torch.dtype) -> Tensor:
        """All of it, as numbers."""
        info = torch.finfo(dtype)
        return F32 * self.arithmetic + info.eps * self.operands + info.smallest_normal * info.eps * self.underflow


class _Softmax:
    """p = softmax(scores), where each score is off by up to ``of_scores``."""

    def __init__(self, p: Tensor, of_scores: Tensor):
        self.p = p
        self.of_p = p * (1 + of_scores + self._mean(of_scores))

    def _mean(self, t: Tensor) -> Tensor:
        return (self.p * t).sum(-1, keepdim=True)

    def gradient(self, g: Tensor, of_g: Tensor) -> tuple[Tensor, Rounding]:
        """The scores' gradient, p (g - sum p g), and how far it is off where p's gradient g is off by ``of_g``. The
        backward reads p, which is kept in the inputs' dtype."""
        centred = (g - self._mean(g)).abs()

        def off(of_p: Tensor) -> Tensor:
            return of_p * centred + self.p * (of_p * centred).sum(-1, keepdim=True)

        arithmetic = off(self.of_p) + self.p * (of_g + self._mean(of_g))
        return self.p * (g - self._mean(g)), Rounding(arithmetic, 0.0, off(torch.ones_like(g)) + 1)


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
    found = {"result 0": Rounding(softmax.of_p * factor, 0.0, factor), "the gradient of scores": of_scores}
    if bias is not None:
        found["the gradient of bias"] = _sum(of_scores, bias)
    return found


def _sum(each: Rounding, bias: Tensor) -> Rounding:
    """Of the gradient of a bias, which is the sum of those of the scores."""
    return Rounding(*(t.sum_to_size(bias.shape) if isinstance(t, Tensor) else t for t in each))


def attention_rounding(
    p: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, factor: Tensor, g: Tensor
) -> dict[str, Rounding]:
    """By result, for (``factor`` * softmax(q k^T * scaling + bias)) v. The arguments are as in
    :func:`softmax_rounding`."""

    def product(a: Tensor, of_a: Rounding, b: Tensor, transposed: bool = False) -> Rounding:
        """Of a b, or of a^T b."""
        turn = (lambda t: t.mT) if transposed else (lambda t: t)
        arithmetic, underflow = (turn(t) @ b.abs() for t in (of_a.arithmetic + a.abs(), of_a.underflow))
        return Rounding(arithmetic, (turn(a).square() @ b.square()).sqrt(), underflow + 1)

    softmax = _Softmax(p, q.abs() @ k.mT.abs() * scaling + (0.0 if bias is None else bias.abs()))
    weights, of_weights = p * factor, Rounding(softmax.of_p * factor, 0.0, factor)
    ds, of_ds = softmax.gradient(g @ v.mT * factor, g.abs() @ v.mT.abs() * factor)
    found = {
        "result 0": product(weights, of_weights, v),
        "the gradient of q": product(ds, of_ds, k * scaling),
        "the gradient of k": product(ds, of_ds, q * scaling, transposed=True),
        "the gradient of v": product(weights, of_weights, g, transposed=True),
    }
    if bias is not None:
        found["the gradient of bias"] = _sum(of_ds, bias)
    return found


def cross_entropy_rounding(logits: Tensor, labels: Tensor, smoothing: float, g: Tensor) -> dict[str, Rounding]:
    """By result, for the loss of each row. At the label the gradient is the sum of the other probabilities."""
    p = logits.softmax(-1)
    of_p = _Softmax(p, (logits - logits.amax(-1, keepdim=True)).abs()).of_p
    at_label = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()
    others = of_p.masked_fill(at_label, 0.0).sum(-1, keepdim=True)
    off = torch.where(at_label, others + smoothing, of_p + smoothing / logits.shape[-1])
    return {"the gradient of logits": Rounding(off * g.abs().unsqueeze(-1) * (labels >= 0).unsqueeze(-1))}


def act_rounding(
    act: Callable[[Tensor], Tensor], a: Tensor, c: Tensor | None, factor: Tensor, g: Tensor
) -> dict[str, Rounding]:
    """By result, for ``factor`` * act(a), or ``factor`` * act(a) * c, where act(a) = a s(a) and s is a sigmoid or so.

    The derivative s + a s' has a zero, where its two parts cancel. The exponents within s and s' are below a^2, so that
    they come out as eps (1 + a^2) of themselves.
    """
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        value = act(a)
        (derivative,) = torch.autograd.grad(value.sum(), a)
    a, value = a.detach(), value.detach()
    s = torch.where(a == 0, derivative, value / a)
    scaled, exponents = (g * factor).abs(), 1 + a.square()
    of_value, of_derivative = value.abs() * exponents, (s.abs() + (derivative - s).abs()) * exponents
    if c is None:
        return {"result 0": Rounding(of_value * factor), "the gradient of a": Rounding(of_derivative * scaled)}
    return {
        "result 0": Rounding(of_value * c.abs() * factor),
        "the gradient of a": Rounding(of_derivative * c.abs() * scaled),
        "the gradient of c": Rounding(of_value * scaled),
    }
