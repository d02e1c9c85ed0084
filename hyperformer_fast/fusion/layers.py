"""The forwards of fused modules. Each runs the module's own forward wherever a condition does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations as transformers_activations

from .. import ops, philox
from ..layout import NO_DROPOUT, Dropout
from ..ops import products
from ..sites import only_hook
from . import classes
from .conditions import any_global_hook, drops, is_hooked, is_matrix, is_plain, is_weight
from .handover import Link, hand_on, take

#: The attribute of a fused module that holds its ``Plan``.
PLAN = "_hff_plan"

_Forward = Callable[..., Any]


class Plan:
    """What a fused module needs beside what it is.

    Args:
        adds: whether a sublayer's dropout and residual add are one op.
        link: what lies between a sublayer and the next norm.
    """

    def __init__(self, adds: bool = False, link: Link | None = None):
        self.adds, self.link = adds, link or Link()


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of a fused module, None where it was unfused, whatever still calls its fused forward."""
    plan: Plan | None = module.__dict__.get(PLAN)
    return plan


def _norm(base: type[nn.Module]) -> _Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if plan_of(self) is None or not is_plain(hidden_states):
            return base.forward(self, hidden_states)
        if not torch.compiler.is_compiling():
            normed = take(hidden_states, weight)
            if normed is not None:
                return normed
        if not is_weight(weight, hidden_states):
            return base.forward(self, hidden_states)
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)

    return forward


def _feed_forward(base: type[nn.Module]) -> _Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if plan_of(self) is None:
            return base.forward(self, hidden_states)
        normed = self.layer_norm(hidden_states)
        return _run(self, self.DenseReluDense, hidden_states, normed, {})[0]

    return forward


def _attention(attribute: str) -> Callable[[type[nn.Module]], _Forward]:
    def make(base: type[nn.Module]) -> _Forward:
        # T5's attention has another name for it than the sublayer and than UMT5's.
        mask = "attention_mask" if base.__name__.startswith("UMT5") else "mask"

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            if args or plan_of(self) is None:
                return base.forward(self, hidden_states, *args, **kwargs)
            normed = self.layer_norm(hidden_states)
            kwargs[mask] = kwargs.pop("attention_mask", None)
            return _run(self, getattr(self, attribute), hidden_states, normed, kwargs)

        return forward

    return make


def _run(sublayer: Any, inner: nn.Module, hidden: Tensor, normed: Tensor, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What is inside a sublayer, and what ends it: hidden + dropout(y), or hidden + dropout(adapter(y)).

    Returns:
        The sum, with the norm for the next sublayer attached where it may be, and what else ``inner`` returned.
    """
    plan, dropout = plan_of(sublayer), sublayer.dropout
    hook = only_hook(inner) if plan is not None and plan.adds and not any_global_hook() else None
    output = inner(normed, **kwargs) if hook is None else inner.forward(normed, **kwargs)
    y, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
    if plan is None or not plan.adds or not _can_add(hidden, y, dropout):
        if hook is not None:
            y = hook(inner, (normed,), y)
        return hidden + dropout(y), *rest
    mask = drawn(dropout, y)
    norm: Any = plan.link.norm_for(hidden, y)
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
    added = ops.residual(hidden, y, mask, weight, eps) if hook is None else hook.add(hidden, y, mask, weight, eps)
    if weight is None:
        return added, *rest
    out, made = added
    hand_on(out, made, weight)
    return out, *rest


def _can_add(hidden: Tensor, y: Tensor, dropout: object) -> bool:
    return is_plain(hidden) and is_plain(y) and hidden.shape == y.shape and hidden.device == y.device and drops(dropout)


def drawn(dropout: nn.Dropout, like: Tensor) -> Dropout:
    """The dropout of one call."""
    return philox.draw(dropout.p, like) if dropout.training else NO_DROPOUT


#: Modules of activations -> the activation's name in ``ops``. Both generations of transformers have some of their own.
_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    **{
        getattr(transformers_activations, name): activation
        for name, activation in {
            "NewGELUActivation": "gelu_new",
            "GELUTanh": "gelu_new",
            "PytorchGELUTanh": "gelu_new",
            "GELUActivation": "gelu",
            "SiLUActivation": "silu",
        }.items()
        if hasattr(transformers_activations, name)
    },
}


def activation_of(module: object) -> str | None:
    """The name in ``ops`` of an activation's module, None where no op has it."""
    return _ACTIVATIONS.get(type(module))


def _dense(base: type[nn.Module]) -> _Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        activation = activation_of(self.act)
        if plan_of(self) is None or activation is None or not _may_activate(self, hidden_states):
            return base.forward(self, hidden_states)
        a = self.wi(hidden_states)
        if is_plain(a):
            hidden = ops.act_dropout(a, activation, None, drawn(self.dropout, a))
        else:
            hidden = self.dropout(self.act(a))
        return self.wo(_for_weight(hidden, self.wo.weight))

    return forward


def _gated(base: type[nn.Module]) -> _Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        activation = activation_of(self.act)
        if plan_of(self) is None or activation is None or not _may_activate(self, hidden_states):
            return base.forward(self, hidden_states)
        a, c = self.wi_0(hidden_states), self.wi_1(hidden_states)
        if is_plain(a) and is_plain(c) and a.shape == c.shape and a.dtype == c.dtype and a.device == c.device:
            hidden = ops.act_dropout(a, activation, c, drawn(self.dropout, a))
        else:
            hidden = self.dropout(self.act(a) * c)
        return self.wo(_for_weight(hidden, self.wo.weight))

    return forward


def _may_activate(dense: Any, hidden: Tensor) -> bool:
    return drops(dense.dropout) and not is_hooked(dense.act) and is_plain(hidden)


def _for_weight(hidden: Tensor, weight: Any) -> Tensor:
    """In the dtype of the next linear, as transformers casts it: flan-T5 keeps that linear in float32, and quantised
    ones are int8 or hide their weight behind a method."""
    if isinstance(weight, Tensor) and hidden.dtype != weight.dtype and weight.dtype != torch.int8:
        return hidden.to(weight.dtype)
    return hidden


def _dropout(base: type[nn.Module]) -> _Forward:
    def forward(self: Any, input: Tensor) -> Tensor:
        if plan_of(self) is None or not self.training or not is_plain(input) or not input.dim():
            return base.forward(self, input)
        mask = philox.draw(self.p, input)
        if mask is NO_DROPOUT:
            return input
        # Rows of zeros to add to, which all lie at one place.
        return ops.residual(input.new_zeros(input.shape[-1]).expand_as(input), input, mask)

    return forward


def _linear(base: type[nn.Module]) -> _Forward:
    products.why_not()  # before a compiler traces what follows

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        weight = self.weight
        if plan_of(self) is None or self.bias is not None or not is_plain(input) or not is_matrix(weight):
            return base.forward(self, input)
        return products.linear(input, weight)

    return forward


classes.FORWARDS.update(
    {
        classes.LINEAR: _linear,
        classes.DROPOUT: _dropout,
        classes.NORM: _norm,
        classes.DENSE: _dense,
        classes.GATED: _gated,
        classes.FEED_FORWARD: _feed_forward,
        classes.SELF_ATTENTION: _attention("SelfAttention"),
        classes.CROSS_ATTENTION: _attention("EncDecAttention"),
    }
)
