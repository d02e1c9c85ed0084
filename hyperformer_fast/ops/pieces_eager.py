"""The pieces of a T5 in eager mode, as autograd functions that call a backend directly.

The backend of the backward is chosen together with that of the forward, because the backward may run in another thread,
which ``use_backend`` does not affect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..layout import AdapterSpec, Dropout, Folded, Saved
from . import pieces_gradients as gradients


class _Residual(torch.autograd.Function):
    """The autograd function of ``residual`` and ``rms_norm``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor | None,
        y: Tensor,
        weight: Tensor | None,
        dropout: Dropout,
        eps: float,
        forward: Backend,
        backward: Backend,
    ) -> Any:
        out, normed, rstd = forward.residual_forward(hidden, y, dropout, weight, eps, True)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.p, ctx.stream = backward, dropout.p, dropout.stream
        ctx.summed, ctx.normed = hidden is not None, weight is not None
        if weight is None:
            ctx.save_for_backward(dropout.seed)
            return out
        ctx.save_for_backward(dropout.seed, y if hidden is None else out, weight, rstd)
        return normed if hidden is None else (out, normed)

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        for g in of_outputs:
            gradients.refuse(g, "residual" if ctx.summed else "rms_norm")
        g_out = of_outputs[0] if ctx.summed else None
        g_normed = of_outputs[-1] if ctx.normed else None
        seed, *kept = ctx.saved_tensors
        need_hidden, need_y, need_weight, *_ = ctx.needs_input_grad
        dropout = Dropout(ctx.p, seed, ctx.stream)
        dhidden, dy, dweight = gradients.residual(
            ctx.backend.residual_backward, (g_out, g_normed), kept, dropout, need_y, need_weight
        )
        return dhidden if need_hidden else None, dy if need_y else None, dweight, None, None, None, None


class _ActDropout(torch.autograd.Function):
    """The autograd function of ``act_dropout``."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        c: Tensor | None,
        activation: str,
        dropout: Dropout,
        forward: Backend,
        backward: Backend,
    ) -> Tensor:
        ctx.save_for_backward(a, c, dropout.seed)
        ctx.activation, ctx.p, ctx.stream, ctx.backend = activation, dropout.p, dropout.stream, backward
        return forward.act_dropout_forward(a, c, activation, dropout)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients.refuse(g, "act_dropout")
        a, c, seed = ctx.saved_tensors
        da, dc = ctx.backend.act_dropout_backward(g, a, c, ctx.activation, Dropout(ctx.p, seed, ctx.stream))
        need_a, need_c, *_ = ctx.needs_input_grad
        return da if need_a else None, dc if need_c else None, None, None, None, None


class _SoftmaxDropout(torch.autograd.Function):
    """The autograd function of ``softmax_dropout``."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        dropout: Dropout,
        forward: Backend,
        backward: Backend,
    ) -> Tensor:
        out, probabilities = forward.softmax_dropout_forward(scores, bias, mask, dropout, True)
        ctx.save_for_backward(out if dropout.p == 0 else probabilities, dropout.seed)
        ctx.bias = None if bias is None or not ctx.needs_input_grad[1] else (bias.shape, bias.dtype)
        ctx.p, ctx.stream, ctx.backend = dropout.p, dropout.stream, backward
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients.refuse(g, "softmax_dropout")
        probabilities, seed = ctx.saved_tensors
        dropout = Dropout(ctx.p, seed, ctx.stream)
        call = ctx.backend.softmax_dropout_backward
        dscores, dbias = gradients.softmax(call, g, probabilities, dropout, ctx.needs_input_grad[0], ctx.bias)
        return dscores, dbias, None, None, None, None


