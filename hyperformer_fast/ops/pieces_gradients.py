"""The backwards of a T5's pieces, which eager mode and the registered ops share.

Each takes ``call``, which calls the op of the backward: a method of a backend, or a registered op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Dropout, normed_dtype
from ..t5_reference import attention_dbias
from .gradients import refuse_second_derivative

_Optional = Tensor | None

Call = Callable[..., Any]
Bias = tuple[Sequence[int], torch.dtype]


def refuse(g: Tensor | None, piece: str) -> None:
    """Raise RuntimeError if the backward of ``piece``, which gets the gradient g, is to be differentiated."""
    if g is not None:
        refuse_second_derivative(g, f"ops.{piece}", f"hyperformer_fast.t5_reference.{piece}")


def residual(
    call: Call,
    gradients: tuple[_Optional, _Optional],
    kept: Sequence[_Optional],
    dropout: Dropout,
    need_dy: bool,
    need_dweight: bool,
) -> tuple[_Optional, _Optional, _Optional]:
    """The gradients of hidden, y and weight.

    Args:
        call: calls ``residual_backward``.
        gradients: those of ``out`` and ``normed``.
        kept: what was normed, the weight and ``rstd``; not read where ``normed`` has no gradient.
        dropout: the dropout of y.
        need_dy: whether the gradient of y is needed.
        need_dweight: whether the gradient of the weight is needed.
    """
    g_out, g_normed = gradients
    drops = dropout.p > 0
    if g_normed is None:
        if g_out is None:
            return None, None, None
        if not (drops and need_dy):
            return g_out, None if drops else g_out, None
        return g_out, call(g_out, None, None, None, None, dropout, True, False)[1], None
    x, weight, rstd = kept
    assert x is not None and weight is not None
    # Autocast and hooks may hand on a gradient in another dtype than the forward's results had.
    g_normed = g_normed.to(normed_dtype(x.dtype, weight.dtype))
    g_out = None if g_out is None else g_out.to(x.dtype)
    dhidden, dy, dweight = call(g_out, g_normed, x, weight, rstd, dropout, need_dy and drops, need_dweight)
    return dhidden, dy if drops else dhidden, dweight if need_dweight else None


def attention(
    call: Call, g: Tensor, kept: Sequence[Tensor], scaling: float, dropout: Dropout, bias: Bias | None
) -> tuple[Tensor, Tensor, Tensor, _Optional]:
    """The gradients of q, k, v and bias.

    Args:
        call: calls ``attention_backward``.
        g: the gradient of the output.
        kept: q, k, v and the probabilities.
        scaling: as in the forward.
        dropout: as in the forward.
        bias: the shape and dtype of the bias, if its gradient is needed.
    """
    dq, dk, dv, dbias = call(g, *kept, scaling, dropout, None if bias is None else bias[0])
    return dq, dk, dv, None if bias is None else dbias.to(bias[1])


def softmax(
    call: Call, g: Tensor, probabilities: Tensor, dropout: Dropout, need_scores: bool, bias: Bias | None
) -> tuple[_Optional, _Optional]:
    """The gradients of scores and bias; ``call`` calls ``softmax_dropout_backward``, and ``bias`` is as in
    :func:`attention`."""
    dscores: Tensor = call(g, probabilities, dropout)
    dbias = None if bias is None else attention_dbias(dscores, bias[0]).to(bias[1])
    return dscores if need_scores else None, dbias


def scaled(gradient: Tensor, g: Tensor) -> Tensor:
    """``gradient * g`` in the dtype of ``gradient``, rounded once. If g were rounded to half precision first, it could
    overflow, as that of a scaled loss does, and make NaN of a gradient of 0."""
    return (gradient.to(g.dtype) * g).to(gradient.dtype)
