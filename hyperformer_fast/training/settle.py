"""Make explicit what a run's arguments imply, and refuse those that contradict each other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..nearest import did_you_mean
from .field_checks import RunConfigError

#: How the embedded T5 is named where a name is needed.
EMBEDDED = "embedded"
_STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")

#: The authors' two flags, which say a variant.
VARIANT_FLAGS = ("unique_hyper_net", "efficient_unique_hyper_net")


def settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given fields in one form, with what they imply.

    Raises:
        RunConfigError: a field that holds JSON as text is not JSON.
    """
    fields = dict(given)
    if fields.get("model_name_or_path") == EMBEDDED:
        fields["model_name_or_path"] = None
    if fields.get("preset") == "none":
        fields["preset"] = None
    if isinstance(fields.get("fuse"), bool):
        fields["fuse"] = "auto" if fields["fuse"] else "none"  # YAML reads a plain no as false
    if isinstance(fields.get("fuse"), str):
        fields["fuse"] = [name.strip() for name in fields["fuse"].split(",")]
    if fields.get("fuse") == ["auto"]:
        fields["fuse"] = None
    for name in _STRATEGIES:
        if fields.get(name) is False:
            fields[name] = "no"  # YAML reads a plain no as false
    if "resume_from_checkpoint" in fields:
        fields["resume_from_checkpoint"] = _resume(fields["resume_from_checkpoint"])
    if isinstance(fields.get("task_to_embeddings"), str):
        fields["task_to_embeddings"] = _object("task_to_embeddings", fields["task_to_embeddings"])
    if fields.get("eval_steps") and "eval_strategy" not in fields:
        # The Trainer would not evaluate at all, and say nothing.
        fields["eval_strategy"] = "steps"
    return fields


def overridden(fields: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` overridden ``by`` others, without those that only make sense beside a value that is gone."""
    kept = dict(fields)
    if "variant" in by:
        kept = {name: value for name, value in kept.items() if name not in VARIANT_FLAGS}
    elif any(name in by for name in VARIANT_FLAGS):
        kept.pop("variant", None)
    if "num_train_epochs" in by and "max_steps" not in by:
        kept.pop("max_steps", None)
    if by.get("warmup_ratio") and "warmup_steps" not in by:
        kept.pop("warmup_steps", None)  # it would win over the ratio
    if "tasks" in by and "eval_tasks" not in by and kept.get("eval_tasks") == kept.get("tasks"):
        kept.pop("eval_tasks", None)
    for name, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if by.get(name) and strategy not in by and kept.get(strategy) in ("no", False):
            del kept[strategy]
    if by.get("resume_from_checkpoint"):
        kept.pop("overwrite_output_dir", None)
    if by.get("overwrite_output_dir"):
        kept.pop("resume_from_checkpoint", None)
    return {**kept, **by}


def check_start(fields: Mapping[str, Any]) -> None:
    """Refuse a run that is to be both continued and replaced."""
    if fields.get("resume_from_checkpoint") and fields.get("overwrite_output_dir"):
        raise RunConfigError("resume_from_checkpoint and overwrite_output_dir exclude each other")


def check_together(fields: Mapping[str, Any]) -> None:
    """Refuse fields that contradict each other, and paths of inputs that do not exist.

    Raises:
        RunConfigError: the message names the fields.
    """
    check_start(fields)
    if fields.get("do_train") is False:
        raise RunConfigError("do_train is false, but `hyperformer-fast train` trains: use `hyperformer-fast evaluate`")
    evaluates = fields.get("eval_strategy", "no") != "no"
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if fields.get(name) and not evaluates:
            raise RunConfigError(f'{name} needs evaluations while training: set eval_strategy to "steps" or "epoch"')
    if fields.get("save_strategy") == "best" and not evaluates:
        raise RunConfigError('save_strategy "best" needs evaluations while training: set eval_strategy to "steps"')
    surgery = fields.get("gradient_surgery", "none")
    if surgery != "none" and not fields.get("mixed_batches"):
        raise RunConfigError(
            f"gradient_surgery {surgery!r} compares the gradients of the tasks in a batch: set mixed_batches"
        )
    if fields.get("ignore_pad_token_for_loss") is False:
        raise RunConfigError("ignore_pad_token_for_loss must be true: padding of the targets never counts in the loss")
    if fields.get("single_task") and fields.get("eval_tasks") is not None:
        if set(fields["eval_tasks"]) != set(fields.get("tasks") or ()):
            raise RunConfigError("single_task evaluates each task that it trains: leave eval_tasks out")
    data_dir = fields.get("data_dir")
    if data_dir is not None and not data_dir.startswith("hub:") and not os.path.isdir(data_dir):
        raise RunConfigError(f"data_dir {data_dir!r} is not a directory")
    task_file = fields.get("task_file")
    if task_file is not None and not os.path.isfile(task_file):
        raise RunConfigError(f"task_file {task_file!r} is not a file")
    base, output_dir = fields.get("model_name_or_path"), fields.get("output_dir")
    if base and output_dir and os.path.isdir(base) and os.path.realpath(base) == os.path.realpath(output_dir):
        raise RunConfigError(
            f"output_dir {output_dir!r} is the folder of the T5 (model_name_or_path), whose files the run would replace"
        )
    _check_init_from(fields)


def check_metric(name: str | None, metrics: Mapping[str, Sequence[str]]) -> None:
    """Refuse a ``metric_for_best_model`` that no evaluation reports, which the Trainer would see only after the first.

    Args:
        name: the metric, with or without its prefix "eval_".
        metrics: the metrics of each task that is evaluated.

    Raises:
        RunConfigError: the message names the nearest metric.
    """
    if name is None or not metrics:
        return
    known = ["average_metrics", "average_tasks"]
    known += [f"{task}_{each}" for task, of_task in metrics.items() for each in (*of_task, "score", "loss")]
    if name.removeprefix("eval_") not in known:
        raise RunConfigError(
            f"metric_for_best_model must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
        )


def _check_init_from(fields: Mapping[str, Any]) -> None:
    init_from, output_dir = fields.get("init_from"), fields.get("output_dir")
    if init_from is None:
        return
    if output_dir and fields.get("overwrite_output_dir") and os.path.exists(init_from):
        source, target = os.path.realpath(init_from), os.path.realpath(output_dir)
        if os.path.commonpath([source, target]) == target:
            raise RunConfigError(
                f"init_from {init_from!r} lies in output_dir {output_dir!r}, which overwrite_output_dir would clear"
            )


def _resume(value: Any) -> Any:
    """Return True for the newest checkpoint, None for no resuming, or the path of a checkpoint."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    return value or None


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunConfigError(f"{name} must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise RunConfigError(f"{name} must be a JSON object, got {text!r}")
    return value
