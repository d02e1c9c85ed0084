"""Read JSON-lines files; every error names the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..json_files import parse
from .tasks import DataError


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Return all rows of a file, each with its place ``"file:line"``. Empty lines are skipped.

    Raises:
        DataError: a line is not UTF-8, is not a JSON object or has a column twice, or the file has no rows.
        OSError: the file cannot be read.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = parse(text, _once)
            except ValueError as error:
                raise DataError(f"{where}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
            rows.append((where, row))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return row
