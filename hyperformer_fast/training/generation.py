"""Generate texts for whole splits by greedy decoding, and score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ..data import Collator, Example, TaskSpec
from ..data.collate import encode
from ..model import HyperFormerModel
from .metrics import score


def max_new_tokens(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of the longest target of a task, with its end-of-sequence token."""
    return max(len(encode(tokenizer, text)) for text in spec.targets())


@torch.no_grad()
def generate_texts(
    model: HyperFormerModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    sources: Sequence[str],
    batch_size: int,
    max_source_length: int,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the text that the model generates for each source. The ranks of a process group share the work.

    Args:
        model: a HyperFormerModel that has the task. It is switched to eval mode and back to the mode it was in.
        tokenizer: the T5's tokenizer.
        spec: the task, whose longest target bounds the length of the texts.
        sources: inputs of the model.
        batch_size: sources per batch.
        max_source_length: longest source, in tokens; longer ones are truncated.
        advance: called with the number of sources that were finished since the last call, for a progress bar.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = [encode(tokenizer, source, max_source_length) for source in sources]
    # Longest first: sources of similar length need little padding, and the first batch needs the most memory.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    collate, limit = Collator(tokenizer.pad_token_id), max_new_tokens(spec, tokenizer)
    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(rank * batch_size, len(order), world * batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([{"task": spec.name, "input_ids": ids[i]} for i in chosen])
            tensors = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            out = model.generate(**tensors, task=spec.name, max_new_tokens=limit, num_beams=1, do_sample=False)
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


def evaluate_examples(
    model: HyperFormerModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    examples: Sequence[Example],
    batch_size: int,
    max_source_length: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], int]:
    """Return the metrics of a model on examples, as :func:`score` does, and how many generated texts are no label."""
    sources = [example.source for example in examples]
    texts = generate_texts(model, tokenizer, spec, sources, batch_size, max_source_length, advance)
    predictions = [spec.parse(text) for text in texts]
    return score(spec, predictions, [example.label for example in examples]), predictions.count(None)
