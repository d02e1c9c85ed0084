"""TaskSpec, the one declarative description of a task: what the model reads, what it is to write, how it is scored."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..nearest import did_you_mean
from .errors import DataError, check_text, shown_value
from .templates import fill, find, has, placeholders, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a model may have to write: the text of a class, a number as text, or any text.
TARGETS = ("class", "number", "text")

#: Names of the metrics that a TaskSpec may list, and the targets that each one fits.
METRICS: dict[str, tuple[str, ...]] = {
    "accuracy": ("class", "text"),
    "f1": ("class",),
    "matthews": ("class",),
    "pearson": ("number",),
    "spearman": ("number",),
    "bleu": ("text",),
    "rouge1": ("text",),
    "rouge2": ("text",),
    "rougeL": ("text",),
    "rougeLsum": ("text",),
    "exact_match": ("text",),
    "squad_f1": ("text",),
}
_DEFAULT_METRICS = {"class": ("accuracy",), "number": ("pearson", "spearman")}

#: A task's splits, by the names that this library uses.
SPLITS = ("train", "validation", "test")

#: A number written as text.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")

#: Most numbers that a numeric target may be rounded to; each is tokenised once.
MOST_NUMBERS = 100_000

#: New tokens that a free text may have where neither the task nor the run says how many.
DEFAULT_TARGET_LENGTH = 128

#: The tasks known by name to the versions that wrote no ``rows_have_names``.
_FIRST_KNOWN = frozenset("cola sst2 mrpc qqp stsb mnli qnli rte trec scitail".split())

_TUPLES = ("label_columns", "label_names", "metrics", "unlabelled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One text-to-text task.

    Args:
        name: name of the task, and of its folder where it has one.
        source: template of what the model reads, with the names of columns in braces:
            ``"question: {question} context: {context}"``. None: each of ``columns`` behind its name.
        columns: the text columns in order. A key is the name that the model and the template see; its value lists the
            names that the column may have in a file. A list of names serves where both are the same; without it, the
            columns are those in ``source``. ``translation.en`` is the entry ``en`` of the column ``translation``.
        prefix: text that goes before the source, with a space between them. None: nothing, because the adapters know
            the task; without adapters a run sets it.
        target: ``class``, ``number`` or ``text``. None: a class if there are ``labels``, a text if there is a
            ``target_template``, else a number.
        labels: the target text of each class.
        label_columns: names that the label's column may have in a file; the first that is found is used. For a text
            target the column holds a text or a list of acceptable answers, of which the first is trained on.
        label_names: names that rows may hold instead of the index of a class (``"entailment"``), one for each of
            ``labels``, or none at all. If any name is a number, a number in a row is a name and never an index.
        target_template: template of a text target, where one column alone is not the target.
        unlabelled: values of the label that mean that the row has none, such as -1; such rows are left out.
        low, high, step: the range of a numeric label, and the step that it is rounded to before it is written as text
            (0.2 for STS-B, in T5 and in the paper).
        metrics: names from :data:`METRICS`. By default ``accuracy`` for classes, ``pearson`` and ``spearman`` for
            numbers; a text target must say.
        max_target_length: most tokens of a text target: in training, where the run does not say; in generation,
            whatever the run says. None: the run's.
        generation: arguments of ``generate`` for this task, such as ``{"num_beams": 4}``.
        dataset, dataset_config: name of the data set on the Hub, and of its configuration.
        splits: for each of ``train``, ``validation`` and ``test``, the split of ``dataset`` that it is. Where two are
            the same split, a run cuts it in two; see ``split_validation_test``.
        train_file, validation_file, test_file: files with the rows, instead of ``dataset``.
        rows_have_names: the training rows hold names instead of indices; predictions then do too.

    Raises:
        ValueError: a field is invalid; the message names the task, the field, its value and what is expected.
    """

    name: str
    source: str | None = None
    columns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    prefix: str | None = None
    target: str | None = None
    labels: tuple[str, ...] | None = None
    label_columns: tuple[str, ...] = ("label",)
    label_names: tuple[str | int, ...] = ()
    target_template: str | None = None
    unlabelled: tuple[str | int, ...] = ()
    low: float = 0.0
    high: float = 5.0
    step: float = 0.2
    metrics: tuple[str, ...] = ()
    max_target_length: int | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    rows_have_names: bool = False

    def __post_init__(self) -> None:
        for field in _TUPLES:
            value = getattr(self, field)
            self._set(field, (value,) if isinstance(value, (str, int)) else tuple(value))
        if self.labels is not None:
            if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
                raise self._fail(f"labels must be a list of texts, got {shown_value(self.labels)}")
            self._set("labels", tuple(self.labels))
        if self.target is None:
            without_labels = "number" if self.target_template is None else "text"
            self._set("target", without_labels if self.labels is None else "class")
        self._set("splits", dict(self.splits))
        self._set("generation", dict(self.generation))
        self._check_source()
        self._check_target()
        self._check_metrics()
        self._check_places()

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _fail(self, message: str) -> ValueError:
        return ValueError(f"task {self.name}: {message}")

    def _placeholders(self, field: str) -> list[str]:
        try:
            found = placeholders(getattr(self, field))
        except ValueError as error:
            raise self._fail(f"{field} {error}") from None
        if not found:
            raise self._fail(f"{field} must name a column in braces, got {shown_value(getattr(self, field))}")
        return found

    def _check_source(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a task's name must be a text, got {self.name!r}")
        columns = self.columns
        if not isinstance(columns, Mapping):
            columns = {column: column for column in ((columns,) if isinstance(columns, str) else columns)}
        known = {shown: (found,) if isinstance(found, str) else tuple(found) for shown, found in columns.items()}
        if self.source is not None:
            found = self._placeholders("source")
            unused = [column for column in known if column not in found]
            if unused:
                raise self._fail(f"columns has {unused[0]!r}, which source={shown_value(self.source)} does not name")
            known = {column: known.get(column, (column,)) for column in dict.fromkeys(found)}
        if not known:
            raise self._fail("columns and metrics must not be empty, unless a source template names the columns")
        self._set("columns", known)

    def _check_target(self) -> None:
        if self.target not in TARGETS:
            raise self._fail(
                f"target must be class, number or text, got {shown_value(self.target)}"
                f"{did_you_mean(self.target, TARGETS)}"
            )
        labels, names = self.labels, self.label_names
        if self.target == "class":
            if labels is None:
                raise self._fail("target 'class' needs labels, the target text of each class, got labels=None")
            if len(labels) < 2 or len(set(labels)) < len(labels):
                raise self._fail(f"labels must be at least two different texts, got {labels!r}")
            if names and len(names) != len(labels):
                raise self._fail(f"label_names must have one name per label, got {names!r} for {len(labels)} labels")
            if len(set(self._names)) < len(self._names):
                raise self._fail(f"label_names must be unique, got {names!r}")
        elif labels is not None or names:
            raise self._fail(f"labels and label_names need target 'class', got {labels or names!r} for {self.target!r}")
        if self.target_template is not None:
            if self.target != "text":
                raise self._fail(f"target_template needs target 'text', got target {self.target!r}")
            self._placeholders("target_template")
        if not self.label_columns:
            raise self._fail("label_columns must not be empty")
        if not (self.low < self.high and self.step > 0 and self._decimals() <= 6):
            raise self._fail(
                "low must be below high, and step positive with at most six decimals, "
                f"got low={self.low!r}, high={self.high!r}, step={self.step!r}"
            )
        if any(abs(bound / self.step - round(bound / self.step)) > 1e-6 for bound in (self.low, self.high)):
            raise self._fail(
                "low and high must be multiples of step, because labels are rounded to these before they are written, "
                f"got low={self.low!r}, high={self.high!r}, step={self.step!r}"
            )
        if (self.high - self.low) / self.step > MOST_NUMBERS:
            raise self._fail(
                f"step must leave at most {MOST_NUMBERS:,} different numbers from low={self.low!r} to "
                f"high={self.high!r}, got step={self.step!r}"
            )

    def _check_metrics(self) -> None:
        if not self.metrics:
            self._set("metrics", _DEFAULT_METRICS.get(str(self.target), ()))
        fitting = [name for name, targets in METRICS.items() if self.target in targets]
        if not self.metrics:
            raise self._fail(f"metrics must be given for a text target: some of {', '.join(fitting)}")
        for metric in self.metrics:
            if metric not in METRICS:
                raise self._fail(
                    f"metrics must be among {', '.join(METRICS)}, got {metric!r}{did_you_mean(metric, METRICS)}"
                )
            if metric not in fitting:
                raise self._fail(
                    f"metric {metric!r} does not fit target {self.target!r}: "
                    f"metrics must be among {', '.join(fitting)}, got {metric!r}"
                )
        if len(set(self.metrics)) < len(self.metrics):
            raise self._fail(f"metrics must be different, got {self.metrics!r}")
        if "f1" in self.metrics and len(self.labels or ()) != 2:
            raise self._fail(f"f1 needs two classes, got labels={self.labels!r}")

    def _check_places(self) -> None:
        for split in self.splits:
            if split not in SPLITS:
                raise self._fail(f"splits must be of {', '.join(SPLITS)}, got {split!r}{did_you_mean(split, SPLITS)}")
        files = [field for field in FILES if getattr(self, field) is not None]
        if files and self.dataset is not None:
            raise self._fail(f"rows come from dataset or from files, got both dataset={self.dataset!r} and {files[0]}")
        if files and self.train_file is None:
            raise self._fail(f"{files[0]} needs a train_file beside it")
        if self.dataset_config is not None and self.dataset is None:
            raise self._fail(f"dataset_config={self.dataset_config!r} needs a dataset")
        length = self.max_target_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise self._fail(f"max_target_length must be a whole number from 1, got {length!r}")

    @property
    def _names(self) -> list[str]:
        return [str(name) for name in self.label_names]

    @property
    def _numbers_are_names(self) -> bool:
        return any(NUMBER.fullmatch(name) for name in self._names)

    def source_text(self, row: Mapping[str, Any], where: str) -> str:
        """Return the model's input for a row, such as ``"sentence1: It rains. sentence2: It is wet."``.

        Raises:
            DataError: a column is absent or holds no text; the message names ``where`` and the column.
        """
        if self.source is None:
            text = " ".join(f"{shown}: {text_of(row, names, where)}" for shown, names in self.columns.items())
        else:
            text = fill(self.source, lambda name: text_of(row, self.columns.get(name, (name,)), where, numbers=True))
        if not self.prefix:
            return text
        return self.prefix + ("" if self.prefix[-1].isspace() else " ") + text

    def label(self, row: Mapping[str, Any], where: str) -> int | float | str | list[str]:
        """Return the index of the row's class, its number, its text, or the list of its acceptable answers.

        Raises:
            DataError: the label is absent or invalid; the message names ``where``, the value and what is allowed.
        """
        if self.target_template is not None:
            return fill(self.target_template, lambda name: text_of(row, (name,), where, numbers=True))
        column, value = find(row, self.label_columns, where)
        if self.target == "text":
            return _answers(value, f"{where}: {column!r}")
        if self.target == "number":
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
            allowed = f"an integer from 0 to {len(self.labels or ()) - 1}" + (
                f" (or one of {listed})" if listed else ""
            )
            raise DataError(
                f"{where}: {column!r} is out of range: it must be "
                f"{f'one of {listed}' if self._numbers_are_names else allowed}, got {shown_value(value)}"
            )
        return index

    def _class_of(self, value: Any) -> int | None:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, (str, int)):
            return None
        if self.label_names and str(value) in self._names:
            return self._names.index(str(value))
        if isinstance(value, str) or isinstance(value, bool) or self._numbers_are_names:
            return None
        return value if 0 <= value < len(self.labels or ()) else None

    def is_labelled(self, row: Mapping[str, Any]) -> bool:
        """Return whether the row's label is none of ``unlabelled``. A row without the column counts as labelled."""
        if not self.unlabelled:
            return True
        value = next((find(row, (column,), "")[1] for column in self.label_columns if has(row, column)), None)
        return isinstance(value, (bool, list)) or value not in self.unlabelled

    def holds_name(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row gives its label by name and not by index."""
        value = next((find(row, (column,), "")[1] for column in self.label_columns if has(row, column)), None)
        return self._numbers_are_names or isinstance(value, str) and value in self._names

    def answer(self, label: int | float | str | None, by_name: bool) -> int | float | str | None:
        """Return a label as rows hold it: the name of a class if ``by_name`` is set and it has one, else its index."""
        return self.label_names[int(label)] if by_name and self.label_names and label is not None else label

    def target_text(self, label: int | float | str | list[str]) -> str:
        """Return the text that the model should write for a label: of several acceptable answers, the first."""
        if isinstance(label, list):
            return label[0]
        if isinstance(label, str):
            return label
        if self.labels is not None:
            return self.labels[int(label)]
        return self._rounded(label)

    def _decimals(self) -> int:
        return max(1, len(f"{self.step:.9f}".rstrip("0").partition(".")[2]))

    def _rounded(self, label: float) -> str:
        decimals = self._decimals()
        if self.step == 0.1:
            # The Hub holds STS-B's labels in float32, where 0.85 is slightly more than in float64: it rounds up.
            return f"{round(struct.unpack('f', struct.pack('f', label))[0], 1) + 0.0:.1f}"
        # Six decimals undo float32: 3.1, which the Hub holds as 3.0999999, is the same label as in a file of float64.
        return f"{round(round(label, 6) / self.step) * self.step + 0.0:.{decimals}f}"  # + 0.0 turns -0.0 into 0.0

    def targets(self) -> list[str] | None:
        """Return every text that can be a target, or None where any text can."""
        if self.target == "text":
            return None
        if self.labels is not None:
            return list(self.labels)
        count = round((self.high - self.low) / self.step)
        return [self._rounded(self.low + i * self.step) for i in range(count + 1)]

    def parse(self, text: str) -> int | float | str | None:
        """Return the label that the model wrote, or None if ``text`` is no label. Any text is a text target."""
        text = text.strip()
        if self.target == "text":
            return text
        if self.labels is not None:
            return self.labels.index(text) if text in self.labels else None
        return float(text) if NUMBER.fullmatch(text) and math.isfinite(float(text)) else None

    def generation_kwargs(
        self, tokenizer: PreTrainedTokenizerBase, max_target_length: int | None = None
    ) -> dict[str, Any]:
        """Return the arguments of ``generate`` for this task, with ``max_new_tokens`` always among them.

        Classes and numbers end with the longest target. A text may have ``max_new_tokens`` (or ``max_length``) of
        ``generation``, else the task's ``max_target_length``, else ``max_target_length`` of the run, else 128 tokens.
        """
        targets = self.targets()
        if targets is None:
            longest = self.max_target_length or max_target_length or DEFAULT_TARGET_LENGTH
        else:
            longest = max(map(len, tokenizer(targets).input_ids))
        arguments = {"max_new_tokens": longest, **self.generation}
        if "max_length" in arguments:
            length = arguments.pop("max_length") - 1  # it counts the token that the decoder starts with
            arguments |= {} if "max_new_tokens" in self.generation else {"max_new_tokens": length}
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TaskSpec:
        """Build a TaskSpec from what :meth:`to_dict` returns.

        Earlier versions wrote no ``rows_have_names``. It is then true for a task that has ``label_names`` and was not
        known by name, because those names can only have come from its rows.
        """
        had_names = bool(fields.get("label_names")) and fields.get("name") not in _FIRST_KNOWN
        return cls(**{"rows_have_names": had_names, **fields})


#: The fields that name files.
FILES = ("train_file", "validation_file", "test_file")


def _answers(value: Any, what: str) -> str | list[str]:
    answers = value if isinstance(value, list) else [value]
    if not answers:
        raise DataError(f"{what} must hold an acceptable answer, got an empty list")
    for answer in answers:
        if not isinstance(answer, str):
            raise DataError(f"{what} must be a text or a list of texts, got {shown_value(value)}")
        check_text(answer, what)
    return list(value) if isinstance(value, list) else value
