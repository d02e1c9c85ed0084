"""JSON that a person wrote: read so that every fault in it is a ValueError which names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads``, whose RecursionError becomes a ValueError too.

    Args:
        text: JSON.
        pairs: ``object_pairs_hook`` of ``json.loads``.

    Raises:
        ValueError: it is not JSON, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The one JSON object that a file holds.

    Raises:
        ValueError: it is not UTF-8, not JSON or not an object.
        OSError: it cannot be read.
    """
    try:
        content = parse(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object was expected, got {type(content).__name__}")
    return content
