"""Translate the arguments of the first release, and those of the authors' code, into today's."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from .. import official_fields
from ..config import HyperFormerConfig
from ..recipes import BEFORE_RECIPES
from .field_checks import RunConfigError
from .presets import FIRST_RELEASE, FIRST_RELEASE_EMBEDDED

#: Names of the first release that only changed.
RENAMED = {
    "model": "model_name_or_path",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "label_smoothing": "label_smoothing_factor",
    "max_train_rows": "max_train_samples",
    "max_eval_rows": "max_predict_samples",
    "eval_rows": "max_eval_samples",
    "eval_batch_size": "per_device_eval_batch_size",
    "keep_best": "load_best_model_at_end",
    "schedule": "lr_scheduler_type",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir",
}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

#: Names that only the first release had. The authors have ``label_smoothing`` too.
_FIRST_RELEASE_ONLY = (RENAMED.keys() - {"label_smoothing", "resume", "overwrite"}) | {"hyperformer"}


#: Every older name, of ours and of the authors', that has another one today.
OLDER_NAMES = sorted({*RENAMED, "hyperformer", *official_fields.RENAMED})


def today(
    fields: Mapping[str, Any], *, whole: bool = False, quiet: bool = False, stacklevel: int = 3
) -> dict[str, Any]:
    """Return ``fields`` under today's names, with a warning that names each that was translated.

    Args:
        fields: flat fields under any mixture of names.
        whole: the fields are a whole configuration and not only flags, so that absent ones have the defaults of the
            code that the configuration was written for.
        quiet: do not warn.
        stacklevel: how many calls above this one the warning points to.

    Raises:
        RunConfigError: a field has a value that cannot be translated.
    """
    for name in fields:
        if not isinstance(name, str):
            raise RunConfigError(f"the name of a field must be text, got {name!r}")
    new = dict(fields)
    if official_fields.is_run(fields):
        try:
            new, notes = official_fields.translate_run(fields, {f.name for f in dataclasses.fields(HyperFormerConfig)})
        except ValueError as error:
            raise RunConfigError(str(error)) from error
        if not quiet:
            warnings.warn(f"this is a configuration of the authors' code: {'; '.join(notes)}", stacklevel=stacklevel)
    new, renamed = _from_first_release(new, whole)
    if renamed and not quiet:
        said = "; ".join(f"{old} is now {now}" for old, now in renamed.items())
        warnings.warn(f"arguments have new names: {said}", DeprecationWarning, stacklevel=stacklevel)
    return new


def _from_first_release(fields: Mapping[str, Any], whole: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (fields under today's names, old name -> today's for each that was translated)."""
    new, renamed = dict(fields), {}
    first_release = bool(_FIRST_RELEASE_ONLY & fields.keys())
    adapters = new.pop("hyperformer", None)
    if "schedule" in new and new["schedule"] not in _SCHEDULES:
        raise RunConfigError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {new['schedule']!r}")
    for old, now in RENAMED.items():
        if old in new:
            value = new.pop(old)
            renamed[old] = now
            if now in new:
                raise RunConfigError(f"{old} is the old name of {now}: give only one of them")
            new[now] = _SCHEDULES[value] if old == "schedule" else value
    if first_release and _is_count(fields.get("max_eval_rows")):
        # The first release never looked at more rows than these, in any evaluation.
        new["max_eval_samples"] = min(new.get("max_eval_samples") or fields["max_eval_rows"], fields["max_eval_rows"])
    if "hyperformer" in fields:
        new |= _adapters(adapters, new)
        renamed["hyperformer"] = f"its fields themselves ({', '.join(adapters or {}) or 'none'})"
    for name, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy")):
        if strategy not in new and new.get(name) == 0 and not isinstance(new[name], bool):
            # "steps" with 0 steps would fall back to another interval, or be refused.
            del new[name]
            new[strategy] = "no"
            renamed[f"{name} 0"] = f'{strategy} "no"'
    if first_release and whole:
        new = _completed(new, with_adapters="hyperformer" not in fields)
    return new, renamed


def _adapters(adapters: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(adapters, Mapping):
        raise RunConfigError(f"hyperformer must be an object of HyperFormerConfig's fields, got {adapters!r}")
    if "tasks" in adapters:
        raise RunConfigError("hyperformer must not have the field 'tasks': set the run's own field 'tasks' instead")
    twice = sorted(name for name in adapters if name in new and new[name] != adapters[name])
    if twice:
        raise RunConfigError(f"{twice[0]} stands in hyperformer and beside it, with different values: give only one")
    return dict(adapters)


def _completed(new: dict[str, Any], with_adapters: bool) -> dict[str, Any]:
    """Add the defaults of the first release, and let its best weights be saved without checkpoints of their own."""
    embedded = new.get("model_name_or_path") is None
    defaults = dict(FIRST_RELEASE_EMBEDDED if embedded else FIRST_RELEASE)
    if not with_adapters:
        adapters = {field.name for field in dataclasses.fields(HyperFormerConfig)}
        defaults = {name: value for name, value in defaults.items() if name not in adapters}
    for off, steps in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if new.get(off) == "no":
            defaults.pop(steps, None)
    new = {"recipe": BEFORE_RECIPES, **defaults, **new}
    if new.get("load_best_model_at_end"):
        if new["eval_strategy"] == "no":
            raise RunConfigError("keep_best needs evaluations while training: set eval_steps above 0")
        if new.get("save_strategy") == "no":
            new["save_strategy"] = "best"
        elif _is_count(new["save_steps"]) and _is_count(new["eval_steps"]) and new["save_steps"] % new["eval_steps"]:
            # The Trainer selects among checkpoints, so each must have been evaluated.
            new["save_steps"] += -new["save_steps"] % new["eval_steps"]
    return new


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
