"""Generate texts for sources without labels, of one task or of several in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from ..data import HyperFormerDataCollator, TaskSpec
from ..model import HyperFormerModel
from ..task_fitting import in_evaluation

#: Tasks whose texts have at most this many tokens share batches, whatever the longest of each is.
_SHORT = 8


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
    """Return the text that the model generates for each source of one task.

    Args:
        model, tokenizer, sources, batch_size, max_source_length, advance: as for :func:`generate_mixed`.
        spec: the task, which knows how its texts are decoded.
        gen_kwargs: arguments of ``generate`` that take precedence over the task's.
    """
    decoding = {spec.name: {**spec.generation_kwargs(tokenizer), **gen_kwargs}}
    tasks = [spec.name] * len(sources)
    return generate_mixed(model, tokenizer, tasks, sources, decoding, batch_size, max_source_length, advance)


@torch.no_grad()
def generate_mixed(
    model: HyperFormerModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    sources: Sequence[str],
    decoding: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    max_source_length: int,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the text that the model generates for each source. The ranks of a process group share the work.

    Tasks that are decoded in the same way share batches. In greedy decoding without further options that is also so
    where they differ in ``max_new_tokens``, within a factor of two: a text that was decoded further is cut, which gives
    the same text.

    Args:
        model: a HyperFormerModel that has the tasks. It is switched to eval mode and back to the mode it was in.
        tokenizer: the T5's tokenizer.
        tasks: the task of each source.
        sources: inputs of the model.
        decoding: the arguments of ``generate`` for each task, with ``max_new_tokens``.
        batch_size: sources per batch.
        max_source_length: longest source, in tokens; longer ones are truncated.
        advance: called with the number of sources that were finished since the last call, for a progress bar.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = tokenizer(list(sources), truncation=True, max_length=max_source_length).input_ids if sources else []
    batches = _batches(model, tasks, list(map(len, ids)), decoding, batch_size)
    collate = HyperFormerDataCollator(tokenizer)
    texts: dict[int, str] = {}
    with in_evaluation(model):
        for start in range(0, len(batches), world):
            now = batches[start : start + world]
            if rank < len(now):
                chosen = now[rank]
                batch = collate([{"input_ids": ids[i]} for i in chosen])
                tensors = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
                names = [tasks[i] for i in chosen]
                limits = [decoding[name]["max_new_tokens"] for name in names]
                options = {**decoding[names[0]], "max_new_tokens": max(limits)}
                out = model.generate(**tensors, task=names if len(set(names)) > 1 else names[0], **options)
                # The token that the decoder starts with stands before those that are new.
                rows = [row[: limit + 1] for row, limit in zip(out, limits, strict=True)]
                texts |= zip(chosen, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True)
            if advance is not None:
                advance(sum(map(len, now)))
    if world > 1:
        parts: list[dict[int, str]] = [{} for _ in range(world)]
        dist.all_gather_object(parts, texts)
        texts = {i: text for part in parts for i, text in part.items()}
    return [texts[i] for i in range(len(sources))]


def _batches(
    model: HyperFormerModel,
    tasks: Sequence[str],
    lengths: Sequence[int],
    decoding: Mapping[str, Mapping[str, Any]],
    batch_size: int,
) -> list[list[int]]:
    """Return the places of the sources of each batch, all of which are decoded in the same way.

    Sources of similar length need little padding, and the longest come first, because they need the most memory.
    """
    kinds = {task: _kind(model, task, decoding[task]) for task in dict.fromkeys(tasks)}
    of_kind: dict[str, list[int]] = {}
    for i in sorted(range(len(tasks)), key=lambda i: -lengths[i]):
        of_kind.setdefault(kinds[tasks[i]], []).append(i)
    return [found[i : i + batch_size] for found in of_kind.values() for i in range(0, len(found), batch_size)]


def _kind(model: HyperFormerModel, task: str, options: Mapping[str, Any]) -> str:
    """Return a text that is the same for tasks whose rows may share a batch."""
    config = cast(Any, model.t5).generation_config
    does_sample = options.get("do_sample", config.do_sample)
    if does_sample:
        return json.dumps(task)  # numbers are drawn for a batch as a whole
    greedy = config.get_generation_mode() == GenerationMode.GREEDY_SEARCH and config.forced_eos_token_id is None
    if greedy and options.keys() <= {"max_new_tokens", "num_beams"} and options.get("num_beams", 1) == 1:
        return f"greedy {max(_SHORT, 1 << (options['max_new_tokens'] - 1).bit_length())}"
    return json.dumps(options, sort_keys=True, default=str)
