"""Everything that a run depends on, as one JSON object."""

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

#: Adapters for the embedded model, whose width is 128.
TINY_ADAPTERS = {
    "reduction_factor": 4,
    "task_embedding_dim": 16,
    "projected_task_embedding_dim": 16,
    "task_hidden_dim": 32,
}

#: What takes the place of the class's defaults, which suit the embedded model, where another T5 is named.
OTHER_MODEL = {"hyperformer": {}, "steps": 2000, "warmup_steps": 100, "eval_batch_size": 64}

#: Fields that a resumed run may change: none of them changes what is trained.
MAY_CHANGE = frozenset(
    "output_dir logging_steps eval_steps eval_rows eval_batch_size max_eval_rows save_steps save_total_limit".split()
)


class RunConfigError(ValueError):
    """A run's configuration that cannot be; the message names the field."""


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """A training run. The defaults are those of the embedded model on the built-in tasks.

    Args:
        model: folder or name of a T5; None for the embedded tiny one.
        data_dir: folder of ``<task>/{train,validation,test}.jsonl``, ``hub:glue``, or None for the built-in tasks.
        tasks: names; None for all there are.
        output_dir: folder of the run.
        hyperformer: fields of :class:`HyperFormerConfig`, but its tasks.
        steps: optimizer steps.
        batch_size, gradient_accumulation: examples of a micro-batch on one process, micro-batches of a step.
        learning_rate, warmup_steps, schedule, weight_decay: of AdamW; ``schedule`` is linear, cosine or constant.
        max_grad_norm: gradients are clipped to this norm; 0 for not.
        label_smoothing: of the cross-entropy.
        temperature: of the sampling of tasks, p ~ n^(1/temperature).
        max_source_length: tokens; longer sources are cut.
        max_train_rows, max_eval_rows: rows of each task at the most; None for all.
        eval_batch_size: of every evaluation.
        eval_steps, eval_rows: evaluate on ``eval_rows`` rows of each task's validation split every ``eval_steps``
            optimizer steps; 0 for not.
        keep_best: the run's weights are those of the evaluation with the best average, not the last.
        logging_steps: between two points of the loss curve.
        save_steps, save_total_limit: between two checkpoints (0 for none), and how many are kept.
        seed: of the new parameters, the sampling and dropout.
        gradient_checkpointing, bf16: memory and precision.

    Raises:
        RunConfigError: naming the field, its value and what is allowed.
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

    def _check_type(self, field: dataclasses.Field) -> None:
        value, optional = getattr(self, field.name), field.type.endswith("| None")
        kind = field.type.removesuffix(" | None")
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
        """The configuration of the adapters for these tasks."""
        if "tasks" in self.hyperformer:
            raise RunConfigError("hyperformer must not hold 'tasks': a run's tasks are its own field")
        try:
            return HyperFormerConfig.from_dict({**self.hyperformer, "tasks": tasks})
        except (ValueError, TypeError) as error:
            raise RunConfigError(f"hyperformer: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON types."""
        return dataclasses.asdict(self)

    def located(self) -> RunConfig:
        """A copy whose folders are absolute, so that it means the same from anywhere."""
        model, data_dir = self.model, self.data_dir
        if model is not None and os.path.isdir(model):
            model = os.path.abspath(model)
        if data_dir is not None and not data_dir.startswith("hub:"):
            data_dir = os.path.abspath(data_dir)
        return dataclasses.replace(self, model=model, data_dir=data_dir, output_dir=os.path.abspath(self.output_dir))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunConfig:
        """From the fields that are given; the others' defaults depend on whether a ``model`` is.

        Raises:
            RunConfigError: names unknown fields.
        """
        if not isinstance(fields, Mapping):
            raise RunConfigError(f"a run's configuration must be a JSON object, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise RunConfigError(f"unknown fields {unknown}; known are {sorted(known)}")
        return cls(**({} if fields.get("model") is None else OTHER_MODEL) | dict(fields))

    @classmethod
    def load(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """From a JSON file, with ``changes`` over it; in both, ``hyperformer`` may hold some of its fields.

        Raises:
            RunConfigError: names the file.
        """
        fields = read_fields(path)
        try:
            return cls.from_dict(merge(fields, changes or {}))
        except RunConfigError as error:
            raise RunConfigError(f"{path}: {error}") from error


def read_fields(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. RunConfigError names the file where there is none."""
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
    """``changes`` over ``fields``; ``hyperformer`` field by field."""
    merged = {**fields, **changes}
    if isinstance(changes.get("hyperformer"), Mapping):
        before = fields.get("hyperformer")
        if before is None and merged.get("model") is None:
            before = RunConfig().hyperformer
        if isinstance(before, Mapping):
            merged["hyperformer"] = {**before, **changes["hyperformer"]}
    return merged
