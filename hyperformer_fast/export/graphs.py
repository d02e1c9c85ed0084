"""The encoder and one decoding step of a T5 with the adapters of all tasks, as modules that torch.export can trace.

They call the T5's own linears and norms, but state attention, masks and the cache themselves: as functions of tensors,
the same for every transformers.

Letters: B samples, L tokens of a source, P slots of the cache, N blocks of the decoder, H heads, k width of a head, V
vocabulary, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hypernetwork import POSITIONS
from .task_weights import TaskAdapter, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..hypernetwork import AdapterSource


class _Stack(nn.Module):
    """One stack of a T5 with its adapters.

    Args:
        t5: a plain T5 with a head, which the graph shares.
        name: ``"encoder"`` or ``"decoder"``.
        net: what made the adapters of the stack.
        packed: [S, T, P], their packed weights.
        activation: of the adapters.
    """

    def __init__(self, t5: PreTrainedModel, name: str, net: AdapterSource, packed: Tensor, activation: str):
        super().__init__()
        stack: Any = getattr(t5, name)
        self.tasks = packed.shape[1]
        self.embed_tokens, self.norm = stack.embed_tokens, stack.final_layer_norm
        self.blocks = nn.ModuleList(_Block(block, net, packed, i, activation) for i, block in enumerate(stack.block))
        attentions = [block.layer[0].SelfAttention for block in stack.block]
        #: The relative biases of the blocks; None for a block that takes those of the block before.
        biases: Any = [
            _RelativeBias(each, name == "encoder") if each.has_relative_attention_bias else None for each in attentions
        ]
        self.biases = nn.ModuleList(biases)  # its annotation knows of no None, which it takes

    def with_biases(self) -> Iterator[tuple[Any, Any]]:
        """Each block and its relative biases."""
        return zip(self.blocks, self.biases)


class Encoder(_Stack):
    """Encode sources, and make the decoder's cross-attention keys and values of them. Arguments as for a stack."""

    def __init__(self, t5: PreTrainedModel, net: AdapterSource, packed: Tensor, activation: str):
        super().__init__(t5, "encoder", net, packed, activation)
        parts: Any = t5
        cross = [block.layer[1].EncDecAttention for block in parts.decoder.block]
        self.keys, self.values = nn.ModuleList(each.k for each in cross), nn.ModuleList(each.v for each in cross)
        self.heads = cross[0].n_heads

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the decoder's cross-attention, [N, B, H, L, k] each.

        Args:
            input_ids: [B, L] the sources' tokens.
            attention_mask: [B, L] 1 for a token, 0 for padding.
            task_index: [B] the task of each sample, -1 for no adapters. A task that does not exist makes NaN.
        """
        rows = rows_of(task_index, self.tasks)
        x = self.embed_tokens(input_ids)
        mask = _mask(attention_mask, x.dtype)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        relative = places.unsqueeze(0) - places.unsqueeze(1)
        bias = mask
        for block, table in self.with_biases():
            if table is not None:
                bias = table(relative).permute(2, 0, 1).unsqueeze(0) + mask
            q, k, v = block.projected(x)
            x = block.attended(x, _attend(q, k, v, bias), rows)
            x = block.fed_forward(x, rows)
        x = self.norm(x)
        keys, values = ([_heads(module(x), self.heads) for module in each] for each in (self.keys, self.values))
        return torch.stack(keys), torch.stack(values)


class DecodingStep(_Stack):
    """Decode one token of each sample. Arguments are those of :class:`Encoder`, for the decoder."""

    def __init__(self, t5: PreTrainedModel, net: AdapterSource, packed: Tensor, activation: str):
        super().__init__(t5, "decoder", net, packed, activation)
        parts: Any = t5
        self.lm_head = parts.lm_head
        config: Any = t5.config
        # transformers 4 says by the one what 5 says by the other.
        scales = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self.scale = config.d_model**-0.5 if scales else 1.0

    def forward(
        self,
        token: Tensor,
        position: Tensor,
        attention_mask: Tensor,
        task_index: Tensor,
        keys: Tensor,
        values: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [B, V] of the next token, and this token's keys and values, [N, B, H, k] each, which the
        caller writes to slot ``position`` of the cache.

        Args:
            token: [B] the last token of each sample, at first ``decoder_start_token_id``.
            position: [B] how many tokens of each sample came before it, 0 at first.
            attention_mask: [B, L] as for the encoder.
            task_index: [B] as for the encoder.
            keys, values: [N, B, H, P, k] the cache: those of earlier tokens in the slots before ``position``, and any
                finite numbers, such as zeros, in the others. P is at least 1, and more than every position.
            cross_keys, cross_values: [N, B, H, L, k] what the encoder returned.
        """
        rows = rows_of(task_index, self.tasks)
        x = self.embed_tokens(token.unsqueeze(1))
        mask = _mask(attention_mask, x.dtype)
        slots = torch.arange(keys.shape[3], device=keys.device)
        relative = slots.unsqueeze(0) - position.unsqueeze(1)
        # The last column is the token itself.
        relative = torch.cat([relative, torch.zeros_like(relative[:, :1])], 1)
        written = torch.cat([relative[:, :-1] < 0, torch.ones_like(relative[:, -1:], dtype=torch.bool)], 1)
        bias = x.new_zeros(())
        new_keys, new_values = [], []
        for i, (block, table) in enumerate(self.with_biases()):
            if table is not None:
                bias = table(relative).permute(0, 2, 1).unsqueeze(2)
                bias = torch.where(written[:, None, None, :], bias, torch.finfo(x.dtype).min)
            q, k, v = block.projected(x)
            new_keys.append(k.squeeze(2))
            new_values.append(v.squeeze(2))
            x = block.attended(x, _attend_with_last(q, keys[i], values[i], k, v, bias), rows)
            x = block.cross_attended(x, cross_keys[i], cross_values[i], mask)
            x = block.fed_forward(x, rows)
        logits: Tensor = self.lm_head(self.norm(x) * self.scale).squeeze(1)
        return logits, torch.stack(new_keys), torch.stack(new_values)


