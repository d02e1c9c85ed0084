"""RunConfig: everything that a training run depends on, as one JSON object."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import HyperFormerConfig
from ..json_files import parse

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

#: Fields of HyperFormerConfig that suit the embedded T5, whose width is 128.
TINY_ADAPTERS: dict[str, Any] = {
    "reduction_factor": 4,
    "task_embedding_dim": 16,
    "projected_task_embedding_dim": 16,
    "task_hidden_dim": 32,
}

#: Defaults for a T5 that is named, in place of the class's defaults, which suit the embedded T5.
OTHER_MODEL: dict[str, Any] = {"hyperformer": {}, "steps": 2000, "warmup_steps": 100, "eval_batch_size": 64}

#: Fields that may differ when a run is resumed, because they do not change what is trained.
MAY_CHANGE = frozenset(
    "output_dir logging_steps eval_steps eval_rows eval_batch_size max_eval_rows save_steps save_total_limit".split()
)


class RunConfigError(ValueError):
    """A run's configuration is invalid; the message names the field."""


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """Configuration of a training run. The defaults suit the embedded T5 on the built-in tasks.

    Args:
        model: folder or Hub name of a T5; None for the embedded tiny T5.
        data_dir: folder of ``<task>/{train,validation,test}.jsonl``, ``hub:glue``, or None for the built-in tasks.
        tasks: names of the tasks; None for all tasks in the data.
        output_dir: the run folder.
        hyperformer: fields of :class:`HyperFormerConfig`, except ``tasks``.
        steps: number of optimizer steps.
        batch_size, gradient_accumulation: examples per micro-batch and process, and micro-batches per optimizer step.
        learning_rate, warmup_steps, schedule, weight_decay: settings of AdamW and of its learning rate schedule
            (linear, cosine or constant).
        max_grad_norm: norm that gradients are clipped to; 0 for no clipping.
        label_smoothing: label smoothing of the cross-entropy.
        temperature: a task of n rows is sampled with probability proportional to n^(1/temperature).
        max_source_length: longest source, in tokens; longer ones are truncated.
        max_train_rows, max_eval_rows: largest number of rows of each task that is used; None for all rows.
        eval_batch_size: batch size of every evaluation.
        eval_steps, eval_rows: evaluate on ``eval_rows`` rows of each task's validation split every ``eval_steps``
            optimizer steps; with ``eval_steps`` 0 never.
        keep_best: keep the weights of the evaluation with the best average instead of the last ones.
        logging_steps: log the training loss every ``logging_steps`` optimizer steps.
        save_steps, save_total_limit: save a checkpoint every ``save_steps`` optimizer steps (0: never), and keep only
            the newest ``save_total_limit``.
        seed: random seed of the new parameters, the task sampling and dropout.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory and takes more time.
        bf16: train under autocast in bfloat16.

    Raises:
        RunConfigError: a field is invalid; the message names it, its value and what is allowed.
    """

    model: str | None = None
    data_dir: str | None = None
    tasks: list[str] | None = None
    output_dir: str = "hyperformer-output"
    hyperformer: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(TINY_ADAPTERS))
    steps: int = 1200
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    temperature: float = 10.0
    max_source_length: int = 128
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    eval_batch_size: int = 128
    eval_steps: int = 300
    eval_rows: int = 100
    keep_best: bool = False
    logging_steps: int = 10
    save_steps: int = 300
    save_total_limit: int = 2
    seed: int = 42
    gradient_checkpointing: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field)
        self._check_ranges()
        if self.tasks is not None:
            self.tasks = list(self.tasks)
        self.hyperformer = dict(self.hyperformer)
        self.hyperformer_config(self.tasks or ["task"])

    def _check_type(self, field: dataclasses.Field[Any]) -> None:
        spelt = str(field.type)  # a string, because annotations are not evaluated here
        value, optional = getattr(self, field.name), spelt.endswith("| None")
        kind = spelt.removesuffix(" | None")
        if value is None and optional:
            return
        right = {
            "str": isinstance(value, str) and bool(value),
            "bool": isinstance(value, bool),
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
            "list[str]": isinstance(value, (list, tuple))
            and bool(value)
            and all(isinstance(v, str) and v for v in value),
            "dict[str, Any]": isinstance(value, Mapping),
        }[kind]
        if not right:
            names = {"str": "text", "bool": "true or false", "int": "a whole number", "float": "a number"}
            names |= {"list[str]": "a list of names", "dict[str, Any]": "an object of HyperFormerConfig's fields"}
            raise RunConfigError(f"{field.name} must be {names[kind]}{' or null' if optional else ''}, got {value!r}")

    def _check_ranges(self) -> None:
        counted = "steps batch_size gradient_accumulation max_source_length eval_batch_size eval_rows logging_steps"
        counted += " save_total_limit max_train_rows max_eval_rows"
        least: dict[str, float] = dict.fromkeys(counted.split(), 1)
        least |= dict.fromkeys(
            ("warmup_steps", "eval_steps", "save_steps", "seed", "weight_decay", "max_grad_norm", "label_smoothing"), 0
        )
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise RunConfigError(f"{name} must be at least {bound}, got {value}")
        for name in ("learning_rate", "temperature"):
            if getattr(self, name) <= 0:
                raise RunConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.label_smoothing >= 1:
            raise RunConfigError(f"label_smoothing must be below 1, got {self.label_smoothing}")
        if self.schedule not in SCHEDULES:
            raise RunConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.tasks is not None and len(set(self.tasks)) < len(self.tasks):
            raise RunConfigError(f"tasks must be unique, got {self.tasks}")
        if self.keep_best and not self.eval_steps:
            raise RunConfigError("keep_best needs evaluations while training: set eval_steps above 0")

    def hyperformer_config(self, tasks: list[str]) -> HyperFormerConfig:
        """Return the HyperFormerConfig for these tasks."""
        if "tasks" in self.hyperformer:
            raise RunConfigError("hyperformer must not have the field 'tasks': set the run's own field 'tasks' instead")
        try:
            return HyperFormerConfig.from_dict({**self.hyperformer, "tasks": tasks})
        except (ValueError, TypeError) as error:
            raise RunConfigError(f"hyperformer: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        return dataclasses.asdict(self)

    def located(self) -> RunConfig:
        """Return a copy with absolute paths, which does not depend on the working directory."""
        model, data_dir = self.model, self.data_dir
        if model is not None and os.path.isdir(model):
            model = os.path.abspath(model)
        if data_dir is not None and not data_dir.startswith("hub:"):
            data_dir = os.path.abspath(data_dir)
        return dataclasses.replace(self, model=model, data_dir=data_dir, output_dir=os.path.abspath(self.output_dir))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunConfig:
        """Build a RunConfig from ``fields``. The defaults of the others depend on whether a ``model`` is given.

        Raises:
            RunConfigError: a field is unknown or invalid.
        """
        if not isinstance(fields, Mapping):
            raise RunConfigError(f"a run's configuration must be a JSON object, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise RunConfigError(f"unknown fields {unknown}; known are {sorted(known)}")
        defaults: dict[str, Any] = {} if fields.get("model") is None else OTHER_MODEL
        return cls(**{**defaults, **fields})

    @classmethod
    def load(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a RunConfig from a JSON file, overridden by ``changes``. ``hyperformer`` is merged field by field.

        Raises:
            RunConfigError: the file cannot be read or a field is invalid; the message names the file.
        """
        fields = read_fields(path)
        try:
            return cls.from_dict(merge(fields, changes or {}))
        except RunConfigError as error:
            raise RunConfigError(f"{path}: {error}") from error


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises RunConfigError, which names the file, if there is none."""
    try:
        fields = parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RunConfigError(f"{path}: a run's configuration must be a JSON object, got {type(fields).__name__}")
    return fields


def merge(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` overridden by ``changes``, with ``hyperformer`` merged field by field."""
    merged = {**fields, **changes}
    if isinstance(changes.get("hyperformer"), Mapping):
        before = fields.get("hyperformer")
        if before is None and merged.get("model") is None:
            before = RunConfig().hyperformer
        if isinstance(before, Mapping):
            merged["hyperformer"] = {**before, **changes["hyperformer"]}
    return merged
