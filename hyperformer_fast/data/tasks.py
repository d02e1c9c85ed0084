"""What a task is: its columns, its labels as text, its metrics; and the tasks that are known by name.

Sources and targets are those of the authors' code (``hyperformer/data/tasks.py``): every column behind its name, no
task prefix (the adapters know the task), and the index of the class as the target.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

#: Metrics by name; the paper's of a task are in its spec.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")

#: A number written as text.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


class DataError(ValueError):
    """A data file or a row that cannot be used; the message says where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One text-to-text task.

    Args:
        name: of the task, and of its folder.
        columns: the text columns in order; each under the name it is shown to the model by, with the names that a file
            may have it under.
        labels: the target text of every class. None: the label is a number.
        label_columns: the names that a file may have the label under, the first found wins.
        label_names: what a row may hold in place of the index of a class (``"entailment"``); as many as ``labels``, or
            none. Where any of them is a number, a number in a row is a name and never an index.
        metrics: of :data:`METRICS`.
        low, high, step: a number's range, and what it is rounded to before it becomes text (T5 and the paper: STS-B in
            steps of 0.2); ``step`` is a multiple of 0.1, for one digit is written.
        rows_have_names: the training rows hold names, not indices, and so will predictions.

    Raises:
        ValueError: naming the field.
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
                raise ValueError(f"task {self.name}: metrics must be of {', '.join(METRICS)}, got {metric!r}")
            if (metric in numeric) != (self.labels is None):
                raise ValueError(f"task {self.name}: metric {metric!r} does not fit labels={self.labels!r}")
        if "f1" in self.metrics and len(self.labels) != 2:
            raise ValueError(f"task {self.name}: f1 is of two classes, got labels={self.labels!r}")
        if not self.columns or not self.metrics:
            raise ValueError(f"task {self.name}: columns and metrics must not be empty")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"task {self.name}: labels must be at least two different texts, got {self.labels!r}")
        if self.label_names and len(self.label_names) != len(self.labels or ()):
            raise ValueError(f"task {self.name}: label_names must be as many as labels, got {self.label_names!r}")
        if len(set(self._names)) < len(self._names):
            raise ValueError(f"task {self.name}: label_names must differ, got {self.label_names!r}")
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
        """The model's input: ``"sentence1: It rains. sentence2: It is wet."``. DataError names ``where`` and the
        column."""
        parts = []
        for shown, aliases in self.columns.items():
            column = _first(row, aliases, where)
            if not isinstance(row[column], str):
                raise DataError(f"{where}: column {column!r} must be text, got {shown_value(row[column])}")
            check_text(row[column], f"{where}: column {column!r}")
            parts.append(f"{shown}: {row[column]}")
        return " ".join(parts)

    def label(self, row: Mapping[str, Any], where: str) -> int | float:
        """The index of the row's class, or its number. DataError names ``where``, the value and what is allowed."""
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
        is_index = isinstance(value, int) and 0 <= value < len(self.labels) and not self._numbers_are_names
        return value if is_index else None

    def holds_name(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has its label by name."""
        value = next((row[column] for column in self.label_columns if column in row), None)
        return self._numbers_are_names or isinstance(value, str) and value in self._names

    def answer(self, label: int | float | None, by_name: bool) -> int | float | str | None:
        """A label as rows hold it: a class by its name, where it has one and ``by_name``, else by its index."""
        return self.label_names[int(label)] if by_name and self.label_names and label is not None else label

    def target(self, label: int | float) -> str:
        """The text that the model is to write."""
        if self.labels is not None:
            return self.labels[int(label)]
        return f"{round(label / self.step) * self.step + 0.0:.1f}"  # + 0.0: no "-0.0"

    def targets(self) -> list[str]:
        """Every text that the model may be asked to write."""
        if self.labels is not None:
            return list(self.labels)
        count = round((self.high - self.low) / self.step)
        return [self.target(self.low + i * self.step) for i in range(count + 1)]

    def parse(self, text: str) -> int | float | None:
        """The label that the model wrote, or None where it is none."""
        text = text.strip()
        if self.labels is not None:
            return self.labels.index(text) if text in self.labels else None
        return float(text) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TaskSpec:
        """The inverse of :meth:`to_dict`, also of one without ``rows_have_names``: then a task that is not known by
        name can only have its ``label_names`` from its rows."""
        had_names = bool(fields.get("label_names")) and fields.get("name") not in KNOWN
        return cls(**{"rows_have_names": had_names, **fields})


def shown_value(value: Any) -> str:
    """A value for a message, no longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def check_text(text: str, what: str) -> None:
    """DataError where ``text`` holds half of a surrogate pair, which JSON and a command line can, and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not text: {text[error.start]!r} at position {error.start} is half of a surrogate pair, as a "
            "wrong conversion to UTF-8 leaves it"
        ) from None


def _first(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in row:
            return name
    raise DataError(
        f"{where}: no column {' or '.join(map(repr, names))}; there are {', '.join(map(repr, row)) or 'none'}"
    )


def _spec(name: str, columns: str, classes: int | None, metrics: str, **fields: Any) -> TaskSpec:
    """``columns``: "shown=alias|alias other"; a column without aliases is found under its own name."""
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
    """The spec of a built-in task. KeyError for another name."""
    from .builtin import BUILTIN_SPECS

    fields = BUILTIN_SPECS[name]
    columns = {column: (column,) for column in fields["columns"]}
    return TaskSpec(name=name, columns=columns, labels=fields["labels"], metrics=fields["metrics"])
