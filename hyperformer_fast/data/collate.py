"""Tokenise examples and collate them into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .sources import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedExamples(Dataset[dict[str, Any]]):
    """A dataset of tokenised examples. Each is tokenised when it is first accessed.

    Args:
        examples: examples of any tasks.
        tokenizer: the Hugging Face tokenizer of a T5 or ByT5.
        max_source_length: longest source, in tokens; longer ones are truncated. Targets are never truncated.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_source_length: int):
        self.examples, self.tokenizer, self.max_source_length = list(examples), tokenizer, max_source_length
        self._encoded: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._encoded:
            example = self.examples[index]
            self._encoded[index] = {
                "task": example.task,
                "input_ids": encode(self.tokenizer, example.source, self.max_source_length),
                "labels": encode(self.tokenizer, example.target),
            }
        return self._encoded[index]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None) -> list[int]:
    """Return the token ids of ``text``, with the end-of-sequence token."""
    ids: list[int] = tokenizer(text, truncation=max_length is not None, max_length=max_length).input_ids
    return ids


class Collator:
    """Collates tokenised examples into a batch, padded to the longest of them.

    Returns ``input_ids`` and ``attention_mask`` [B, L], ``labels`` [B, M] padded with -100, and ``task``: one name if
    all examples are of the same task, else a list of names.

    Args:
        pad_token_id: the id that the T5 uses for padding.
        multiple_of: round L up to a multiple of this number (8 fits the tiles of tensor cores).
    """

    def __init__(self, pad_token_id: int, multiple_of: int = 1):
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
