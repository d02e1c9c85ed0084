"""Attention with its softmax and dropout in one pass, through transformers' own interface for attention.

A fused stack's configuration names an implementation of ours in the place of the one that it had. Whatever ours does
not serve, it hands to that one, with the very arguments. transformers before 5 has no such interface in T5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils, modeling_utils

from .. import ops, philox
from ..ops.pieces_registered import piece_backend
from .classes import ATTENTION, is_unchanged, kind_of
from .conditions import is_plain

#: What we are named -> the implementation of transformers whose place we take.
_REPLACED = {"hyperformer_fast_sdpa": "sdpa", "hyperformer_fast_eager": "eager"}
_NAMES = {theirs: ours for ours, theirs in _REPLACED.items()}

#: With fewer queries than these, as in decoding, attention without dropout is left to transformers.
LEAST_QUERIES = 8

#: Arguments that say nothing about what attention computes, or are read here.
_HARMLESS = frozenset(
    ("output_attentions", "output_hidden_states", "use_cache", "return_dict", "cache_position", "num_items_in_batch")
)


def is_supported() -> bool:
    """Whether T5 of this transformers looks its attention up by name."""
    from transformers.models.t5 import modeling_t5

    return hasattr(modeling_t5, "eager_attention_forward")


def why_not(stack: nn.Module) -> str | None:
    """Why the attention of a stack keeps its implementation, None if ours can take its place."""
    if not is_supported():
        return "this transformers has no interface for T5's attention: transformers 5 has"
    for module in stack.modules():
        if kind_of(type(module)) == ATTENTION and not is_unchanged(type(module)):
            return f"the forward of {type(module).__name__} was replaced"
    name = stack.config._attn_implementation  # type: ignore[union-attr]
    if name not in _NAMES and name not in _REPLACED:
        return f"attn_implementation is {name!r}, not 'sdpa' or 'eager'"
    return None


def switch_on(stack: nn.Module) -> None:
    """Let a stack's attention run ours."""
    config: Any = stack.config
    config._attn_implementation_internal = _NAMES.get(config._attn_implementation, config._attn_implementation)


def switch_off(stack: nn.Module) -> None:
    """Give a stack the implementation back that it had."""
    config: Any = stack.config
    theirs = _REPLACED.get(config._attn_implementation)
    if theirs is not None:
        config._attn_implementation_internal = theirs


def is_on(stack: nn.Module) -> bool:
    """Whether a stack's attention runs ours."""
    return getattr(stack.config, "_attn_implementation", None) in _REPLACED


def _attend(
    theirs: Callable[..., Any],
    makes_causal: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    if scaling is None or not _serves(module, query, key, value, attention_mask, dropout, position_bias, kwargs):
        return theirs(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **kwargs,
        )
    if attention_mask is None and makes_causal and module.is_causal and query.shape[2] > 1:
        rows = torch.arange(query.shape[2], device=query.device)
        attention_mask = (rows[:, None] >= torch.arange(key.shape[2], device=query.device))[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # As transformers does, so that a query without any key attends to all alike.
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.where(attention_mask, 0.0, lowest).to(query.dtype)
    out = ops.attention(query, key, value, position_bias, attention_mask, scaling, philox.draw(dropout, query))
    return out.transpose(1, 2).contiguous(), None


def _gains(query: Tensor) -> bool:
    """Whether the fused attention is the faster one without dropout, too. The C++ kernel is, unless there are so few
    queries that its copies of keys and values count; on a GPU torch's own is."""
    if torch.compiler.is_compiling() or query.device.type != "cpu" or query.shape[2] < LEAST_QUERIES:
        return False
    return piece_backend("attention_forward", query, None).name == "cpu"


def _serves(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    bias: Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the fused ops serve these arguments, and gain anything."""
    if not is_plain(query) or not (dropout or _gains(query)):
        return False  # here in decoding, for every token
    if not (is_plain(key) and is_plain(value)):
        return False
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        return False
    wants = kwargs.get("output_attentions")
    config: Any = module.config
    if config.output_attentions if wants is None else wants:
        return False
    if any(kwargs[name] is not None for name in kwargs.keys() - _HARMLESS):
        return False
    if bias is not None and not (is_plain(bias) and bias.device == query.device):
        return False
    return mask is None or type(mask) is Tensor and (mask.dtype == torch.bool or mask.is_floating_point())


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' ``sdpa``, with dropout fused."""
    theirs = modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    # transformers leaves a mask away that is causal only, for sdpa to make.
    return _attend(theirs, True, module, query, key, value, attention_mask, dropout, scaling, position_bias, kwargs)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """T5's ``eager``, with dropout fused."""
    from transformers.models.t5 import modeling_t5

    theirs = modeling_t5.eager_attention_forward
    return _attend(theirs, False, module, query, key, value, attention_mask, dropout, scaling, position_bias, kwargs)


# At import, so that a fused T5 that another process unpickles finds them.
for _ours, _forward in (("hyperformer_fast_sdpa", _sdpa), ("hyperformer_fast_eager", _eager)):
    modeling_utils.AttentionInterface.register(_ours, _forward)
    masking_utils.AttentionMaskInterface.register(_ours, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[_REPLACED[_ours]])
