"""TaskSpec, which describes a task's columns, labels and metrics; and the tasks that are known by name.

Sources and targets are those of the authors' code (``hyperformer/data/tasks.py``): each column is preceded by its name,
there is no task prefix because the adapters know the task, and the target of a class is its index.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

#: Names of the metrics that a TaskSpec may list.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")

#: A number written as text.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


class DataError(ValueError):
    """A data file or a row cannot be used; the message says where it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One text-to-text task.

    Args:
        name: name of the task and of its folder.
        columns: the text columns in order. A key is the name that the model sees; its value lists the names that the
            column may have in a file.
        labels: the target text of each class. None: the label is a number.
        label_columns: names that the label's column may have in a file; the first that is found is used.
        label_names: names that rows may hold instead of the index of a class (``"entailment"``), one for each of
            ``labels``, or none at all. If any name is a number, a number in a row is a name and never an index.
        metrics: names from :data:`METRICS`.
        low, high, step: the range of a numeric label, and the step that it is rounded to before it is written as text
            (0.2 for STS-B, in T5 and in the paper). ``step`` is a multiple of 0.1, because one decimal is written.
        rows_have_names: the training rows hold names instead of indices; predictions then do too.

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...] | None
    label_columns: tuple[str, ...] = ("label",)
    label_names: tuple[str | int, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    low: float = 0.0
    high: float = 5.0
    step: float = 0.2
    rows_have_names: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", {name: tuple(aliases) for name, aliases in dict(self.columns).items()})
        for field in ("label_columns", "label_names", "metrics"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
        numeric = {"pearson", "spearman"}
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"task {self.name}: metrics must be among {', '.join(METRICS)}, got {metric!r}")
            if (metric in numeric) != (self.labels is None):
                raise ValueError(f"task {self.name}: metric {metric!r} does not fit labels={self.labels!r}")
        if "f1" in self.metrics and len(self.labels or ()) != 2:
            raise ValueError(f"task {self.name}: f1 needs two classes, got labels={self.labels!r}")
        if not self.columns or not self.metrics:
            raise ValueError(f"task {self.name}: columns and metrics must not be empty")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"task {self.name}: labels must be at least two different texts, got {self.labels!r}")
        if self.label_names and len(self.label_names) != len(self.labels or ()):
            raise ValueError(f"task {self.name}: label_names must have one name per label, got {self.label_names!r}")
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"task {self.name}: label_names must be unique, got {self.label_names!r}")
        if not (self.low < self.high and self.step > 0 and abs(self.step * 10 - round(self.step * 10)) < 1e-9):
            raise ValueError(
                f"task {self.name}: low must be below high, and step a multiple of 0.1, "
                f"got low={self.low!r}, high={self.high!r}, step={self.step!r}"
            )

    @property
    def _names(self) -> list[str]:
        return [str(name) for name in self.label_names]

    @property
    def _numbers_are_names(self) -> bool:
        return any(NUMBER.fullmatch(name) for name in self._names)

    def source(self, row: Mapping[str, Any], where: str) -> str:
        """Return the model's input for a row, such as ``"sentence1: It rains. sentence2: It is wet."``.

        Raises:
            DataError: a column is absent or holds no text; the message names ``where`` and the column.
        """
        parts = []
        for shown, aliases in self.columns.items():
            column = _first(row, aliases, where)
            if not isinstance(row[column], str):
                raise DataError(f"{where}: column {column!r} must be text, got {shown_value(row[column])}")
            check_text(row[column], f"{where}: column {column!r}")
            parts.append(f"{shown}: {row[column]}")
        return " ".join(parts)

    def label(self, row: Mapping[str, Any], where: str) -> int | float:
        """Return the index of the row's class, or its numeric label.

        Raises:
            DataError: the label is absent or invalid; the message names ``where``, the value and what is allowed.
        """
        column = _first(row, self.label_columns, where)
        value = row[column]
        if self.labels is None:
            if isinstance(value, str) and NUMBER.fullmatch(value):
                value = float(value)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
                raise DataError(
                    f"{where}: {column!r} must be a number from {self.low:g} to {self.high:g}, got {shown_value(value)}"
                )
            return float(value)
        index = self._class_of(value)
        if index is None:
            listed = ", ".join(self._names[:20]) + (", ..." if len(self._names) > 20 else "")
            allowed = f"an integer from 0 to {len(self.labels) - 1}" + (f" (or one of {listed})" if listed else "")
            raise DataError(
                f"{where}: {column!r} is out of range: it must be "
                f"{f'one of {listed}' if self._numbers_are_names else allowed}, got {shown_value(value)}"
            )
        return index

    def _class_of(self, value: Any) -> int | None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            return None
        if self.label_names and str(value) in self._names:
            return self._names.index(str(value))
        if isinstance(value, int) and 0 <= value < len(self.labels or ()) and not self._numbers_are_names:
            return value
        return None

    def holds_name(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row gives its label by name and not by index."""
        value = next((row[column] for column in self.label_columns if column in row), None)
        return self._numbers_are_names or isinstance(value, str) and value in self._names

    def answer(self, label: int | float | None, by_name: bool) -> int | float | str | None:
        """Return a label as rows hold it: the name of a class if ``by_name`` is set and it has one, else its index."""
        return self.label_names[int(label)] if by_name and self.label_names and label is not None else label

    def target(self, label: int | float) -> str:
        """Return the text that the model should write for a label."""
        if self.labels is not None:
            return self.labels[int(label)]
        return f"{round(label / self.step) * self.step + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0

    def targets(self) -> list[str]:
        """Return every text that can be a target."""
        if self.labels is not None:
            return list(self.labels)
        count = round((self.high - self.low) / self.step)
        return [self.target(self.low + i * self.step) for i in range(count + 1)]

    def parse(self, text: str) -> int | float | None:
        """Return the label that the model wrote, or None if ``text`` is no label."""
        text = text.strip()
        if self.labels is not None:
            return self.labels.index(text) if text in self.labels else None
        return float(text) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TaskSpec:
        """Build a TaskSpec from what :meth:`to_dict` returns.

        Earlier versions wrote no ``rows_have_names``. It is then true for a task that has ``label_names`` and is not
        known by name, because those names can only have come from its rows.
        """
        had_names = bool(fields.get("label_names")) and fields.get("name") not in KNOWN
        return cls(**{"rows_have_names": had_names, **fields})


def shown_value(value: Any) -> str:
    """Return the repr of a value for an error message, shortened to at most a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def check_text(text: str, what: str) -> None:
    """Raise DataError if ``text`` contains half of a surrogate pair.

    JSON and a command line can contain one, but UTF-8 cannot encode it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not text: {text[error.start]!r} at position {error.start} is half of a surrogate pair, which "
            "a wrong conversion to UTF-8 leaves behind"
        ) from None


def _first(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            return name
    raise DataError(
        f"{where}: no column {' or '.join(map(repr, names))}; there are {', '.join(map(repr, row)) or 'none'}"
    )


def _spec(name: str, columns: str, classes: int | None, metrics: str, **fields: Any) -> TaskSpec:
    """Build a TaskSpec from short notation.

    Args:
        name: name of the task.
        columns: the columns in order, separated by spaces: ``shown=alias|alias``, or just the name.
        classes: number of classes; None if the label is a number.
        metrics: names of the metrics, separated by spaces.
        fields: further fields of the TaskSpec.
    """
    found = {}
    for column in columns.split():
        shown, _, aliases = column.partition("=")
        found[shown] = tuple(aliases.split("|")) if aliases else (shown,)
    labels = None if classes is None else tuple(map(str, range(classes)))
    return TaskSpec(name=name, columns=found, labels=labels, metrics=tuple(metrics.split()), **fields)


_NLI = ("entailment", "neutral", "contradiction")

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

KNOWN: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        _spec("cola", "sentence", 2, "matthews", label_names=("unacceptable", "acceptable")),
        _spec("sst2", "sentence", 2, "accuracy", label_names=("negative", "positive")),
        _spec("mrpc", "sentence1 sentence2", 2, "accuracy f1", label_names=("not_equivalent", "equivalent")),
        _spec("qqp", "question1 question2", 2, "accuracy f1", label_names=("not_duplicate", "duplicate")),
        _spec("stsb", "sentence1 sentence2", None, "pearson spearman"),
        _spec("mnli", "premise hypothesis", 3, "accuracy", label_names=_NLI),
        _spec("qnli", "question sentence", 2, "accuracy", label_names=("entailment", "not_entailment")),
        _spec("rte", "sentence1 sentence2", 2, "accuracy", label_names=("entailment", "not_entailment")),
        _spec("trec", "sentence=text|sentence", 6, "accuracy", label_columns=("label-coarse", "coarse_label", "label")),
        _spec(
            "scitail",
            "sentence1=sentence1|premise sentence2=sentence2|hypothesis",
            2,
            "accuracy",
            label_columns=("label", "gold_label"),
            label_names=("entailment", "neutral"),
        ),
    )
}


def builtin_spec(name: str) -> TaskSpec:
    """Return the TaskSpec of a built-in task. Raises KeyError for another name."""
    from .builtin import BUILTIN_SPECS

    fields = BUILTIN_SPECS[name]
    columns = {column: (column,) for column in fields["columns"]}
    return TaskSpec(name=name, columns=columns, labels=fields["labels"], metrics=fields["metrics"])
