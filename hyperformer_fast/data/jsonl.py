"""JSON-lines files, whose every fault is named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tasks import DataError


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """All rows, each with its place ``"file:line"``. Empty lines are skipped.

    Raises:
        DataError: a line is not UTF-8 or not a JSON object, or the file holds no rows.
        OSError: it cannot be read.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{where}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
            rows.append((where, row))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows
