"""Read rows to be labelled from a file or from memory, and write them again with their columns as they were."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_file
from ..data import DataError
from ..data.formats import Rows, json_lines, rows_of_dataset, rows_of_file, saved_dataset
from ..extras import require
from .folder import RunError

Row = dict[str, Any]

#: Suffixes of the file to write -> the kind of its content. A name without a suffix (/dev/stdout) gets JSON lines.
KINDS = {
    "": "jsonl",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclasses.dataclass
class Table:
    """Rows in their order.

    Args:
        rows: the rows, column to value.
        places: where each row stands (``"file:line"``), for error messages.
        features: the ``datasets`` feature of each column, where the source of the rows has them; a ``ClassLabel`` has
            the names of its integers.
        added: the columns that were added to what was read.
    """

    rows: list[Row]
    places: list[str]
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Sequence[str] = ()

    def columns(self) -> list[str]:
        """Return the names of all columns, in the order in which they first occur."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def read_table(source: Any) -> Table:
    """Read rows.

    Args:
        source: a ``datasets.Dataset``, a sequence of mappings, the path of a file in any format that training reads, or
            a folder that ``Dataset.save_to_disk`` wrote. A file without a suffix (/dev/stdin) holds JSON lines.

    Raises:
        DataError: there are no rows, or one of them cannot be read; the message names its place.
        OSError: a file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        rows = _rows_of_path(Path(source))
    elif hasattr(source, "features") and hasattr(source, "with_format"):
        rows = rows_of_dataset(source, "row")
    else:
        return Table(*_listed(source))
    table = Table([], [], rows.features or {})
    for place, row in rows:
        table.rows.append(row)
        table.places.append(place)
    return table


def _rows_of_path(path: Path) -> Rows:
    if path.suffix:
        return rows_of_file(path)
    if path.is_dir():
        found = saved_dataset(path)
        if found is None:
            raise DataError(f"{path} is a folder, but not one that Dataset.save_to_disk wrote")
        if hasattr(found, "keys"):
            raise DataError(f"{path} holds several splits ({', '.join(found)}): give the folder of one of them")
        return rows_of_dataset(found, str(path))
    return Rows(str(path), "", lambda columns: json_lines(path))


def _listed(source: Any) -> tuple[list[Row], list[str]]:
    rows = list(source)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {i} must be a mapping of columns to values, got {type(row).__name__}")
    if not rows:
        raise DataError("there are no rows to predict")
    return [dict(row) for row in rows], [f"row {i}" for i in range(1, len(rows) + 1)]


def kind_of(path: Path) -> str:
    """Return the kind of a file by its suffix. Raises DataError for an unknown suffix."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: rows are written to {', '.join(filter(None, KINDS))} files")
    return kind


def check_output(output: str | Path, source: Any) -> None:
    """Raise RunError, DataError or OSError if rows of ``source`` cannot be written to ``output``, before any work."""
    path = Path(output)
    kind_of(path)
    if path.is_dir():
        raise RunError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: {path.parent} is not a folder")
    if isinstance(source, (str, os.PathLike)) and path.is_file() and os.path.exists(source):
        if path.samefile(source):
            raise RunError(f"{path} is the input: give another name, so that it is not overwritten")


def write_table(path: Path, table: Table) -> None:
    """Write rows in the kind of file that the suffix of ``path`` names, completely or not at all."""
    write = {"jsonl": _write_jsonl, "json": _write_json, "csv": _write_csv, "tsv": _write_csv}
    act: Callable[[Path, Table, str], None] = write.get(kind_of(path), _write_parquet)
    if path.exists() and not path.is_file():
        # A device or a pipe, such as /dev/stdout, is written to, where a file would be replaced.
        act(path, table, kind_of(path))
        return
    with write_file(path) as partial:
        act(Path(partial), table, kind_of(path))


def json_line(row: Mapping[str, Any], encoding: str = "utf-8") -> str:
    """Return a row as a line of JSON, with escapes only if the encoding cannot represent its text."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(row, default=str)
    return line + "\n"


def _write_jsonl(path: Path, table: Table, kind: str) -> None:
    path.write_text("".join(map(json_line, table.rows)), encoding="utf-8")


def _write_json(path: Path, table: Table, kind: str) -> None:
    lines = ",\n".join(json_line(row).rstrip("\n") for row in table.rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _write_csv(path: Path, table: Table, kind: str) -> None:
    columns = table.columns()
    with open(path, "w", encoding="utf-8", newline="") as file:
        delimiter = "\t" if kind == "tsv" else ","
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        # Python quotes a carriage return only where it is part of the line's end, but reads it only in quotes.
        quoting = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        try:
            for cells in (columns, *([_cell(row.get(name)) for name in columns] for row in table.rows)):
                (quoting if any("\r" in str(cell) for cell in cells) else writer).writerow(cells)
        except UnicodeEncodeError as error:
            raise DataError(f"CSV cannot hold half of a surrogate pair ({error.object!r}): write .jsonl") from error


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict, bool)) else value


def _write_parquet(path: Path, table: Table, kind: str) -> None:
    require("writing parquet", "datasets")
    import pyarrow
    from datasets import Dataset, Features

    arrays = {}
    for name in table.columns():
        values = [row.get(name) for row in table.rows]
        if name in table.added and len({type(value) for value in values if value is not None}) > 1:
            # Names of one task and numbers of another: a column of parquet has one type.
            values = [None if value is None else str(value) for value in values]
        try:
            arrays[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise DataError(f"parquet cannot hold the column {name!r} ({error}): write .jsonl") from error
    # Arrow has the types, and the features what goes beyond them, such as the names of a ClassLabel.
    dataset = Dataset(pyarrow.table(arrays))
    features = {name: table.features.get(name, feature) for name, feature in dataset.features.items()}
    with open(path, "wb") as file:
        dataset.cast(Features(features)).to_parquet(file)
