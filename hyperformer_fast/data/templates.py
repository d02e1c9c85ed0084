"""Templates such as ``"premise: {premise} hypothesis: {hypothesis}"``, and the columns of a row that they name.

A column may lie within another: ``translation.en`` is the entry ``en`` of the column ``translation``, and
``endings.0`` is the first item of a list.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import DataError, check_text, shown_value

_ABSENT = object()


def placeholders(template: str) -> list[str]:
    """Return the names of the columns between a template's braces, in their order.

    Raises:
        ValueError: a placeholder is malformed; the message quotes the template and says what is expected.
    """
    return [name for _, name in _parts(template) if name is not None]


def fill(template: str, value: Callable[[str], str]) -> str:
    """Return the template with each placeholder replaced by ``value`` of its name."""
    return "".join(text + ("" if name is None else value(name)) for text, name in _parts(template))


def _parts(template: str) -> list[tuple[str, str | None]]:
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(_malformed(template, str(error))) from None
    parts = []
    for text, name, form, conversion in found:
        if name is not None and (not name.strip() or form or conversion):
            written = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(_malformed(template, f"{{{written}}} is not the name of a column"))
        parts.append((text, None if name is None else name.strip()))
    return parts


def _malformed(template: str, why: str) -> str:
    return (
        f"has a malformed placeholder in {shown_value(template)}: {why}; expected {{column}}, "
        "and {{ or }} for a brace itself"
    )


def find(row: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """Return the first of ``names`` that the row has as a column, and the column's value.

    Raises:
        DataError: the row has none of them; the message names ``where``, the names and the row's columns.
    """
    for name in names:
        value = _value(row, name)
        if value is not _ABSENT:
            return name, value
    raise DataError(
        f"{where}: no column {' or '.join(map(repr, names))}; there are {', '.join(map(repr, row)) or 'none'}"
    )


def has(row: Mapping[str, Any], name: str) -> bool:
    """Return whether the row has a column of this name."""
    return _value(row, name) is not _ABSENT


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for key in name.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, (list, tuple)) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return _ABSENT
    return value


def text_of(row: Mapping[str, Any], names: Sequence[str], where: str, numbers: bool = False) -> str:
    """Return the text in a column of the row.

    Args:
        row: the row.
        names: names that the column may have.
        where: the row's place, for errors.
        numbers: take a finite number as the text that Python writes for it.

    Raises:
        DataError: the column is absent or holds no text.
    """
    column, value = find(row, names, where)
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} must be text, got {shown_value(value)}")
    check_text(value, f"{where}: column {column!r}")
    return value
