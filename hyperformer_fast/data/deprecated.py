"""Names of earlier versions, which keep working for one release."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .encode import token_ids
from .formats import Placed, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _warn(old: str, new: str) -> None:
    warnings.warn(f"hyperformer_fast.data.{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)


class Example(NamedTuple):
    """One row of a task as text: what the model reads and what it is to write."""

    task: str
    source: str
    target: str
    label: int | float


class EncodedExamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised :class:`Example` tuples. Use :func:`hyperformer_fast.data.encode`."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_source_length: int):
        _warn("EncodedExamples", "hyperformer_fast.data.encode")
        self.examples, self.tokenizer, self.max_source_length = list(examples), tokenizer, max_source_length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        (source,) = token_ids(self.tokenizer, [example.source], self.max_source_length)
        (target,) = token_ids(self.tokenizer, [example.target], None)
        return {"task": example.task, "input_ids": source, "labels": target}


class Collator:
    """Collates tokenised examples into a batch. Use :class:`hyperformer_fast.data.HyperFormerDataCollator`."""

    def __init__(self, pad_token_id: int, multiple_of: int = 1):
        _warn("Collator", "hyperformer_fast.data.HyperFormerDataCollator")
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

    def __call__(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        input_ids = _pad([item["input_ids"] for item in encoded], self.pad_token_id, self.multiple_of)
        mask = _pad([[1] * len(item["input_ids"]) for item in encoded], 0, self.multiple_of)
        tasks = [item["task"] for item in encoded]
        batch = {"input_ids": input_ids, "attention_mask": mask, "task": tasks[0] if len(set(tasks)) == 1 else tasks}
        if "labels" in encoded[0]:
            batch["labels"] = _pad([item["labels"] for item in encoded], -100, 1)
        return batch


def _pad(rows: list[list[int]], value: int, multiple_of: int) -> Tensor:
    length = -(-max(map(len, rows)) // multiple_of) * multiple_of
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def read_jsonl(path: Any) -> list[Placed]:
    """Return all rows of a JSON-lines file. Use :func:`hyperformer_fast.data.read_rows`."""
    _warn("read_jsonl", "hyperformer_fast.data.read_rows")
    return read_rows(path)
