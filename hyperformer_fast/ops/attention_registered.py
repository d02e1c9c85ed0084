"""The registered ops of a T5's attention and of the cross-entropy, written as those of pieces_registered.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Dropout, accumulator_dtype
from ..t5_reference import empty_heads
from . import pieces_gradients as gradients
from .op import Op
from .pieces_checks import (
    check_attention,
    check_cross_entropy,
    check_gradient,
    check_label_range,
    check_softmax,
)
from .pieces_registered import keep_dropout, piece_backend

_OPS = torch.ops.hyperformer_fast

softmax_dropout_forward = Op(
    "softmax_dropout_forward",
    "Tensor scores, Tensor? bias, Tensor? mask, {dropout}, bool save",
    "Tensor out, Tensor probabilities",
)


@softmax_dropout_forward.implement
def _(
    scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool, impl: str | None
) -> tuple[Tensor, Tensor]:
    check_softmax(scores, bias, mask, dropout)
    backend = piece_backend("softmax_dropout_forward", scores, impl)
    return backend.softmax_dropout_forward(scores, bias, mask, dropout, save)


@softmax_dropout_forward.fake
def _(scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool) -> tuple[Tensor, Tensor]:
    check_softmax(scores, bias, mask, dropout)
    return scores.new_empty(scores.shape), scores.new_empty(scores.shape if save and dropout.p > 0 else (0,))


softmax_dropout_backward = Op("softmax_dropout_backward", "Tensor g, Tensor probabilities, {dropout}", "Tensor dscores")


@softmax_dropout_backward.implement
def _(g: Tensor, probabilities: Tensor, dropout: Dropout, impl: str | None) -> Tensor:
    check_softmax(probabilities, None, None, dropout)
    check_gradient(g, "g", probabilities, probabilities.dtype)
    backend = piece_backend("softmax_dropout_backward", probabilities, impl)
    return backend.softmax_dropout_backward(g, probabilities, dropout)


@softmax_dropout_backward.fake
def _(g: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
    check_softmax(probabilities, None, None, dropout)
    check_gradient(g, "g", probabilities, probabilities.dtype)
    return probabilities.new_empty(probabilities.shape)


attention_forward = Op(
    "attention_forward",
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, float scaling, {dropout}, bool save",
    "Tensor out, Tensor probabilities",
)


@attention_forward.implement
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout: Dropout,
    save: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, bias, mask, dropout)
    backend = piece_backend("attention_forward", q, impl)
    return backend.attention_forward(q, k, v, bias, mask, scaling, dropout, save)


@attention_forward.fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout: Dropout,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, bias, mask, dropout)
    kept = q.new_empty((*q.shape[:3], k.shape[2]) if save else (0,))
    return empty_heads(q, q.shape[2], v.shape[3]), kept


attention_backward = Op(
    "attention_backward",
    "Tensor g, Tensor q, Tensor k, Tensor v, Tensor probabilities, float scaling, {dropout}, SymInt[]? bias_shape",
    "Tensor dq, Tensor dk, Tensor dv, Tensor dbias",
)


@attention_backward.implement
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probabilities: Tensor,
    scaling: float,
    dropout: Dropout,
    bias_shape: Sequence[int] | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_attention(q, k, v, None, None, dropout)
    backend = piece_backend("attention_backward", q, impl)
    return backend.attention_backward(g, q, k, v, probabilities, scaling, dropout, bias_shape)


@attention_backward.fake
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probabilities: Tensor,
    scaling: float,
    dropout: Dropout,
    bias_shape: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_attention(q, k, v, None, None, dropout)
    dbias = q.new_empty((0,) if bias_shape is None else tuple(bias_shape), dtype=accumulator_dtype(q.dtype))
    dq, dk, dv = (empty_heads(t, t.shape[2], t.shape[3]) for t in (q, k, v))
    return dq, dk, dv, dbias


cross_entropy_forward = Op(
    "cross_entropy_forward",
    "Tensor logits, Tensor labels, float label_smoothing, int ignore_index, bool need_grad",
    "Tensor loss, Tensor dlogits",
)


@cross_entropy_forward.implement
def _(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    need_grad: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    check_cross_entropy(logits, labels, label_smoothing)
    check_label_range(labels, logits.shape[1], ignore_index)
    backend = piece_backend("cross_entropy_forward", logits, impl)
    return backend.cross_entropy_forward(logits, labels, label_smoothing, ignore_index, need_grad)


@cross_entropy_forward.fake
def _(
    logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    check_cross_entropy(logits, labels, label_smoothing)
    loss = logits.new_empty(logits.shape[:1], dtype=accumulator_dtype(logits.dtype))
    return loss, logits.new_empty(logits.shape if need_grad else (0,))


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, bias, _, dropout, _ = inputs
    out, probabilities = output
    keep_dropout(ctx, dropout)
    ctx.bias = None if bias is None or not ctx.needs_input_grad[1] else (bias.shape, bias.dtype)
    ctx.save_for_backward(out if dropout.p == 0 else probabilities, dropout.seed)


def _softmax_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gradients.refuse(g, "softmax_dropout")
    probabilities, seed = ctx.saved_tensors

    def call(g: Tensor, probabilities: Tensor, dropout: Dropout) -> Any:
        return _OPS.softmax_dropout_backward(g, probabilities, *dropout, impl=ctx.impl)

    dropout = Dropout(ctx.p, seed, ctx.stream)
    return gradients.softmax(call, g, probabilities, dropout, ctx.needs_input_grad[0], ctx.bias)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, bias, _, ctx.scaling, dropout, _ = inputs
    keep_dropout(ctx, dropout)
    ctx.bias = None if bias is None or not ctx.needs_input_grad[3] else (bias.shape, bias.dtype)
    ctx.save_for_backward(q, k, v, output[1], dropout.seed)


def _attention_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gradients.refuse(g, "attention")
    *kept, seed = ctx.saved_tensors

    def call(*arguments: Any) -> Any:
        *tensors, scaling, dropout, shape = arguments
        return _OPS.attention_backward(*tensors, scaling, *dropout, shape, impl=ctx.impl)

    results = gradients.attention(call, g, kept, ctx.scaling, Dropout(ctx.p, seed, ctx.stream), ctx.bias)
    return tuple(d if need else None for d, need in zip(results, ctx.needs_input_grad))


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[1])


def _cross_entropy_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gradients.refuse(g, "cross_entropy")
    (dlogits,) = ctx.saved_tensors
    return (gradients.scaled(dlogits, g.unsqueeze(-1)),)


softmax_dropout_forward.differentiate(_softmax_setup, _softmax_backward)
attention_forward.differentiate(_attention_setup, _attention_backward)
cross_entropy_forward.differentiate(_cross_entropy_setup, _cross_entropy_backward)
