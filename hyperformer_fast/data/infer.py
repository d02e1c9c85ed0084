"""Infer the specification of an unknown task from its training rows, if they can be read in one way only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .formats import Rows, number_of
from .registry import find_task
from .task_file import TASK_FILE
from .tasks import NUMBER, DataError, TaskSpec, check_text, shown_value
from .templates import placeholders

#: Names of columns that identify a row: id, idx, pair_id, pairID, guid, ...
_ROW_NAME = re.compile(
    r"(.*[_\-. ])?(?i:id|idx|index|guid|uuid|uid|hash)|.*[a-z](ID|Id|Idx)|__index_level_\d+__|Unnamed: 0"
)

#: If there are more rows than this and every row has a different "label", the column is taken for a row's id.
_MANY_ROWS = 20
_MAX_CLASSES = 100


def spec_of_rows(name: str, train: Rows, where: str | None = None, given: Mapping[str, Any] | None = None) -> TaskSpec:
    """Return the specification of a task, by its name if that is known, else inferred from its training rows."""
    known = find_task(name)
    if known is not None and given is None:
        return known
    given = dict(given or {})
    if _is_complete(given):
        return TaskSpec(name=name, **given)
    rows = [row for _, row in train]
    if not train.typed:
        _recognise_numbers(rows)
    classes = {column: feature.names for column, feature in (train.features or {}).items() if hasattr(feature, "names")}
    label = given["label_columns"][0] if "label_columns" in given else "label"
    if "label" not in rows[0] and len(classes) == 1:
        label = given.setdefault("label_columns", tuple(classes))[0]
    if label in classes and "labels" not in given and "label_names" not in given:
        names = classes[label]
        given |= {"labels": [str(index) for index in range(len(names))], "label_names": names}
    return infer_spec(name, rows, where or train.name, given)


def _is_complete(given: Mapping[str, Any]) -> bool:
    """Return whether the fields say what is read and what is written, so that no row needs to be looked at."""
    is_text = given.get("target") == "text" or "target_template" in given
    return ("columns" in given or "source" in given) and (is_text or "labels" in given or "target" in given)


def _recognise_numbers(rows: list[dict[str, Any]]) -> None:
    """Turn each column that holds nothing but numbers, written as text, into numbers."""
    for column in rows[0]:
        values = [number_of(row[column]) for row in rows]
        if not any(isinstance(value, str) for value in values):
            for row, value in zip(rows, values, strict=True):
                row[column] = value


def infer_spec(
    name: str, rows: Sequence[Mapping[str, Any]], where: str, given: Mapping[str, Any] | None = None
) -> TaskSpec:
    """Infer the specification of a task that is not known by name from its training rows.

    The rows must have one or two text columns and one label. The labels are integers 0 to n-1 (classes), texts
    (classes, in alphabetical order; if all are whole numbers written as text, in numerical order), or numbers from 0 to
    5 that are not all whole (similarity).

    Args:
        name: name of the task.
        rows: the training rows.
        where: the task's folder, for error messages.
        given: fields of the TaskSpec that are known and not inferred; see :func:`read_task_file`.

    Raises:
        DataError: the columns or labels can be read in no way, or in more than one. The message names the possible
            readings and says how to choose one in the task's ``task.json``.
        ValueError: the ``given`` fields contradict each other.
    """
    given = dict(given or {})
    chosen = "label_columns" in given
    label = given["label_columns"][0] if "label_columns" in given else _label_column(name, rows[0], where, given)
    given.setdefault("label_columns", (label,))
    if "columns" not in given and "source" not in given:
        taken = given["label_columns"]
        given["columns"] = {c: (c,) for c in _text_columns(name, rows, where, taken)}
    if "labels" not in given and given.get("target", "class") == "class":
        column = next((column for column in given["label_columns"] if column in rows[0]), label)
        given = {**_classes(name, [row.get(column) for row in rows], where, chosen), **given}
    return TaskSpec(name=name, **given)


def _label_column(name: str, row: Mapping[str, Any], where: str, given: Mapping[str, Any]) -> str:
    if "label" in row:
        return "label"
    if "columns" in given or "source" in given:
        taken = {column for found in given.get("columns", {}).values() for column in found}
        taken |= {name.partition(".")[0] for name in placeholders(given.get("source", ""))}
        candidates = [column for column in row if column not in taken]
    else:
        candidates = [column for column, value in row.items() if not isinstance(value, str)]
    if len(candidates) != 1:
        raise _cannot_tell(name, row, where)
    if _ROW_NAME.fullmatch(candidates[0]):
        raise DataError(
            f"{where}: the label of {name!r} would be its column {candidates[0]!r}, whose name is that of a row's id; "
            + _say(where, "which column is the label", {"label_columns": ["COLUMN"]})
        )
    return candidates[0]


def _text_columns(name: str, rows: Sequence[Mapping[str, Any]], where: str, labels: Sequence[str]) -> list[str]:
    row = rows[0]
    texts = [column for column, value in row.items() if isinstance(value, str) and column not in labels]
    others = [column for column in row if column not in texts and column not in labels]
    for column in texts:
        if _ROW_NAME.fullmatch(column) or len(texts) > 1 and _names_rows([row.get(column) for row in rows]):
            rest = [each for each in texts if each != column]
            raise DataError(
                f"{where}: the column {column!r} of {name!r} seems to identify the row rather than to be a text for "
                "the model; " + _say(where, "which columns are text", {"columns": rest or [column]})
            )
    if others or not 1 <= len(texts) <= 2:
        raise _cannot_tell(name, row, where)
    for column in texts:
        check_text(column, f"{where}: the name {column!r} of a column")
    return texts


def _names_rows(values: list[Any]) -> bool:
    """Return whether the texts look like ids of rows: many of them, each a single word with a digit, all different."""
    word = re.compile(r"(?=\D*\d)\S+")
    return (
        len(values) > _MANY_ROWS
        and len(set(map(str, values))) == len(values)
        and all(isinstance(value, str) and word.fullmatch(value) for value in values)
    )


def _classes(name: str, found: list[Any], where: str, chosen: bool) -> dict[str, Any]:
    """Infer ``labels``, ``label_names`` and ``metrics`` from the labels of the training rows."""
    values = {value for value in found if not isinstance(value, (list, dict))}
    kinds = {type(value) for value in values}
    unique = len(found) > _MANY_ROWS and len(values) == len(found)
    if unique and not chosen and kinds <= {int, str} and not _are_decimals(values):
        raise DataError(
            f"{where}: no two rows of {name!r} have the same label, so it seems to identify the row; "
            + _say(where, "which column is the label", {"label_columns": ["COLUMN"]})
        )
    if kinds == {int} and len(values) > 1 and values == set(range(len(values))):
        return {"labels": [str(index) for index in range(len(values))]}
    if kinds == {str} and 1 < len(values) <= _MAX_CLASSES:
        names = _in_order(name, values, where)
        return {"labels": [str(index) for index in range(len(names))], "label_names": names}
    if kinds and kinds <= {int, float}:
        if float in kinds and not all(isinstance(value, int) or value.is_integer() for value in values):
            if all(0 <= value <= 5 for value in values):
                return {"labels": None, "metrics": ("pearson", "spearman")}
        elif len(values) > 1:
            raise _two_readings(name, where, values)
    raise DataError(
        f"{where}: the labels of {name!r} must be integers 0 to n-1, up to {_MAX_CLASSES} texts, or numbers from 0 to "
        f"5; got {len(values)} different ones, among them {', '.join(sorted(map(shown_value, values))[:3])}; "
        + _say(where, "what they are", {"labels": None, "low": 0, "high": 100})
        + " for numbers of another range"
    )


def _are_decimals(values: set[Any]) -> bool:
    """Whether all are numbers written as text, and some of them have a point."""
    texts = [str(value) for value in values]
    return all(map(NUMBER.fullmatch, texts)) and any("." in text for text in texts)


def _in_order(name: str, values: set[str], where: str) -> list[str]:
    """Sort texts alphabetically, or numerically if all of them are whole numbers."""
    for value in values:
        check_text(value, f"{where}: the label {value!r}")
    if not all(NUMBER.fullmatch(value) for value in values):
        return sorted(values)
    if len(set(map(Fraction, values))) < len(values) or any("." in value for value in values):
        raise _two_readings(name, where, values)
    return sorted(values, key=Fraction)


def _two_readings(name: str, where: str, values: set[Any]) -> DataError:
    numbers = sorted(set(map(Fraction, values)))
    classes: dict[str, Any] = {"label_names": sorted(values, key=Fraction)}
    if all(number.denominator == 1 for number in numbers):
        classes = {"label_names": list(map(int, numbers))}
    if numbers == list(range(len(numbers))) and not any(isinstance(value, str) for value in values):
        classes = {"labels": [str(index) for index in range(len(numbers))]}
    low, high = min(0, math.floor(numbers[0])), max(5, math.ceil(numbers[-1]))
    return DataError(
        f"{where}: the labels of {name!r}, among them {', '.join(sorted(map(shown_value, values))[:3])}, can be read "
        f"as {len(numbers)} classes or as a number; "
        + _say(where, "which", classes)
        + f" for classes, {json.dumps({'labels': None, 'low': low, 'high': high})} for a number"
    )


def _cannot_tell(name: str, row: Mapping[str, Any], where: str) -> DataError:
    return DataError(
        f"{where}: {name!r} is not a task known by name, and its columns {shown_value(list(row))} can't be told "
        "apart: there must be one or two columns of text and one 'label'; "
        + _say(where, "which they are", {"columns": ["TEXT COLUMN"], "label_columns": ["LABEL COLUMN"]})
    )


def _say(where: str, what: str, fields: dict[str, Any]) -> str:
    return f"say {what} in {where}/{TASK_FILE}: {json.dumps(fields)}"