class _Block(nn.Module):
    """One block of either stack, with its two adapters."""

    def __init__(self, block: Any, net: AdapterSource, packed: Tensor, layer: int, activation: str):
        super().__init__()
        self.self_attention, self.feed_forward = block.layer[0], block.layer[-1]
        if len(block.layer) == 3:
            self.cross_attention = block.layer[1]
        dtype = block.layer[0].layer_norm.weight.dtype
        self.adapters = nn.ModuleDict(
            {where: TaskAdapter(packed[net.site(layer, where)], net.layout, activation, dtype) for where in POSITIONS}
        )

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """The queries, keys and values [B, H, M, k] of self-attention."""
        attention, x = self.self_attention.SelfAttention, self.self_attention.layer_norm(x)
        return tuple(_heads(module(x), attention.n_heads) for module in (attention.q, attention.k, attention.v))

    def attended(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """x with what self-attention found, y [B, M, H k], adapted."""
        return x + self.adapters["self_attention"](self.self_attention.SelfAttention.o(y), rows)

    def cross_attended(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        attention = self.cross_attention.EncDecAttention
        q = _heads(attention.q(self.cross_attention.layer_norm(x)), attention.n_heads)
        return x + attention.o(_attend(q, keys, values, mask))

    def fed_forward(self, x: Tensor, rows: Tensor) -> Tensor:
        y = self.feed_forward.DenseReluDense(self.feed_forward.layer_norm(x))
        return x + self.adapters["feed_forward"](y, rows)


class _RelativeBias(nn.Module):
    """The bias of attention by the distance of two tokens, from a table of all distances that T5 tells apart."""

    table: Tensor

    def __init__(self, attention: Any, bidirectional: bool):
        super().__init__()
        # From there on all distances have one bias.
        self.most = attention.relative_attention_max_distance
        distances = torch.arange(-self.most, self.most + 1)
        buckets = _buckets(
            distances,
            bidirectional,
            attention.relative_attention_num_buckets,
            attention.relative_attention_max_distance,
        )
        weight = attention.relative_attention_bias.weight.detach()
        self.register_buffer("table", weight[buckets.to(weight.device)].clone())

    def forward(self, relative: Tensor) -> Tensor:
        """The biases [..., H] of distances [...]."""
        return self.table[relative.clamp(-self.most, self.most) + self.most]


def _buckets(distance: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance: one for each small distance, and ever wider ones up to ``max_distance``."""
    start = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        start = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    wide = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return start + torch.where(distance < exact, distance, (exact + wide.long()).clamp(max=buckets - 1))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, M, H k] as [B, H, M, k]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores [B, H, M, L]."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """T5's attention, which does not scale, of queries [B, H, M, k]: [B, M, H k]."""
    p = (q @ k.mT + bias).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


def _attend_with_last(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """:func:`_attend` to the cache and to the token itself, whose keys and values are not in the cache yet."""
    scores = torch.cat([q @ keys.mT, (q * k).sum(-1, keepdim=True)], -1) + bias
    p = scores.softmax(-1)
    return (p[..., :-1] @ values + p[..., -1:] * v).transpose(1, 2).flatten(2)


def graphs_of(
    t5: PreTrainedModel, nets: Mapping[str, AdapterSource], packed: Mapping[str, Tensor], activation: str
) -> tuple[Encoder, DecodingStep]:
    """Both graphs, in ``eval()``. ``packed`` [S, T, P] has the weights of the tasks by stack."""
    with torch.no_grad():
        encoder = Encoder(t5, nets["encoder"], packed["encoder"], activation)
        step = DecodingStep(t5, nets["decoder"], packed["decoder"], activation)
    return encoder.eval(), step.eval()
