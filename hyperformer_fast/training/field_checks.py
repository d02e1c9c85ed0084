"""What a field of a run's arguments may hold: its type from the dataclass, its range, and names of tasks."""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from ..fusion.pieces import PIECES
from ..nearest import did_you_mean
from ..recipes import INITIALISATIONS, LEARNING_RATE_RULES, RECIPES

_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}

#: The least value of numbers.
_LEAST: dict[str, float] = {
    **dict.fromkeys(
        (
            "max_source_length", "max_target_length", "val_max_target_length", "test_max_target_length",
            "max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers",
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "save_total_limit", "generation_max_length", "generation_num_beams", "early_stopping_patience",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "warmup_steps", "embedding_warmup_steps", "eval_steps", "save_steps", "seed", "data_seed", "weight_decay",
            "max_grad_norm", "label_smoothing_factor", "early_stopping_threshold", "dataloader_num_workers",
            "diagnostics_steps",
        ),
        0,
    ),
}  # fmt: skip
_ABOVE_ZERO = ("learning_rate", "temperature", "num_train_epochs", "logging_steps", "max_task_grad_norm")
#: Values of ``fuse`` beside the names of pieces.
_ALONE = ("auto", "none", "all")
_CHOICES = {
    "text_style": ("default", "official"),
    "loss_reduction": ("mean", "sum"),
    "learning_rate_rule": LEARNING_RATE_RULES,
    "recipe": tuple(RECIPES),
    "init_weights": INITIALISATIONS,
    "gradient_surgery": ("none", "pcgrad"),
}


class RunConfigError(ValueError):
    """A run's arguments are invalid; the message names the argument."""


def check_field(name: str, value: Any, hint: Any) -> None:
    """Raise RunConfigError unless ``value`` has the type ``hint`` and lies in the range of the field ``name``."""
    kinds = _kinds(hint)
    if not any(_fits(value, kind) for kind in kinds):
        raise RunConfigError(f"{name} must be {_expected(kinds)}, got {value!r}")
    if value is None:
        return
    if name in _CHOICES and value not in _CHOICES[name]:
        raise RunConfigError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    if name in _LEAST and value < _LEAST[name]:
        raise RunConfigError(f"{name} must be at least {_LEAST[name]}, got {value}")
    if name in _ABOVE_ZERO and value <= 0:
        raise RunConfigError(f"{name} must be above 0, got {value}")
    if name == "label_smoothing_factor" and value >= 1:
        raise RunConfigError(f"{name} must be below 1, got {value}")
    if name == "max_steps" and value != -1 and value < 1:
        raise RunConfigError(f"max_steps must be at least 1, or -1 to train num_train_epochs, got {value}")
    if name in ("tasks", "eval_tasks"):
        check_task_names(name, value)
    if name == "fuse":
        _check_pieces(value)


def _kinds(hint: Any) -> list[Any]:
    union = get_origin(hint) in (Union, types.UnionType)
    kinds = list(get_args(hint)) if union else [hint]
    # transformers spells a choice as "an Enum or text", and accepts only the texts that the Enum knows.
    named = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds)
    return [kind for kind in kinds if not (named and kind is str)]


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return value in get_args(kind)
    if origin is list:
        inner = get_args(kind)
        return isinstance(value, (list, tuple)) and all(not inner or _fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, kind) or value in [member.value for member in kind]
    return isinstance(origin, type) and isinstance(value, origin)


def _expected(kinds: list[Any]) -> str:
    words = []
    for kind in kinds:
        if kind is None or kind is type(None):
            continue
        if isinstance(kind, type) and issubclass(kind, Enum):
            words.append("one of " + ", ".join(str(member.value) for member in kind))
        elif (get_origin(kind) or kind) is list:
            words.append("a list of names" if get_args(kind) == (str,) else "a list")
        else:
            words.append(_WORDS.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(words) + (" or null" if len(words) < len(kinds) else "")


def _check_pieces(names: Collection[str]) -> None:
    if not names:
        raise RunConfigError('fuse must name at least one piece, got an empty list; "none" fuses nothing')
    for name in names:
        if name in _ALONE and len(names) > 1:
            raise RunConfigError(f"fuse: {name!r} stands alone, got {', '.join(names)}")
        if name not in (*_ALONE, *PIECES):
            known = [*_ALONE, *PIECES]
            raise RunConfigError(f"fuse must be among {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")


def check_task_names(field: str, names: Collection[str]) -> None:
    if not names:
        raise RunConfigError(f"{field} must name at least one task, got an empty list; leave it out for all tasks")
    for name in names:
        # A task's name becomes a folder and a part of the names of metrics.
        if not name.strip() or name != name.strip() or name in (".", "..") or name.startswith("-"):
            raise RunConfigError(f"{field}: {name!r} cannot be the name of a task")
        wrong = sorted({c for c in name if c in '/\\,:*?"<>|' or not c.isprintable()})
        if wrong:
            raise RunConfigError(f"{field}: the name {name!r} has {' '.join(map(repr, wrong))}, which no task may have")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise RunConfigError(f"{field} must be unique, got {', '.join(repeated)} more than once")
