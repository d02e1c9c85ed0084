"""Turn rows into examples: what the model reads, what it is to write, and the label that the metrics compare with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .cache import Cache, content_print, kept
from .formats import Placed, Rows, number_of, rows_of_dataset
from .infer import spec_of_rows
from .tasks import DataError, TaskSpec
from .templates import placeholders

if TYPE_CHECKING:
    from datasets import Dataset, Features

_ROWS_PER_BATCH = 1000


@dataclasses.dataclass
class TaskData:
    """A task's specification and its examples.

    Args:
        spec: the task.
        splits: for each split a Dataset with the columns ``source`` and ``target`` (texts) and ``label`` (the index of
            a class, a number, a text, or a list of acceptable texts).
        cache: where :func:`~hyperformer_fast.data.encode` keeps the tokens.
    """

    spec: TaskSpec
    splits: dict[str, Dataset]
    cache: Cache = dataclasses.field(default_factory=Cache)

    @classmethod
    def from_dataset(
        cls, spec: TaskSpec | str, *, cache: Cache | None = None, **splits: Dataset | Sequence[Mapping[str, Any]]
    ) -> TaskData:
        """Build a task from Datasets (or lists of rows) in memory: ``from_dataset("cola", train=..., validation=...)``.

        Args:
            spec: the task, or its name: a known task, or one whose columns and labels can be told from ``train``.
            cache: see :class:`TaskData`.
            splits: the rows of each split.

        Raises:
            DataError: a row does not fit the task, or the task cannot be told from its rows.
        """
        cache = cache or Cache()
        name = spec if isinstance(spec, str) else spec.name
        rows = {split: _rows(found, f"{name} {split}") for split, found in splits.items() if found is not None}
        if isinstance(spec, str):
            spec = spec_of_rows(spec, rows["train"] if "train" in rows else next(iter(rows.values())))
        examples = {split: make_examples(spec, found, None, split == "test") for split, found in rows.items()}
        for split, made in examples.items():
            if made.unlabelled:
                warnings.warn(f"{name} {split}: {made.unlabelled:,} rows without a label are left out", stacklevel=2)
        return cls(spec, {split: made.dataset for split, made in examples.items() if made.dataset is not None}, cache)

    @property
    def report_split(self) -> str:
        """The split that results are reported on: ``test`` if there is one with labels, else ``validation``."""
        return "test" if "test" in self.splits else "validation"

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return the number of rows and a hash of each split, which tell a resumed run whether the data changed."""
        return {split: {"rows": len(found), "content": content_print(found)} for split, found in self.splits.items()}

    def unchanged(self, split: str, before: Mapping[str, Any] | None) -> bool:
        """Return whether a split is what it was when :meth:`fingerprint` returned ``before`` for it.

        The fingerprints of earlier versions, which held a ``sha256``, are understood.
        """
        found = self.splits.get(split)
        if found is None or before is None or before.get("rows") != len(found):
            return found is None and before is None
        if "sha256" not in before:
            return before.get("content") == content_print(found)
        rows = [(self.spec.name, row["source"], row["target"], row["label"]) for row in found]
        return before["sha256"] == hashlib.sha256(repr(rows).encode("utf-8", "surrogatepass")).hexdigest()


def _rows(found: Any, name: str) -> Rows:
    if isinstance(found, Sequence):
        placed = [(f"{name}:{number}", dict(row)) for number, row in enumerate(found, 1)]
        return Rows(name, "", lambda columns: iter(placed))
    return rows_of_dataset(found, name)


@dataclasses.dataclass(frozen=True)
class Examples:
    """What :func:`make_examples` returns.

    Args:
        dataset: the examples; None if no row of a test split has a label.
        unlabelled: rows that were left out because they have no label.
        held_names: all rows hold the name of a class instead of its index.
    """

    dataset: Dataset | None
    unlabelled: int
    held_names: bool


def examples(spec: TaskSpec, rows: Sequence[Placed]) -> Dataset:
    """Turn rows, each with its place, into examples. Raises DataError for the first that does not fit the task."""
    made = make_examples(spec, Rows(spec.name, "", lambda columns: iter(rows)), None).dataset
    assert made is not None  # only the labels of a Dataset may be absent
    return made


def make_examples(spec: TaskSpec, rows: Rows, cache: Cache | None, may_lack_labels: bool = False) -> Examples:
    """Turn the rows of a split into examples.

    In a column of type ``ClassLabel``, -1 means that a row has no label, and such rows are left out. The columns of a
    task that is known are all named in its entry, and any others are ignored.

    Args:
        spec: the task.
        rows: the rows.
        cache: where to keep the examples; None for memory.
        may_lack_labels: a whole split of a Dataset may have no labels, as have the test splits of GLUE.

    Raises:
        DataError: a row does not fit the task; the message names its place.
    """
    import pyarrow.compute as pc
    from datasets import Dataset

    made = _Maker(spec, rows, may_lack_labels)
    found: Any = None
    for label in made.label_types:
        features = _features(label)
        try:
            if cache is None:
                columns: dict[str, list[Any]] = {name: [] for name in features}
                for batch in made.batches(label):
                    for name in columns:
                        columns[name] += batch[name]
                found = Dataset.from_dict(columns, features=features)
            else:
                fields = {**spec.to_dict(), "rows_have_names": None}
                # Without sorted keys: the order of the columns is that of the texts.
                description = json.dumps([fields, may_lack_labels, label])
                path = cache.path("examples", rows.content, description)
                found = kept(path, features, lambda: made.batches(label), cache)
            break
        except _ListOfAnswers:
            continue
    labelled = np.asarray(found.data.column("labelled"), dtype=bool)
    unlabelled = len(found) - int(labelled.sum())
    held_names = pc.all(found.data.column("named")).as_py()
    if unlabelled:
        found = found.select(np.flatnonzero(labelled))
    found = found.select_columns(["source", "target", "label"])
    if len(found) == 0:
        if unlabelled == 0 or not may_lack_labels:
            raise DataError(f"{rows.name} holds no rows" + (" with a label" if unlabelled else ""))
        return Examples(None, unlabelled, False)
    return Examples(found, unlabelled, held_names)


