"""Read JSON that may be malformed or hostile; every fault in it is a ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Largest allowed nesting of lists and objects. Beyond it, whether reading, printing or writing a value fails would
#: depend on Python's recursion limit and on how deep the caller is.
MAX_DEPTH = 100


def parse(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, max_depth: int = MAX_DEPTH) -> Any:
    """Parse JSON like ``json.loads``, but raise only ValueError.

    Args:
        text: the JSON text.
        pairs: the ``object_pairs_hook`` of ``json.loads``.
        max_depth: largest allowed nesting of lists and objects.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has a number with thousands of digits.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        too_deep = text.count("[") + text.count("{") > max_depth and _is_too_deep(value, max_depth)
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"lists or objects are nested more than {max_depth} deep")
    return value


def _is_too_deep(value: Any, max_depth: int) -> bool:
    level = [value]
    for _ in range(max_depth + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, (dict, list)):
                inner += each.values() if isinstance(each, dict) else each
        level = inner
    return bool(level)


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: the file is not UTF-8, not JSON or not an object; the message names it.
        OSError: the file cannot be read.
    """
    try:
        content = parse(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
