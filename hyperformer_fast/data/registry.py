"""Every task known by name: the built-in ones, the authors' 31, and those that a program registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .builtin import BUILTIN_SPECS
from .official_tasks import DEFAULT_TASKS, GLUE, OFFICIAL_TASKS, PREFIXES
from .task_fields import spec_of
from .task_file import read_entries
from .tasks import TaskSpec

TEXT_STYLES = ("default", "official")

#: The tasks known by name that have no rows of their own, in the style "default".
KNOWN: dict[str, TaskSpec] = DEFAULT_TASKS

_BUILTIN = {name: TaskSpec(name=name, **fields) for name, fields in BUILTIN_SPECS.items()}
_REGISTERED: dict[str, TaskSpec] = {}

__all__ = [
    "GLUE",
    "KNOWN",
    "TEXT_STYLES",
    "builtin_spec",
    "find_task",
    "read_task_entries",
    "register_task",
    "registered_tasks",
    "with_prefix",
]


def builtin_spec(name: str) -> TaskSpec:
    """Return the TaskSpec of a built-in task. Raises KeyError for another name."""
    return _BUILTIN[name]


def register_task(
    task: TaskSpec | Mapping[str, Any] | None = None, /, *, replace: bool = False, **fields: Any
) -> TaskSpec:
    """Make a task known by its name, as ``--tasks`` takes it, in this process.

    ::

        register_task(
            name="headline",
            source="summarize: {article}",
            target="text",
            label_columns="headline",
            metrics=["rouge1", "rougeL"],
            train_file="train.csv",
            validation_file="validation.csv",
        )

    Args:
        task: a TaskSpec, or its fields.
        replace: let the task take the place of a built-in or official one of its name. A task that was itself
            registered is always replaced.
        fields: fields of the TaskSpec, where ``task`` is not given.

    Returns:
        The registered TaskSpec.

    Raises:
        DataError: a field is unknown or cannot be used; the message names the field, its value and what is expected.
        ValueError: a built-in or official task has this name.
    """
    if isinstance(task, TaskSpec):
        spec = dataclasses.replace(task, **fields)
    else:
        given = {**(task or {}), **fields}
        name = given.pop("name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"register_task needs the task's name, a text, got name={name!r}")
        spec = spec_of(name, given, "register_task")
    if not replace and (spec.name in _BUILTIN or spec.name in OFFICIAL_TASKS):
        raise ValueError(f"register_task: {spec.name!r} is known already; choose another name, or give replace=True")
    _REGISTERED[spec.name] = spec
    return spec


def registered_tasks() -> dict[str, TaskSpec]:
    """Return the tasks that were registered in this process, by name."""
    return dict(_REGISTERED)


def find_task(name: str, text_style: str = "default") -> TaskSpec | None:
    """Return the task known by a name, or None.

    Args:
        name: name of the task.
        text_style: "official" for texts and targets that equal the authors' character by character, which their
            checkpoints need. "default" leaves out the authors' three slips; see
            :mod:`hyperformer_fast.data.official_tasks`. It is the default, because earlier versions of this library
            wrote these texts, and because new adapters gain nothing from the slips.

    Raises:
        ValueError: the text style is unknown.
    """
    if text_style not in TEXT_STYLES:
        raise ValueError(f"text_style must be one of {', '.join(TEXT_STYLES)}, got {text_style!r}")
    official = OFFICIAL_TASKS if text_style == "official" else DEFAULT_TASKS
    return _REGISTERED.get(name) or official.get(name) or _BUILTIN.get(name)


def with_prefix(spec: TaskSpec) -> TaskSpec:
    """Return the task with a prefix that tells a model without adapters which task a source is of.

    That is the task's own prefix, else the authors': "Translate English to Czech" and the like for their translations,
    the task's name for all others. The authors use it for full fine-tuning and never with adapters.
    """
    return dataclasses.replace(spec, prefix=spec.prefix or PREFIXES.get(spec.name, spec.name))


def read_task_entries(path: str | Path, text_style: str = "default") -> list[TaskSpec]:
    """Read the tasks of a YAML or JSON file; see :func:`hyperformer_fast.data.task_file.read_entries`.

    An entry with the name of a known task starts from that task, in the given text style.
    """
    return read_entries(path, lambda name: find_task(name, text_style))