class _Attention(torch.autograd.Function):
    """The autograd function of ``attention``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scaling: float,
        dropout: Dropout,
        forward: Backend,
        backward: Backend,
    ) -> Tensor:
        out, probabilities = forward.attention_forward(q, k, v, bias, mask, scaling, dropout, True)
        ctx.save_for_backward(q, k, v, probabilities, dropout.seed)
        ctx.bias = None if bias is None or not ctx.needs_input_grad[3] else (bias.shape, bias.dtype)
        ctx.scaling, ctx.p, ctx.stream, ctx.backend = scaling, dropout.p, dropout.stream, backward
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients.refuse(g, "attention")
        *kept, seed = ctx.saved_tensors
        dropout = Dropout(ctx.p, seed, ctx.stream)
        call = ctx.backend.attention_backward
        results = gradients.attention(call, g, kept, ctx.scaling, dropout, ctx.bias)
        return *(d if need else None for d, need in zip(results, ctx.needs_input_grad)), None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """The autograd function of ``cross_entropy_rows``."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, forward: Backend
    ) -> Tensor:
        loss, dlogits = forward.cross_entropy_forward(logits, labels, label_smoothing, ignore_index, True)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradients.refuse(g, "cross_entropy")
        (dlogits,) = ctx.saved_tensors
        return gradients.scaled(dlogits, g.unsqueeze(-1)), None, None, None, None


class _AdapterResidual(torch.autograd.Function):
    """The autograd function of ``adapter_residual``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        y: Tensor,
        packed: Tensor,
        weight: Tensor | None,
        folded: Folded,
        spec: AdapterSpec,
        task_index: Tensor | None,
        dropout: Dropout,
        eps: float,
        forward: Backend,
        backward: Backend,
    ) -> Any:
        out, saved, normed, rstd = forward.adapter_residual_forward(
            hidden, y, folded, spec, task_index, dropout, weight, eps, True
        )
        ctx.set_materialize_grads(False)
        kept = () if weight is None else (out, weight, rstd)
        ctx.save_for_backward(y, *saved, packed, *folded, task_index, dropout.seed, *kept)
        ctx.spec, ctx.p, ctx.stream, ctx.backend = spec, dropout.p, dropout.stream, backward
        return out if weight is None else (out, normed)

    @staticmethod
    def backward(ctx: Any, g_out: Tensor | None, g_normed: Tensor | None = None) -> tuple[Tensor | None, ...]:
        for g in (g_out, g_normed):
            gradients.refuse(g, "residual")
        y, z, r, pre_mean, pre_rstd, packed, *folded, task_index, seed = ctx.saved_tensors[:14]
        need_hidden, need_y, need_packed, need_weight, *_ = ctx.needs_input_grad
        needed = need_y or need_packed
        dropout = Dropout(ctx.p, seed, ctx.stream)
        call = ctx.backend.residual_backward
        dhidden, g, dweight = gradients.residual(
            call, (g_out, g_normed), ctx.saved_tensors[14:], dropout, needed, need_weight
        )
        dy = dpacked = None
        if needed and g is not None:
            saved = Saved(z, r, pre_mean, pre_rstd)
            dy, dpacked = ctx.backend.adapter_backward(
                g, y, saved, packed, Folded(*folded), ctx.spec, task_index, need_y, need_packed
            )
        return (
            dhidden if need_hidden else None,
            dy if need_y else None,
            dpacked if need_packed else None,
            dweight,
            *(None,) * 7,
        )


# Without the layer of Function.apply that looks for functorch transforms, which the callers have done.
residual: Callable[..., Any] = super(torch.autograd.Function, _Residual).apply
act_dropout: Callable[..., Tensor] = super(torch.autograd.Function, _ActDropout).apply
softmax_dropout: Callable[..., Tensor] = super(torch.autograd.Function, _SoftmaxDropout).apply
attention: Callable[..., Tensor] = super(torch.autograd.Function, _Attention).apply
cross_entropy: Callable[..., Tensor] = super(torch.autograd.Function, _CrossEntropy).apply
adapter_residual: Callable[..., Any] = super(torch.autograd.Function, _AdapterResidual).apply
