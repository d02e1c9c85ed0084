"""Read rows to be labelled from a file or from memory, and write them again with their columns as they were."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_file
from ..data import DataError
from ..data.formats import Rows, json_lines, rows_of_dataset, rows_of_file, saved_dataset
from ..extras import require

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


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows that can be read again and again, each with its place. A file is read anew each time, and not kept.

    Args:
        read: returns the rows with their places.
        features: as in :class:`Table`.
    """

    read: Callable[[], Iterable[tuple[str, Row]]]
    features: Mapping[str, Any]

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return iter(self.read())

    def table(self) -> Table:
        """Return all rows."""
        table = Table([], [], self.features)
        for place, row in self:
            table.rows.append(row)
            table.places.append(place)
        return table


def open_rows(source: Any) -> Source:
    """Return the rows of a source, which is what :func:`read_table` takes. A pipe, which cannot be read again, is read
    here."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        found = _rows_of_path(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            kept = list(found)
            return Source(lambda: kept, found.features or {})
        return Source(lambda: found, found.features or {})
    if hasattr(source, "features") and hasattr(source, "with_format"):
        rows = rows_of_dataset(source, "row")
        return Source(lambda: rows, rows.features or {})
    listed = _listed(source)
    return Source(lambda: listed, {})


def read_table(source: Any) -> Table:
    """Read rows.

    Args:
        source: a ``datasets.Dataset``, a sequence of mappings, the path of a file in any format that training reads, or
            a folder that ``Dataset.save_to_disk`` wrote. A file without a suffix (/dev/stdin) holds JSON lines.

    Raises:
        DataError: there are no rows, or one of them cannot be read; the message names its place.
        OSError: a file cannot be read.
    """
    return open_rows(source).table()


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


def _listed(source: Any) -> list[tuple[str, Row]]:
    rows = list(source)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {i} must be a mapping of columns to values, got {type(row).__name__}")
    if not rows:
        raise DataError("there are no rows to predict")
    return [(f"row {i}", dict(row)) for i, row in enumerate(rows, 1)]


def kind_of(path: Path) -> str:
    """Return the kind of a file by its suffix. Raises DataError for an unknown suffix."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: rows are written to {', '.join(filter(None, KINDS))} files")
    return kind


def write_table(path: Path, table: Table) -> None:
    """Write rows in the kind of file that the suffix of ``path`` names, completely or not at all."""
    if path.exists() and not path.is_file():
        # A device or a pipe, such as /dev/stdout, is written to, where a file would be replaced.
        _write(path, table, kind_of(path))
        return
    with write_file(path) as partial:
        _write(Path(partial), table, kind_of(path))


def _write(path: Path, table: Table, kind: str) -> None:
    text = TEXTS.get(kind)
    if text is None:
        _write_parquet(path, table)
        return
    form = text(table.columns())
    path.write_bytes(form.head() + form.rows(table.rows, 0) + form.tail())


class Lines:
    """How JSON lines are written: what a file begins with, what each stretch of rows adds, and what ends it.

    Args:
        columns: the columns of all rows.
    """

    def __init__(self, columns: Sequence[str]):
        self.columns = list(columns)

    def head(self) -> bytes:
        """Return what stands before the rows."""
        return b""

    def rows(self, rows: Sequence[Row], before: int) -> bytes:
        """Return some rows, behind ``before`` others."""
        return "".join(map(json_line, rows)).encode()

    def tail(self) -> bytes:
        """Return what stands behind the rows."""
        return b""


class JsonList(Lines):
    """How a JSON list is written."""

    def head(self) -> bytes:
        return b"[\n"

    def rows(self, rows: Sequence[Row], before: int) -> bytes:
        lines = ",\n".join(json_line(row).rstrip("\n") for row in rows)
        return (",\n" if before and rows else "").encode() + lines.encode()

    def tail(self) -> bytes:
        return b"\n]\n"


class Csv(Lines):
    """How CSV is written."""

    delimiter = ","

    def head(self) -> bytes:
        return self._lines([self.columns])

    def rows(self, rows: Sequence[Row], before: int) -> bytes:
        return self._lines([_cell(row.get(name)) for name in self.columns] for row in rows)

    def _lines(self, lines: Iterable[Sequence[Any]]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=self.delimiter, lineterminator="\n")
        # Python quotes a carriage return only where it is part of the line's end, but reads it only in quotes.
        quoting = csv.writer(text, delimiter=self.delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for cells in lines:
            (quoting if any("\r" in str(cell) for cell in cells) else writer).writerow(cells)
        try:
            return text.getvalue().encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise DataError(f"CSV cannot hold half of a surrogate pair ({half!r}): write .jsonl") from error


class Tsv(Csv):
    """How TSV is written."""

    delimiter = "\t"


#: The kinds of files that are text, which can be written stretch by stretch.
TEXTS: dict[str, type[Lines]] = {"jsonl": Lines, "json": JsonList, "csv": Csv, "tsv": Tsv}


def json_line(row: Mapping[str, Any], encoding: str = "utf-8") -> str:
    """Return a row as a line of JSON, with escapes only if the encoding cannot represent its text."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(row, default=str)
    return line + "\n"


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict, bool)) else value


def _write_parquet(path: Path, table: Table) -> None:
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