class _ListOfAnswers(Exception):
    """A row lists several acceptable answers where earlier ones hold a text."""


def _features(label: str) -> Features:
    from datasets import Features, Value

    kinds = {"texts": [Value("string")]}
    return Features(
        {
            "source": Value("string"),
            "target": Value("string"),
            "label": kinds.get(label) or Value(label),
            "named": Value("bool"),
            "labelled": Value("bool"),
        }
    )


class _Maker:
    """Makes the examples of some rows, in batches of columns."""

    def __init__(self, spec: TaskSpec, rows: Rows, may_lack_labels: bool):
        self.spec, self.rows, self.may_lack_labels = spec, rows, may_lack_labels
        self.label_types = {"class": ["int64"], "number": ["float64"]}.get(str(spec.target), ["string", "texts"])
        self.columns = _needed(spec)
        self.names = {str(name) for name in spec.label_names}
        self.class_labels = {
            column: feature
            for column, feature in (rows.features or {}).items()
            if column in spec.label_columns and hasattr(feature, "names")
        }
        # For each such column, the task's own name of each integer, where the two have the same names.
        self.own_names = {
            column: found
            for column, feature in self.class_labels.items()
            if (found := _own_names(feature.names, spec.label_names)) is not None
        }
        for column in self.class_labels if self.names else ():
            if column not in self.own_names:
                classes = ", ".join(self.class_labels[column].names)[:200]
                warnings.warn(
                    f"{rows.name}: the classes of column {column!r}, {classes}, "
                    f"are not called as those of task {spec.name!r}, {', '.join(map(str, spec.label_names))[:200]}; "
                    "its integers are taken for the task's, in the task's order",
                    stacklevel=5,
                )
        self.numbers_as_text = spec.target == "class" and not rows.typed

    def batches(self, label_type: str) -> Iterator[dict[str, list[Any]]]:
        """Yield batches of examples whose labels are of a type. Raises _ListOfAnswers if a row needs the next type."""
        spec, columns = self.spec, dict.fromkeys(("source", "target", "label", "named", "labelled"))
        batch: dict[str, list[Any]] = {name: [] for name in columns}
        # The bar shows itself only if the work takes longer than a second, and only in a terminal.
        for where, row in tqdm(self.read(), desc=f"reading {self.rows.name}", unit=" rows", delay=1.0, disable=None):
            row = self.with_names(row)
            source = spec.source_text(row, where)
            label = self.label_of(row, where)
            labelled = label is not None
            if label_type == "texts":
                label = [label] if isinstance(label, str) else label or []
            elif isinstance(label, list):
                raise _ListOfAnswers
            target = spec.target_text(label) if labelled else ""
            named = not labelled or spec.holds_name(row)
            for column, value in zip(batch.values(), (source, target, label, named, labelled), strict=True):
                column.append(value)
            if len(batch["source"]) == _ROWS_PER_BATCH:
                yield batch
                batch = {name: [] for name in columns}
        if batch["source"]:
            yield batch

    def read(self) -> Iterator[Placed]:
        return self.rows.read(self.columns)

    def with_names(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose label is what the task's entry expects of it.

        The integers of a ClassLabel follow its own order of the names, which can differ from that of the entry.
        """
        for column, names in self.own_names.items():
            value = row[column]
            if value is not None and value >= 0:
                row = {**row, column: names[value]}
        if self.numbers_as_text:
            for column in self.spec.label_columns:
                value = row.get(column)
                if isinstance(value, str) and value not in self.names:
                    row = {**row, column: number_of(value)}
        return row

    def label_of(self, row: dict[str, Any], where: str) -> Any:
        """Return the label, or None if the row has none."""
        if not self.spec.is_labelled(row):
            return None
        try:
            return self.spec.label(row, where)
        except DataError:
            column = next((column for column in self.spec.label_columns if column in row), None)
            value = row.get(column) if column else None
            absent = value is None or value == "" or (not isinstance(value, bool) and value == -1)
            of_dataset = self.rows.features is not None and column is not None
            if absent and of_dataset and (column in self.class_labels or self.may_lack_labels):
                return None
            raise


def _own_names(found: Sequence[str], names: Sequence[str | int]) -> list[str] | None:
    """Return the task's name for each name that is found, in whatever case; None if the two are not the same names."""
    exact = [str(name) for name in names]
    if set(found) == set(exact):
        return list(found)
    own = {name.casefold(): name for name in exact}
    if len(own) < len(exact) or len(found) != len(exact) or {name.casefold() for name in found} != own.keys():
        return None
    return [own[name.casefold()] for name in found]


def _needed(spec: TaskSpec) -> set[str]:
    """Return the columns that a task reads."""
    names = {name for found in spec.columns.values() for name in found} | set(spec.label_columns)
    names |= {*placeholders(spec.source or ""), *placeholders(spec.target_template or "")}
    return names | {name.partition(".")[0] for name in names}
