"""Tokenise examples once, and keep the tokens for later runs and for the other processes of this one."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import content_print, only_one, progress, text_print
from .examples import TaskData
from .tasks import DataError, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: A progress bar is shown for more rows than this.
_MANY_ROWS = 20_000


def encode(
    task: TaskData,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int | None,
    max_target_length: int | None = None,
    limit: int | None = None,
    index: int = 0,
) -> Dataset:
    """Return the tokens of a split: a Dataset with ``input_ids``, ``labels``, ``task_index`` and ``task``.

    Args:
        task: the task.
        split: one of its splits.
        tokenizer: the T5's tokenizer.
        max_source_length: longest source, in tokens; longer ones are truncated. None for no limit.
        max_target_length: longest target, in tokens; None for that of the task's entry, or no limit. A warning says how
            many free texts are truncated; a class or a number is never truncated.
        limit: use only so many of the split's first rows; None for all.
        index: the task's index in the model's tasks.

    Raises:
        DataError: there is no such split, the tokenizer cannot write the text of a class, or a class or a number has
            more than ``max_target_length`` tokens.
    """
    if split not in task.splits:
        raise DataError(f"task {task.spec.name!r} has no split {split!r}; it has {', '.join(task.splits)}")
    examples = task.splits[split]
    if limit is not None and limit < len(examples):
        examples = examples.select(range(limit))
    if max_target_length is None:
        max_target_length = task.spec.max_target_length
    texts = examples.select_columns(["source", "target"])
    settings = repr((task.spec.name, max_source_length, max_target_length, index))
    path = task.cache.path("tokens", content_print(texts), tokenizer_print(tokenizer), settings)
    tokenise = _Tokenise(tokenizer, max_source_length, max_target_length, task.spec, index)
    encoded = _mapped(texts, tokenise, path, task, f"tokenising {task.spec.name} {split}")
    _check_targets(task, split, encoded.data.column("target_tokens"), max_target_length)
    return encoded.remove_columns("target_tokens")


def _mapped(texts: Dataset, tokenise: Callable[..., Any], path: Path, task: TaskData, description: str) -> Dataset:
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": texts.column_names,
        "features": _features(),
        "desc": description,
        "num_proc": task.cache.num_proc if len(texts) > _MANY_ROWS else None,
        "new_fingerprint": path.stem,
    }
    with progress(len(texts) > _MANY_ROWS):
        try:
            with only_one(path):
                fresh = task.cache.is_fresh(path)
                return texts.map(tokenise, cache_file_name=str(path), load_from_cache_file=fresh, **options)
        except (OSError, NotImplementedError):  # read-only or full; no locks on this file system
            return texts.map(tokenise, keep_in_memory=True, **options)


class _Tokenise:
    """Tokenises a batch of texts. A class, because a function inside another cannot be sent to other processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_source_length: int | None,
        max_target_length: int | None,
        spec: TaskSpec,
        index: int,
    ):
        self.tokenizer, self.name, self.index = tokenizer, spec.name, index
        self.are_classes = spec.target == "class"
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        longest = self.max_target_length
        # Without truncation the tokenizer would advise against what is not done here.
        labels = self.tokenizer(text_target=batch["target"], verbose=False).input_ids
        if self.are_classes:
            self._check_classes(dict(zip(batch["target"], labels)))
        lengths = [len(ids) for ids in labels]
        for row, length in enumerate(lengths):
            if longest is not None and length > longest:
                cut = self.tokenizer(text_target=batch["target"][row], truncation=True, max_length=longest)
                labels[row] = cut.input_ids
        return {
            "input_ids": token_ids(self.tokenizer, batch["source"], self.max_source_length),
            "labels": labels,
            "task_index": [self.index] * len(labels),
            "task": [self.name] * len(labels),
            "target_tokens": lengths,
        }

    def _check_classes(self, labels: dict[str, list[int]]) -> None:
        """Refuse a class whose text is not read back as it is written: T5 has no ``<``, and all would be wrong."""
        texts = self.tokenizer.batch_decode(list(labels.values()), skip_special_tokens=True)
        for label, text in zip(labels, texts):
            if text.strip() != label:
                raise DataError(
                    f"task {self.name!r}: the tokenizer reads the label {label!r} back as {text!r}, so that no "
                    "prediction could be right; choose another text for it in 'labels'"
                )


def token_ids(tokenizer: PreTrainedTokenizerBase, sources: list[str], max_length: int | None) -> list[list[int]]:
    """Return the ids of some sources, each with its end-of-sequence token and truncated to ``max_length``."""
    truncation = {"verbose": False} if max_length is None else {"truncation": True, "max_length": max_length}
    ids: list[list[int]] = tokenizer(sources, **truncation).input_ids
    return ids


def _features() -> Any:
    from datasets import Features, Value

    return Features(
        {
            "input_ids": [Value("int32")],
            "labels": [Value("int32")],
            "task_index": Value("int64"),
            "task": Value("string"),
            "target_tokens": Value("int32"),
        }
    )


def _check_targets(task: TaskData, split: str, lengths: Any, limit: int | None) -> None:
    import pyarrow.compute as pc

    if limit is None or not len(lengths) or (longest := pc.max(lengths).as_py()) <= limit:
        return
    name, longer = task.spec.name, pc.sum(pc.greater(lengths, limit)).as_py()
    if task.spec.target != "text":
        raise DataError(
            f"task {name!r}: its labels need up to {longest} tokens, but max_target_length is {limit}; raise it"
        )
    warnings.warn(
        f"{name} {split}: {longer:,} of {len(lengths):,} targets have more than max_target_length={limit} tokens and "
        f"are truncated; the longest has {longest:,}",
        stacklevel=3,
    )


#: The hashes of tokenizers, because a vocabulary takes a tenth of a second.
_PRINTS: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()


def tokenizer_print(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what decides a tokenizer's output. It is the same in every process, and after every use."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = repr((type(tokenizer).__qualname__, len(tokenizer), special, tokenizer.truncation_side))
    if _PRINTS.get(tokenizer, ("", ""))[0] != settings:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Its truncation and padding are those of the last call.
            content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        else:
            content = {"vocabulary": tokenizer.get_vocab()}
        _PRINTS[tokenizer] = settings, text_print(json.dumps(content, sort_keys=True), settings)
    return _PRINTS[tokenizer][1]
