"""A Seq2SeqTrainer that evaluates task by task, with each task's own decoding and metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch.utils.data import Subset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import speed_metrics

from ..data import TaskSpec
from .batches import class_names, task_of_rows
from .metrics import average_metrics, average_tasks, score


class TaskOutcome(NamedTuple):
    """What the evaluation of one task found.

    ``metrics`` are the Trainer's, with their prefix; ``scores`` are the task's in percent, with their mean as
    ``score``; ``texts`` are the generated ones, in the order of the rows, and None without generation.
    """

    metrics: dict[str, float]
    scores: dict[str, float]
    texts: list[str] | None


class TaskEvaluatingTrainer(Seq2SeqTrainer):
    """Evaluates the rows of each task by themselves; :class:`HyperFormerTrainer` says how."""

    args: Seq2SeqTrainingArguments
    #: The T5's tokenizer. Its declared type is that of any processor.
    processing_class: Any
    #: Specifications of tasks, by name.
    tasks: dict[str, TaskSpec]
    #: The longest text that is generated, in tokens, where neither ``generation_max_length`` nor the task says so.
    max_target_length: int | None = None

    @property
    def adapted(self) -> Any:
        """The model, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def task_names(self) -> list[str]:
        """The model's tasks, in the order of ``task_index``."""
        return list(self.adapted.hyperformer_config.tasks)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Return the scores of all tasks, and their averages, as the class describes them."""
        started, rows = time.time(), 0
        metrics: dict[str, float] = {}
        scores: dict[str, dict[str, float]] = {}
        for name, (task, part) in self.parts(self.eval_dataset if eval_dataset is None else eval_dataset).items():
            outcome = self.evaluate_task(task, part, ignore_keys, f"{metric_key_prefix}_{name}", **gen_kwargs)
            metrics |= outcome.metrics | {f"{metric_key_prefix}_{name}_{k}": v for k, v in outcome.scores.items()}
            rows += len(part)
            if outcome.scores:
                scores[name] = outcome.scores
        if scores:
            metrics[f"{metric_key_prefix}_average_metrics"] = average_metrics(scores)
            metrics[f"{metric_key_prefix}_average_tasks"] = average_tasks(scores)
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def parts(self, rows: Any) -> dict[str, tuple[str, Any]]:
        """Split a dataset, or a dictionary of them, by task: (task, its rows) by the name that their scores have."""
        if rows is None:
            raise ValueError("evaluation needs an eval_dataset")
        names = self.task_names
        if isinstance(rows, dict):
            found: dict[str, tuple[str, Any]] = {}
            for key, each in rows.items():
                parts = self.parts(_with_task(each, key) if key in names and _lacks_task(each) else each)
                if key in names and parts.keys() - {key}:
                    raise ValueError(f"eval_dataset[{key!r}] has rows of {', '.join(sorted(parts.keys() - {key}))}")
                found |= {name if name == key else f"{key}_{name}": part for name, part in parts.items()}
            return found
        index = task_of_rows(rows, names, self.adapted._task_order)
        return {
            names[i]: (names[i], _with_task(_select(rows, np.flatnonzero(index == i)), names[i]))
            for i in np.unique(index)
        }

    def evaluate_task(
        self,
        task: str,
        rows: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> TaskOutcome:
        """Evaluate one task on rows of it, by the stock loop: the processes share the rows, and none counts twice."""
        spec = self.tasks.get(task)
        # Rows of similar length need little padding, and the first batch needs the most memory.
        order = longest_first(rows)
        rows = _select(rows, order)
        labels = [] if spec is None else self._labels(spec, rows)
        if isinstance(rows, datasets.Dataset) and {"label", "labels"} <= set(rows.column_names):
            # The stock collator takes a column of this name for the tokens of the target.
            rows = rows.remove_columns("label")
        self._gen_kwargs = {**self._decoding(spec), **gen_kwargs}
        output = self.evaluation_loop(
            self._loader_of_all(rows),
            description=f"Evaluation of {task}",
            prediction_loss_only=True if spec is None and self.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        metrics = dict(output.metrics)
        aside = {f"{metric_key_prefix}_loss", f"{metric_key_prefix}_model_preparation_time"}
        scores = {k.removeprefix(f"{metric_key_prefix}_"): metrics.pop(k) for k in sorted(metrics.keys() - aside)}
        if scores:
            scores["score"] = sum(scores.values()) / len(scores)
        texts = None
        if spec is not None:
            texts = self._decode(output.predictions)
            scores = {**score(spec, [spec.parse(text) for text in texts], labels), **scores}
            texts = [texts[i] for i in np.argsort(order)]
        return TaskOutcome(metrics, scores, texts)

    def _decoding(self, spec: TaskSpec | None) -> dict[str, Any]:
        beams, length = self.args.generation_num_beams, self.args.generation_max_length or self.max_target_length
        found: dict[str, Any] = {} if length is None else {"max_length": length}
        if spec is not None:
            found = spec.generation_kwargs(self.processing_class, length)
            # Seq2SeqTrainer sets a max_length by itself, and transformers warns of both. The start token counts.
            found["max_length"] = found.pop("max_new_tokens") + 1
        return found if beams is None else {**found, "num_beams": beams}

    def _loader_of_all(self, rows: Any) -> Any:
        """The stock loader of rows to evaluate, without leaving out an incomplete last batch."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            return self.get_eval_dataloader(rows)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Seq2SeqTrainer's gather keeps the rows that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        with self._precision_kept():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _precision_kept(self) -> Iterator[None]:
        """Give the weights back as they were: bf16_full_eval and fp16_full_eval round those of the model itself."""
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            yield
            return
        exact = [(p, p.data) for p in self.adapted.parameters()]
        buffers = [(m, name, b) for m in self.adapted.modules() for name, b in m._buffers.items() if b is not None]
        try:
            yield
        finally:
            for parameter, data in exact:
                parameter.data = data
            for module, name, buffer in buffers:
                module._buffers[name] = buffer

    def _labels(self, spec: TaskSpec, rows: Any) -> list[Any]:
        columns = getattr(rows, "column_names", None)
        if columns is None:
            columns = list(rows[0]) if len(rows) else []
        if "label" in columns:
            return [rows[i]["label"] for i in range(len(rows))]
        texts = self._decode([rows[i]["labels"] for i in range(len(rows))])
        found = [spec.parse(text) for text in texts]
        if None in found:
            raise ValueError(
                f"the labels of task {spec.name!r} must be targets of its specification, got "
                f"{texts[found.index(None)]!r}"
            )
        return found

    def _decode(self, tokens: Any) -> list[str]:
        pad = self.processing_class.pad_token_id
        rows = [np.where(np.asarray(row) < 0, pad, row) for row in tokens]
        texts: list[str] = self.processing_class.batch_decode(rows, skip_special_tokens=True)
        return texts


def _lacks_task(rows: Any) -> bool:
    return not {"task", "task_index"} & set(getattr(rows, "column_names", None) or (rows[0] if len(rows) else ()))


def _with_task(rows: Any, task: str) -> Any:
    """Return rows of one task with its name, where they have no task or a number that another dataset may use anew."""
    columns = getattr(rows, "column_names", None)
    if columns is None or "task_index" in columns or ("task" in columns and class_names(rows) is None):
        return rows
    return rows.remove_columns([c for c in columns if c == "task"]).add_column("task", [task] * len(rows))


def longest_first(rows: Any) -> NDArray[np.int64]:
    """Return the order of rows by the length of their ``input_ids``."""
    if isinstance(rows, datasets.Dataset):
        column = rows.with_format("arrow")[:]["input_ids"]
        lengths = pc.list_value_length(column).to_numpy()
    else:
        lengths = np.array([len(rows[i]["input_ids"]) for i in range(len(rows))])
    return np.argsort(-lengths.astype(np.int64), kind="stable")


def _select(rows: Any, chosen: Any) -> Any:
    return rows.select(chosen) if isinstance(rows, datasets.Dataset) else Subset(rows, chosen.tolist())
