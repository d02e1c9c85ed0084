"""Read the rows of files (JSON lines, JSON, CSV, TSV, parquet, Arrow) and of Datasets, each with its place.

The text formats are read here and not by ``datasets``, whose readers guess types from the values: a column of dates
becomes timestamps, a missing column becomes null, ``NA`` in a CSV file becomes a missing value, and an error names
neither row nor column.
"""

from __future__ import annotations

import csv
import dataclasses
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..json_files import parse
from .cache import file_print, progress
from .tasks import NUMBER, DataError, shown_value

if TYPE_CHECKING:
    from datasets import Dataset

#: A progress bar is shown for a larger file than this, in bytes.
_LARGE_FILE = 50_000_000

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")

#: A row, and its place for error messages.
Placed = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one split of a task.

    Args:
        name: what error messages call them: a path, or the name of a dataset.
        content: tells this content from any other.
        read: yields each row with its place. Its argument lists the columns that are needed; None for all.
        features: the types of the columns, where they are declared (by ``datasets``).
        typed: False if every value is text, as in CSV, and a number must be recognised.
    """

    name: str
    content: str
    read: Callable[[Collection[str] | None], Iterator[Placed]]
    features: Mapping[str, Any] | None = None
    typed: bool = True

    def __iter__(self) -> Iterator[Placed]:
        found = False
        for placed in self.read(None):
            found = True
            yield placed
        if not found:
            raise DataError(f"{self.name} holds no rows")


def read_rows(path: str | Path) -> list[Placed]:
    """Return all rows of a file of any format, each with its place (``"file:line"`` in JSON lines and CSV).

    Raises:
        DataError: the format is unknown, the file has no rows, or one of them is malformed.
        OSError: the file cannot be read.
    """
    return list(rows_of_file(Path(path)))


def rows_of_file(path: Path, cache_dir: str | None = None) -> Rows:
    """Return the rows of a file, whose format is known by its name.

    Args:
        path: the file.
        cache_dir: where ``datasets`` keeps what it makes of parquet; None for its own cache.
    """
    suffix = path.suffix.lower()
    if suffix in _DATASET_FILES:
        return rows_of_dataset(_DATASET_FILES[suffix](path, cache_dir), str(path))
    if suffix not in _TEXT_FILES:
        raise DataError(f"{path}: the format must be one of {', '.join(SUFFIXES)}, got {path.suffix or 'none'!r}")
    read = _TEXT_FILES[suffix]
    return Rows(str(path), file_print(path), lambda columns: read(path), typed=suffix not in (".csv", ".tsv"))


def rows_of_dataset(dataset: Dataset, name: str) -> Rows:
    """Return the rows of a Hugging Face Dataset."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise DataError(
            f"{name}: expected a datasets.Dataset, got {type(dataset).__name__}; a streamed one cannot be shuffled: "
            "load it without streaming=True"
        )
    plain = dataset.with_format(None)

    def read(columns: Collection[str] | None) -> Iterator[Placed]:
        chosen = plain
        if columns is not None:
            chosen = plain.select_columns([column for column in plain.column_names if column in columns])
        number = 0
        for batch in chosen.iter(1000):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{name}:{number}", dict(zip(batch, values, strict=True))

    # A Dataset's own fingerprint follows its content, and its history where a transformation was not reproducible.
    return Rows(name, f"dataset {dataset._fingerprint}", read, dataset.features)


def json_lines(path: Path) -> Iterator[Placed]:
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
            yield where, _object(row, where)


def _json(path: Path) -> Iterator[Placed]:
    """A list of objects, an object whose ``data`` is such a list, or JSON lines."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        first_line = start.split(b"\n", 1)[0].strip()
        if first_line.endswith(b"}") and first_line != b"}":
            lines = list(json_lines(path))
            if len(lines) != 1 or not isinstance(lines[0][1].get("data"), list):
                yield from lines
                return
    try:
        content = parse(path.read_bytes().decode("utf-8-sig"), _once)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, or an object per line, got {shown_value(content)}")
    for number, row in enumerate(content, 1):
        yield f"{path}: row {number}", _object(row, f"{path}: row {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the name {_twice([name for name, _ in pairs])!r} stands twice in one object")
    return row


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _csv(path: Path, delimiter: str = ",") -> Iterator[Placed]:
    csv.field_size_limit(sys.maxsize)  # the default of 131,072 characters is less than a long document
    with open(path, "rb") as file:
        reader = csv.reader(_decoded(path, file), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{where}: not a row of {path.suffix[1:].upper()}: {error}") from error
            if values is None:
                return
            if not values:
                continue
            if header is None:
                # pandas writes its index without a name, and reads it back under this one.
                header = [name or f"Unnamed: {index}" for index, name in enumerate(values)]
                if _twice(header):
                    raise DataError(f"{where}: the column {_twice(header)!r} stands twice in the first line")
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{where}: a row must have {len(header)} values, one for each of {', '.join(header)[:200]}; "
                    f"got {len(values)}"
                )
            if delimiter == "\t" and any("\t" in value and "\n" in value for value in values):
                raise DataError(
                    f"{where}: a quoted value has tabs and line ends in it, so that it may be several rows, of which "
                    f"one begins with a quotation mark: write {path.name} as JSON lines"
                )
            yield where, dict(zip(header, values, strict=True))


def _decoded(path: Path, file: Any) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8: {error}; save the file as UTF-8") from error


def number_of(text: str) -> int | float | str:
    """Return a number that is written as text, or else the text itself."""
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


def _parquet(path: Path, cache_dir: str | None) -> Dataset:
    from datasets import Dataset

    with progress(path.stat().st_size > _LARGE_FILE):
        return _opened(path, lambda: Dataset.from_parquet(str(path), cache_dir=cache_dir))


def _arrow(path: Path, cache_dir: str | None) -> Dataset:
    from datasets import Dataset

    return _opened(path, lambda: Dataset.from_file(str(path)))


def _opened(what: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # pyarrow and datasets raise errors of many classes
        raise DataError(f"{what} cannot be read: {error.__cause__ or error}") from error


_TEXT_FILES: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
}
_DATASET_FILES: dict[str, Callable[[Path, str | None], Any]] = {".parquet": _parquet, ".arrow": _arrow}
SUFFIXES = (*_TEXT_FILES, *_DATASET_FILES)


def split_file(folder: Path, split: str) -> Path | None:
    """Return ``<folder>/<split>.<suffix>``, or None. Raises DataError if there are two."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has {' and '.join(path.name for path in found)}: remove all but one of them")
    return found[0] if found else None


def saved_dataset(folder: Path) -> Any:
    """Return the Dataset or DatasetDict that ``save_to_disk`` wrote to a folder, or None."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    from datasets import load_from_disk

    return _opened(folder, lambda: load_from_disk(str(folder)))
