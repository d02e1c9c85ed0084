"""Fields of a task as a person writes them in a file or in a call: checked one by one, then made a TaskSpec."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..nearest import did_you_mean
from .errors import DataError, check_text, shown_value
from .tasks import FILES, SPLITS, TARGETS, TaskSpec


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_text, value))


def _is_columns(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_texts(value)
    return bool(value) and all(_is_text(shown) and (_is_text(v) or _is_texts(v)) for shown, v in value.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return _is_text(value) or _is_whole(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_name, value))


def _is_labels(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(_is_name(name) and _is_text(text) for name, text in value.items())
    return value is None or _is_texts(value)


def _is_splits(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_text(found) for found in value.values())


def _is_generation(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value))


#: For each field, a test of its value, and what an error message says that it must be.
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "source": (lambda value: value is None or _is_text(value), 'a template such as "question: {question}"'),
    "columns": (_is_columns, 'a list of text columns, or an object {"shown": "column in the file"}'),
    "prefix": (lambda value: value is None or _is_text(value), "a text"),
    "target": (_is_text, f"one of {', '.join(TARGETS)}"),
    "labels": (
        _is_labels,
        'a list of texts, or null where the label is a number, or a map {"name in the rows": "target text"}',
    ),
    "label_columns": (lambda value: _is_text(value) or _is_texts(value), "a column or a list of columns"),
    "label_names": (_is_names, "a list of texts or whole numbers"),
    "target_template": (_is_text, 'a template such as "{answer}"'),
    "unlabelled": (_is_names, "a list of texts or whole numbers"),
    "low": (_is_number, "a number"),
    "high": (_is_number, "a number"),
    "step": (_is_number, "a number"),
    "metrics": (lambda value: _is_text(value) or _is_texts(value), "a list of metrics"),
    "max_target_length": (_is_whole, "a whole number of tokens"),
    "generation": (_is_generation, 'arguments of generate, such as {"num_beams": 4}'),
    "dataset": (_is_text, "the name of a data set on the Hub"),
    "dataset_config": (_is_text, "the name of a configuration of the data set"),
    "splits": (_is_splits, f"an object that names the splits, such as {json.dumps({each: each for each in SPLITS})}"),
    **{field: (_is_text, "the path of a file") for field in FILES},
}

#: What helps where YAML read a text as another type.
_QUOTE = "; put quotes around texts that look like numbers, and around yes, no, on, off, true and false"


def checked_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields with all that follows from them, if each is known and has a value of the right kind.

    Args:
        fields: fields of a TaskSpec, except its name, as JSON or YAML gives them.
        where: the place of the fields, for errors.

    Raises:
        DataError: a field is unknown or its value is of the wrong kind; the message names ``where`` and the field.
    """
    for field, value in fields.items():
        if field not in ALLOWED:
            raise DataError(
                f"{where}: unknown field {field!r}{did_you_mean(field, ALLOWED)}; known are {', '.join(ALLOWED)}"
            )
        fits, words = ALLOWED[field]
        if not fits(value):
            quote = _QUOTE if _holds_numbers(value) else ""
            raise DataError(f"{where}: {field} must be {words}, got {shown_value(value)}{quote}")
        check_text(json.dumps(value, ensure_ascii=False, default=str), f"{where}: {field}")
    if isinstance(fields.get("labels"), dict) and "label_names" in fields:
        raise DataError(
            f"{where}: labels maps the names of the rows already, so label_names must be left out, got "
            f"{shown_value(fields['label_names'])}"
        )
    _check_generation(fields.get("generation", {}), where)
    return _completed(dict(fields))


def _holds_numbers(value: Any) -> bool:
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(isinstance(item, (bool, int, float)) for item in items)


def _check_generation(generation: Mapping[str, Any], where: str) -> None:
    if not generation:
        return
    from transformers import GenerationConfig  # only here: it takes seconds to import

    known = {*GenerationConfig().to_dict(), "max_new_tokens", "min_new_tokens"}
    for argument in generation:
        if argument not in known:
            near = did_you_mean(argument, known)
            raise DataError(f"{where}: generation has no argument {argument!r} of generate(){near}")


def _completed(given: dict[str, Any]) -> dict[str, Any]:
    """Add the fields that follow from those given, which replace what a known task of that name has."""
    if "columns" in given:
        columns = given["columns"]
        columns = columns if isinstance(columns, dict) else {name: name for name in columns}
        given["columns"] = {shown: (found,) if isinstance(found, str) else found for shown, found in columns.items()}
    elif given.get("source") is not None:
        given["columns"] = {}  # those that the template names
    if isinstance(given.get("labels"), dict):
        given = {"label_names": list(given["labels"]), **given, "labels": list(given["labels"].values())}
    if given.get("label_names") and "labels" not in given:
        given["labels"] = [str(index) for index in range(len(given["label_names"]))]
    for field in ("metrics", "label_columns"):
        if isinstance(given.get(field), str):
            given[field] = [given[field]]
    if "target_template" in given:
        given.setdefault("target", "text")
    if "labels" in given:
        given.setdefault("target", "number" if given["labels"] is None else "class")
    if given.get("target") in ("number", "text"):
        given.setdefault("labels", None)
    if "labels" in given:
        given = {"label_names": (), "metrics": (), **given}
    if "dataset" in given:
        given = {"dataset_config": None, "splits": {}, **dict.fromkeys(FILES), **given}
    elif any(field in given for field in FILES):
        given = {"dataset": None, "dataset_config": None, "splits": {}, **given}
    return given


def spec_of(name: str, fields: Mapping[str, Any], where: str, known: TaskSpec | None = None) -> TaskSpec:
    """Build the TaskSpec of an entry.

    Args:
        name: name of the task.
        fields: the entry's fields.
        where: the entry's place, for errors.
        known: the task known by this name; the entry's fields replace its own.

    Raises:
        DataError: the entry has no source or no target, or a field cannot be used; the message names ``where``, the
            field, its value and what is expected.
    """
    place = f"{where}: task {name!r}"
    check_text(name, f"{where}: the name {name!r} of a task")
    if not isinstance(fields, Mapping):
        raise DataError(f"{place} must be an object of fields, got {shown_value(fields)}")
    given = checked_fields(fields, place)
    if known is None:
        if "source" not in given and "columns" not in given:
            raise DataError(f'{place} has no source: give a template such as "source": "question: {{question}}"')
        if "target" not in given:
            raise DataError(
                f'{place} has no target: say "target": "class" with labels or label_names, "number", or "text" '
                "with label_columns or a target_template"
            )
    if given.get("target") == "class" and not given.get("labels") and (known is None or known.labels is None):
        raise DataError(f"{place}: target 'class' needs labels (the target texts) or label_names (those of the rows)")
    try:
        return TaskSpec(name=name, **given) if known is None else dataclasses.replace(known, **given)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
