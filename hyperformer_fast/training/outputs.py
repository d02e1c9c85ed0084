"""Where predicted rows go, stretch by stretch: a file that can be resumed, a parquet file, a device or a pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .folder import RunError
from .partial import PartialFile, partial_names
from .tables import TEXTS, Row, Source, Table, kind_of, write_table


class Columns(NamedTuple):
    """The columns of what is written."""

    added: Sequence[str]  #: those that predictions add
    every: Sequence[str]  #: all of them, in order


class Output(Protocol):
    """Takes rows in their order. At the end of its ``with`` block what is not whole stays, to be resumed."""

    done: int  #: rows that are written already

    def __enter__(self) -> Output: ...

    def __exit__(self, *exception: object) -> None: ...

    def add(self, rows: Sequence[Row]) -> None:
        """Write some rows."""

    def finish(self) -> None:
        """Write what ends them."""


def check_output(output: str | Path, source: Any, run_dir: str | Path | None = None) -> None:
    """Raise RunError, DataError or OSError if rows of ``source`` cannot be written to ``output``, before any work."""
    path = Path(output)
    kind_of(path)
    if path.is_dir():
        raise RunError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: {path.parent} is not a folder")
    if path.exists() and not path.is_file():
        return
    for each in (path, *partial_names(path)):
        if not each.is_file():
            continue
        if isinstance(source, (str, os.PathLike)) and os.path.exists(source):
            inside = os.path.isdir(source) and each.resolve().is_relative_to(Path(source).resolve())
            if inside or each.samefile(source):
                what = "is part of the input" if inside else "is the input"
                raise RunError(f"{each} {what}: give another name, so that it is not overwritten")
    if run_dir is not None and path.is_file() and kind_of(path) == "json" and _is_of_run(path, Path(run_dir)):
        raise RunError(f"{path} is a file of the run: give another name, so that it is not overwritten")


def _is_of_run(path: Path, run_dir: Path) -> bool:
    """Whether a JSON file lies in the folder of a run, and holds anything but a list of rows."""
    if not path.resolve().is_relative_to(run_dir.resolve()):
        return False
    with open(path, "rb") as file:
        return not file.read(64).lstrip().startswith(b"[")


def output_for(path: Path, source: Source, columns: Columns, stamp: Mapping[str, Any]) -> Output:
    """Return what writes rows to a path, in the kind of file that its suffix names.

    Args:
        path: a file, a device or a pipe.
        source: the rows without what is added to them.
        columns: their columns.
        stamp: what tells this output from any other, see :class:`PartialFile`.
    """
    kind = kind_of(path)
    if path.exists() and not path.is_file():
        return _Stream(path, kind, columns) if kind in TEXTS else _ParquetStream(path, source, columns)
    stamp = {"kind of file": kind, **stamp}
    return _File(path, kind, columns, stamp) if kind in TEXTS else _Parquet(path, source, columns, stamp)


class _File:
    """A text file, which grows under another name."""

    def __init__(self, path: Path, kind: str, columns: Columns, stamp: Mapping[str, Any]):
        self._form = TEXTS[kind](columns.every)
        self._file = PartialFile(path, stamp)
        self.done = self._file.rows

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def add(self, rows: Sequence[Row]) -> None:
        head = b"" if self._file.rows else self._form.head()
        self._file.append(head + self._form.rows(rows, self._file.rows), len(rows))

    def finish(self) -> None:
        self._file.finish(self._form.tail())


class _Parquet:
    """A parquet file, whose columns have types that follow from all rows. Until it is whole, what is added to the rows
    is kept as JSON lines."""

    def __init__(self, path: Path, source: Source, columns: Columns, stamp: Mapping[str, Any]):
        self._path, self._source, self._added = path, source, columns.added
        self._file = PartialFile(path, stamp)
        self.done = self._file.rows

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def add(self, rows: Sequence[Row]) -> None:
        lines = (json.dumps([row[name] for name in self._added]) + "\n" for row in rows)
        self._file.append("".join(lines).encode(), len(rows))

    def finish(self) -> None:
        table = self._source.table()
        lines = self._file.content().decode().splitlines()
        rows = [
            {**row, **dict(zip(self._added, json.loads(line)))} for row, line in zip(table.rows, lines, strict=True)
        ]
        write_table(self._path, Table(rows, table.places, table.features, self._added))
        self._file.discard()


class _Stream:
    """A device or a pipe, such as /dev/stdout, which is written to at once."""

    def __init__(self, path: Path, kind: str, columns: Columns):
        self._form, self.done = TEXTS[kind](columns.every), 0
        self._file = open(path, "wb")
        self._written = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, rows: Sequence[Row]) -> None:
        head = b"" if self._written else self._form.head()
        self._file.write(head + self._form.rows(rows, self._written))
        self._file.flush()
        self._written += len(rows)

    def finish(self) -> None:
        self._file.write(self._form.tail())


class _ParquetStream:
    """A device or a pipe that gets a parquet file."""

    def __init__(self, path: Path, source: Source, columns: Columns):
        self._path, self._source, self._added, self.done = path, source, columns.added, 0
        self._rows: list[Row] = []

    def __enter__(self) -> _ParquetStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def add(self, rows: Sequence[Row]) -> None:
        self._rows += rows

    def finish(self) -> None:
        write_table(self._path, Table(self._rows, [], self._source.features, self._added))
