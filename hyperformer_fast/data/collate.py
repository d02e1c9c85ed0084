"""Collate tokenised examples into padded batches that say which task each example is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

#: The columns of which a batch is made. All others, such as texts, are left out.
_PADDED = ("labels", "decoder_input_ids", "decoder_attention_mask")


@dataclasses.dataclass
class HyperFormerDataCollator(DataCollatorForSeq2Seq):
    """A ``DataCollatorForSeq2Seq`` for examples that have a ``task`` or a ``task_index``.

    A batch holds ``input_ids``, ``attention_mask``, ``labels`` (padded with -100) and, with ``model``,
    ``decoder_input_ids``. If all of its examples are of one task it has ``task``, the task's name; otherwise it has
    ``task_index`` [B], or a list of names under ``task`` if neither ``model`` nor the examples give the indices. Where
    an example has both, its name decides.

    Args:
        task_names: the names behind the integers of a ``task`` column of type ``ClassLabel``
            (``dataset.features["task"].names``). The other arguments are those of ``DataCollatorForSeq2Seq``.
    """

    task_names: Sequence[str] | None = None

    def __call__(self, features: Sequence[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        kept = (*self.tokenizer.model_input_names, *_PADDED)
        batch = super().__call__(
            [{name: feature[name] for name in kept if name in feature} for feature in features], return_tensors
        )
        return {**batch, **self._tasks(features)}

    def _tasks(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        indices = [int(feature["task_index"]) for feature in features if "task_index" in feature]
        names = [self._name(feature["task"]) for feature in features if "task" in feature]
        known = self._tasks_of_model()
        if names and len(names) < len(features) or indices and len(indices) < len(features):
            raise ValueError("some examples of a batch have a task and others have none: give every example one")
        order = getattr(self.model, "_task_order", None)
        if indices and not names and known is not None:
            if max(indices) >= len(known):
                raise ValueError(f"task_index {max(indices)} is out of range: the model has {', '.join(known)}")
            if order is not None:
                order.expect_current(indices, known)
        if not names and indices and known is not None and min(indices) >= 0:
            names = [known[index] for index in indices]
        if names and len(set(names)) == 1:
            return {"task": names[0]}
        if names and known is not None:
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ValueError(f"unknown task {unknown[0]!r}; the model has {', '.join(known)}")
            if order is not None and order.stale:
                return {"task": names}  # which cannot be mistaken for what an index meant before
            indices = [known.index(name) for name in names]
        elif len(set(names)) > len(set(indices)) > 0:
            raise ValueError(
                f"examples of different tasks ({', '.join(sorted(set(names)))}) have the same task_index: give "
                "encode() the index of each task, or give the collator the model"
            )
        if indices:
            return {"task_index": torch.tensor(indices)}
        return {"task": names} if names else {}

    def _name(self, task: Any) -> str:
        if isinstance(task, str):
            return task
        if self.task_names is None:
            raise ValueError(
                f"a column 'task' must hold names, got {task!r}; for a ClassLabel column give the collator "
                "task_names=dataset.features['task'].names"
            )
        if not 0 <= int(task) < len(self.task_names):
            raise ValueError(f"task {int(task)} is out of range: task_names has {len(self.task_names)} names")
        return self.task_names[int(task)]

    def _tasks_of_model(self) -> list[str] | None:
        config = getattr(self.model, "hyperformer_config", None)
        return None if config is None else list(config.tasks)
