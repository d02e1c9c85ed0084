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

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


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
            none.
        metrics: of :data:`METRICS`.
        low, high, step: a number's range, and what it is rounded to before it becomes text (T5 and the paper: STS-B in
            steps of 0.2).

    Raises:
        ValueError: naming the field.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...] | None
    label_columns: tuple[str, ...] = ("label",)
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    low: float = 0.0
    high: float = 5.0
    step: float = 0.2

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

    def source(self, row: Mapping[str, Any], where: str) -> str:
        """The model's input: ``"sentence1: It rains. sentence2: It is wet."``. DataError names ``where`` and the
        column."""
        parts = []
        for shown, aliases in self.columns.items():
            column = _first(row, aliases, where)
            if not isinstance(row[column], str):
                raise DataError(f"{where}: column {column!r} must be text, got {row[column]!r}")
            parts.append(f"{shown}: {row[column]}")
        return " ".join(parts)

    def label(self, row: Mapping[str, Any], where: str) -> int | float:
        """The index of the row's class, or its number. DataError names ``where``, the value and what is allowed."""
        column = _first(row, self.label_columns, where)
        value = row[column]
        if self.labels is None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
                raise DataError(
                    f"{where}: {column!r} must be a number from {self.low:g} to {self.high:g}, got {value!r}"
                )
            return float(value)
        if isinstance(value, str) and value in self.label_names:
            return self.label_names.index(value)
        n = len(self.labels)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            names = f" (or one of {', '.join(self.label_names)})" if self.label_names else ""
            raise DataError(
                f"{where}: {column!r} is out of range: it must be an integer from 0 to {n - 1}{names}, got {value!r}"
            )
        return value

    def target(self, label: int | float) -> str:
        """The text that the model is to write."""
        if self.labels is not None:
            return self.labels[int(label)]
        return f"{round(label / self.step) * self.step:.1f}"

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
        return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TaskSpec:
        """The inverse of :meth:`to_dict`."""
        return cls(**fields)


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


def infer_spec(name: str, rows: list[dict[str, Any]], where: str) -> TaskSpec:
    """The spec of a task that is not known by name, from its training rows.

    One or two text columns and one label: integers 0 to n-1 (classes), texts in a column ``label`` (classes, in
    alphabetical order), or floats from 0 to 5 (similarity).

    Raises:
        DataError: the columns can be read in no way or in more than one.
    """
    row = rows[0]
    others = [column for column, value in row.items() if not isinstance(value, str)]
    label = "label" if "label" in row else others[0] if len(others) == 1 else None
    texts = [column for column, value in row.items() if isinstance(value, str) and column != label]
    extra = [column for column in others if column != label]
    if label is None or extra or not 1 <= len(texts) <= 2:
        raise DataError(
            f"{where}: {name!r} is not a task known by name ({', '.join(KNOWN)}), and its columns {list(row)} can't be "
            "told apart: there must be one or two columns of text and one 'label'"
        )
    columns = {column: (column,) for column in texts}
    values = {row.get(label) for row in rows if not isinstance(row.get(label), (list, dict))}
    common = {"name": name, "columns": columns, "label_columns": (label,)}
    kinds = {type(value) for value in values}
    if kinds == {int} and len(values) > 1 and values == set(range(len(values))):
        return TaskSpec(**common, labels=tuple(map(str, range(len(values)))))
    if kinds == {str} and 1 < len(values) <= 100:
        names = tuple(sorted(values))
        return TaskSpec(**common, labels=tuple(map(str, range(len(names)))), label_names=names)
    if kinds <= {int, float} and float in kinds and all(0 <= value <= 5 for value in values):
        return TaskSpec(**common, labels=None, metrics=("pearson", "spearman"))
    raise DataError(
        f"{where}: the labels of {name!r} must be integers 0 to n-1, up to 100 texts, or numbers from 0 to 5; "
        f"got {len(values)} different ones, among them {sorted(map(repr, values))[:3]}"
    )
