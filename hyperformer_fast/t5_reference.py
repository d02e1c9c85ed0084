"""The pieces of a T5 between its matrix products, in plain PyTorch, for any floating dtype and any device.

Each piece is here twice. One function, such as :func:`residual`, writes it as a T5 computes it, and autograd and
functorch transforms can differentiate it. The others, such as :func:`residual_forward` and :func:`residual_backward`,
are its forward and its gradients in closed form; they define what the fused backends must return. An empty tensor [0]
stands for a result that is not wanted.

Arithmetic is in float32, or float64 if an argument is float64, and rounded once at the end. Dropout is that of
philox.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from .activations import activate, activate_grad
from .layout import Dropout, accumulator_dtype, normed_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """T5's layer norm: ``weight * x / sqrt(mean(x^2) + eps)``, with the dtype rule of transformers' T5LayerNorm."""
    return _times_weight(_normalised(x, weight, eps)[0], x, weight)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x times its reciprocal root mean square, and this, in the accumulator's dtype."""
    wide = x.to(accumulator_dtype(x.dtype, weight.dtype))
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    return wide * rstd.unsqueeze(-1), rstd


def _times_weight(normalised: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    dtype = normed_dtype(x.dtype, weight.dtype)
    # A product of two half-precision numbers is exact in float32, so this is the product in the weight's dtype.
    return (normalised.to(dtype).to(normalised.dtype) * weight.to(normalised.dtype)).to(dtype)


def residual(
    hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return ``hidden + dropout(y)``, or y itself without ``hidden``, and its layer norm if there is a ``weight``."""
    out = y if hidden is None else _sum(hidden, y, dropout)
    return out, None if weight is None else rms_norm(out, weight, eps)


def _sum(hidden: Tensor, y: Tensor, dropout: Dropout) -> Tensor:
    exact = accumulator_dtype(y.dtype)
    return (hidden.to(exact) + philox.apply(y.to(exact), dropout)).to(y.dtype)


def residual_forward(
    hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`residual`. Returns the sum (empty without ``hidden``), the normed sum (empty without ``weight``),
    and with ``save`` and ``weight`` the reciprocal root mean squares [...] of the rows of the rounded sum."""
    empty = y.new_empty(0)
    x = y if hidden is None else _sum(hidden, y, dropout)
    out = empty if hidden is None else x.contiguous()
    if weight is None:
        return out, y.new_empty(0), y.new_empty(0, dtype=accumulator_dtype(y.dtype))
    normalised, rstd = _normalised(x, weight, eps)
    normed = _times_weight(normalised, x, weight).contiguous()
    return out, normed, rstd.contiguous() if save else rstd.new_empty(0)


def residual_backward(
    g_out: Tensor | None,
    g_normed: Tensor | None,
    out: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    dropout: Dropout,
    need_dy: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`residual_forward`; ``backends.pieces`` describes them."""
    if g_normed is None:
        assert g_out is not None
        exact = accumulator_dtype(g_out.dtype)
        dy = _dropped(g_out.to(exact), dropout, g_out.dtype) if need_dy and dropout.p > 0 else g_out.new_empty(0)
        return g_out.new_empty(0), dy, g_out.new_empty(0, dtype=exact if weight is None else weight.dtype)
    assert out is not None and weight is not None and rstd is not None
    exact = accumulator_dtype(out.dtype, weight.dtype)
    n = weight.shape[0]
    x, r = out.to(exact), rstd.to(exact).unsqueeze(-1)
    g = g_normed.to(exact)
    normalised = x * r
    gw = g * weight.to(exact)
    dx = r * (gw - normalised * (gw * normalised).mean(-1, keepdim=True))
    if g_out is not None:
        dx = g_out.to(exact) + dx
    dy, dweight = out.new_empty(0), weight.new_empty(0)
    if need_dy and dropout.p > 0:
        dy = _dropped(dx, dropout, out.dtype)
    if need_dweight:
        seen = normalised.to(normed_dtype(out.dtype, weight.dtype)).to(exact)
        dweight = (g * seen).reshape(math.prod(out.shape[:-1]), n).sum(0).to(weight.dtype)
    return dx.to(out.dtype).contiguous(), dy, dweight


def _dropped(wide: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    return philox.apply(wide, dropout).to(dtype).contiguous()


def act_dropout(a: Tensor, c: Tensor | None, activation: str, dropout: Dropout) -> Tensor:
    """Return ``dropout(act(a))``, or ``dropout(act(a) * c)``."""
    exact = accumulator_dtype(a.dtype)
    h = activate(a.to(exact), activation)
    return philox.apply(h if c is None else h * c.to(exact), dropout).to(a.dtype)


def act_dropout_forward(a: Tensor, c: Tensor | None, activation: str, dropout: Dropout) -> Tensor:
    """Compute :func:`act_dropout`."""
    return act_dropout(a, c, activation, dropout).contiguous()


def act_dropout_backward(
    g: Tensor, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`act_dropout`, of a and of c (empty without c)."""
    exact = accumulator_dtype(a.dtype)
    wide = a.to(exact)
    slope = activate_grad(wide, activation)
    if c is None:
        return _gradient(g, slope, dropout, a.dtype), a.new_empty(0)
    return (
        _gradient(g, slope * c.to(exact), dropout, a.dtype),
        _gradient(g, activate(wide, activation), dropout, a.dtype),
    )


def _gradient(g: Tensor, slope: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    return _dropped(g.to(slope.dtype) * slope, dropout, dtype)


def softmax_dropout(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Return ``dropout(softmax(scores + bias + mask))`` and the probabilities before the dropout.

    A row in which everything is masked out by -inf, or by False, has probabilities of 0, as in PyTorch's
    scaled_dot_product_attention.
    """
    exact = accumulator_dtype(scores.dtype)
    total = scores.to(exact)
    if bias is not None:
        total = total + bias.to(exact)
    if mask is not None and mask.dtype == torch.bool:
        total = torch.where(mask, total, -torch.inf)
    elif mask is not None:
        total = total + mask.to(exact)
    closed = (total == -torch.inf).all(-1, keepdim=True)
    # The rows are made harmless before the softmax, not only after: 0 * NaN would reach the gradients.
    probabilities = torch.where(closed, 0.0, torch.softmax(torch.where(closed, 0.0, total), -1))
    return philox.apply(probabilities, dropout).to(scores.dtype), probabilities.to(scores.dtype)


def softmax_dropout_forward(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool
) -> tuple[Tensor, Tensor]:
    """Compute :func:`softmax_dropout`; the probabilities are empty unless ``save`` and p > 0."""
    out, probabilities = softmax_dropout(scores, bias, mask, dropout)
    kept = probabilities.contiguous() if save and dropout.p > 0 else scores.new_empty(0)
    return out.contiguous(), kept


def softmax_dropout_backward(g: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
    """Compute the gradient of the scores, given the probabilities before the dropout.

    These are rounded, so that they do not sum to 1, and the mean of dp is divided by their sum. The mean of what is
    left is subtracted once more: it is 0 but for the rounding of the first mean, and that is not small beside
    ``dp - mean`` where one probability is nearly 1, or where all of dp are nearly equal.
    """
    exact = accumulator_dtype(probabilities.dtype)
    p = probabilities.to(exact)
    dp = philox.apply(g.to(exact), dropout)
    total = p.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    for _ in range(2):
        dp = dp - (dp * p).sum(-1, keepdim=True) / total
    return (p * dp).to(probabilities.dtype).contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout: Dropout,
) -> Tensor:
    """Return ``dropout(softmax(scaling * q k^T + bias + mask)) v``."""
    exact = accumulator_dtype(q.dtype)
    scores = q.to(exact) @ k.to(exact).mT
    weights, _ = softmax_dropout(scores if scaling == 1.0 else scores * scaling, bias, mask, dropout)
    return (weights @ v.to(exact)).to(q.dtype)


def heads_inside(t: Tensor) -> Tensor:
    """Copy t [B, H, L, d] so that it lies in memory as [B, L, H, d], as the linear layers beside it read it."""
    return empty_heads(t, t.shape[2], t.shape[3]).copy_(t)


def empty_heads(like: Tensor, length: int, width: int) -> Tensor:
    """An uninitialised tensor [B, H, length, width] that lies in memory as [B, length, H, width]."""
    B, H = like.shape[:2]
    return like.new_empty(B, length, H, width).transpose(1, 2)


def attention_dbias(dscores: Tensor, bias_shape: Sequence[int]) -> Tensor:
    """Sum dscores [B, H, Lq, Lk] to the shape of the bias, in the accumulator's dtype."""
    total = dscores.to(accumulator_dtype(dscores.dtype)).sum_to_size(tuple(bias_shape))
    return total.clone(memory_format=torch.contiguous_format)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """Return the loss [N] of each row of logits [N, V]: ``(1 - s) * nll + s * mean(-log p)``; 0 for an ignored row.
    A label that is neither ignored nor one of 0 .. V-1, where that could not be checked, gives NaN."""
    V = logits.shape[-1]
    logp = F.log_softmax(logits.to(accumulator_dtype(logits.dtype)), -1)
    ignored = labels == ignore_index
    wrong = ~ignored & ((labels < 0) | (labels >= V))
    if V == 0:
        return torch.where(wrong, torch.nan, logp.sum(-1))
    nll = -logp.gather(-1, labels.clamp(0, V - 1).unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * nll
    if label_smoothing:
        loss = loss - label_smoothing * logp.mean(-1)
    return torch.where(wrong, torch.nan, torch.where(ignored, 0.0, loss))


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Compute :func:`cross_entropy`, and with ``need_grad`` the gradient of the sum of the losses, like logits."""
    loss = cross_entropy(logits, labels, label_smoothing, ignore_index)
    if not need_grad:
        return loss, logits.new_empty(0)
    V = logits.shape[-1]
    gradient = torch.softmax(logits.to(loss.dtype), -1)
    chosen = torch.arange(V, device=logits.device) == labels.unsqueeze(-1)
    # At the label it is p - (1 - s). That is s less the other probabilities, too, and keeps its digits where p is
    # nearly 1; the difference keeps them where p is small.
    others = torch.where(chosen, 0.0, gradient).sum(-1, keepdim=True)
    at_label = torch.where(others < 0.5, label_smoothing - others, gradient - (1 - label_smoothing))
    gradient = torch.where(chosen, at_label, gradient)
    if V and label_smoothing:
        gradient = gradient - label_smoothing / V
    ignored = (labels == ignore_index).unsqueeze(-1)
    gradient = torch.where(ignored, 0.0, torch.where(loss.isnan().unsqueeze(-1), torch.nan, gradient))
    return loss, gradient.to(logits.dtype).contiguous()
