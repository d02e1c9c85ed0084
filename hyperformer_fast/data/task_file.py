"""Read ``task.json``, which gives the fields of a task's TaskSpec that its rows alone do not determine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..json_files import read_object
from .tasks import DataError, check_text, shown_value

TASK_FILE = "task.json"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_columns(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_texts(value)
    return bool(value) and all(_is_text(found) or _is_texts(found) for found in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    each = lambda name: _is_text(name) or isinstance(name, int) and not isinstance(name, bool)  # noqa: E731
    return isinstance(value, list) and all(map(each, value))


#: For each field, a test of its value, and what an error message says that it must be.
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "columns": (_is_columns, 'a list of text columns, or an object {"shown": "column in the file"}'),
    "labels": (lambda value: value is None or _is_texts(value), "a list of texts, or null where the label is a number"),
    "label_columns": (_is_texts, "a list of columns"),
    "label_names": (_is_names, "a list of texts or whole numbers"),
    "metrics": (_is_texts, "a list of metrics"),
    "low": (_is_number, "a number"),
    "high": (_is_number, "a number"),
    "step": (_is_number, "a number"),
}


def read_task_file(folder: Path) -> dict[str, Any]:
    """Read the fields in the task's ``task.json``, and add those that follow from them. Without a file there are none.

    Raises:
        DataError: the file cannot be used; the message names it and the field.
    """
    path = folder / TASK_FILE
    try:
        content = read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(str(error)) from error
    if content.pop("name", folder.name) != folder.name:
        raise DataError(f"{path}: the task is named after its folder, {folder.name!r}: remove the field 'name'")
    for field, value in content.items():
        if field not in ALLOWED:
            raise DataError(f"{path}: unknown field {field!r}; known are {', '.join(ALLOWED)}")
        fits, words = ALLOWED[field]
        if not fits(value):
            raise DataError(f"{path}: {field} must be {words}, got {shown_value(value)}")
        check_text(json.dumps(value, ensure_ascii=False), f"{path}: {field}")
    return _completed(content)


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    if "columns" in given:
        columns = given["columns"]
        columns = {name: name for name in columns} if isinstance(columns, list) else columns
        given["columns"] = {shown: (found,) if isinstance(found, str) else found for shown, found in columns.items()}
    if given.get("label_names") and "labels" not in given:
        given["labels"] = [str(index) for index in range(len(given["label_names"]))]
    if "labels" in given:
        metrics = ("pearson", "spearman") if given["labels"] is None else ("accuracy",)
        given = {"label_names": (), "metrics": metrics, **given}
    return given
