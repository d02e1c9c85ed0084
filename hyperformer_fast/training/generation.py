"""Generate texts for sources without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ..data import HyperFormerDataCollator, TaskSpec
from ..model import HyperFormerModel


@torch.no_grad()
def generate_texts(
    model: HyperFormerModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    sources: Sequence[str],
    batch_size: int,
    max_source_length: int,
    advance: Callable[[int], None] | None = None,
    **gen_kwargs: Any,
) -> list[str]:
    """Return the text that the model generates for each source. The ranks of a process group share the work.

    Args:
        model: a HyperFormerModel that has the task. It is switched to eval mode and back to the mode it was in.
        tokenizer: the T5's tokenizer.
        spec: the task, which knows how its texts are decoded.
        sources: inputs of the model.
        batch_size: sources per batch.
        max_source_length: longest source, in tokens; longer ones are truncated.
        advance: called with the number of sources that were finished since the last call, for a progress bar.
        gen_kwargs: arguments of ``generate`` that take precedence over the task's.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = tokenizer(list(sources), truncation=True, max_length=max_source_length).input_ids if sources else []
    # Longest first: sources of similar length need little padding, and the first batch needs the most memory.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    collate = HyperFormerDataCollator(tokenizer)
    options = {**spec.generation_kwargs(tokenizer), **gen_kwargs}
    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(rank * batch_size, len(order), world * batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([{"task": spec.name, "input_ids": ids[i]} for i in chosen])
            tensors = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            out = model.generate(**tensors, task=spec.name, **options)
            texts |= zip(chosen, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True)
            if advance is not None:
                advance(min(len(order) - start, world * batch_size))
    finally:
        model.train(was_training)
    if world > 1:
        parts: list[dict[int, str]] = [{} for _ in range(world)]
        dist.all_gather_object(parts, texts)
        texts = {i: text for part in parts for i, text in part.items()}
    return [texts[i] for i in range(len(sources))]
