"""Load tasks: from a folder, from the files or the data set that their entries name, or the built-in ones."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..nearest import did_you_mean
from .builtin import BUILTIN_SPECS, BUILTIN_TASKS
from .cache import Cache
from .examples import Examples, TaskData, make_examples
from .examples import examples as examples
from .formats import SUFFIXES, Rows
from .infer import spec_of_rows
from .places import GLUE_REPOSITORY, BuiltIn, Files, Folder, Hub, Place
from .registry import GLUE, KNOWN, find_task, read_task_entries, registered_tasks, with_prefix
from .splits import HELD_OUT_ROWS, cut, holds_out, sample_train
from .task_file import TASK_FILE
from .tasks import SPLITS, DataError, TaskSpec

if TYPE_CHECKING:
    from rich.console import Console

#: ``data_dir`` for GLUE's eight tasks from the Hub.
HUB_GLUE = "hub:glue"


class UnknownTask(ValueError):
    """A task is not in the data; the message lists the tasks that are."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """The fields of DataArguments that decide what is loaded."""

    data_dir: str | None = None
    tasks: Sequence[str] | None = None
    task_file: str | None = None
    text_style: str = "default"
    add_prefix: bool | None = None
    max_train_samples: int | None = None
    split_validation_test: bool | None = None
    data_seed: int = 42
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None

    @classmethod
    def of(cls, data: Any) -> _Options:
        if data is None or isinstance(data, (str, Path)):
            return cls(data_dir=None if data is None else str(data))
        fields: dict[str, Any] = {
            field.name: getattr(data, field.name, field.default) for field in dataclasses.fields(cls)
        }
        return cls(**fields)


def available_tasks(data: Any = None) -> list[str]:
    """Return the names of the tasks that are loaded where none are chosen.

    Args:
        data: the DataArguments, or only their ``data_dir``. Without a ``data_dir`` these are the tasks of the task
            file, or the built-in ones.

    Raises:
        DataError: ``data_dir`` is not a directory, or holds no task; or the task file cannot be used.
    """
    options = _Options.of(data)
    of_file = [spec.name for spec in _entries_of_file(options)]
    if options.data_dir is None:
        return of_file or list(BUILTIN_TASKS)
    return list(dict.fromkeys([*_tasks_of(options.data_dir), *of_file]))


def _tasks_of(data_dir: str) -> list[str]:
    if data_dir == HUB_GLUE:
        return list(GLUE)
    if data_dir.startswith("hub:"):
        raise DataError(
            f"data_dir={data_dir!r}: the only name of this form is {HUB_GLUE!r}; for another data set of the Hub, name "
            "it as 'dataset' in the task's entry"
        )
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir={data_dir!r} is not a directory")
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and Folder(path).has_train())
    if not found:
        raise DataError(
            f"data_dir={data_dir!r} holds no <task>/train.jsonl (or {', '.join(SUFFIXES[1:])}), nor a <task> saved by "
            "save_to_disk"
        )
    return found


def load_tasks(
    data: Any = None,
    tasks: Sequence[str] | None = None,
    *,
    specs: Mapping[str, TaskSpec] | None = None,
    selecting: bool = False,
    cache_dir: str | None = None,
    console: Console | None = None,
) -> dict[str, TaskData]:
    """Load tasks, check all of their rows, and cut them into splits.

    ``max_train_samples`` and ``split_validation_test`` of ``data`` are applied; the limits on rows that are evaluated
    are not, because they differ between the evaluations of one split.

    Args:
        data: the DataArguments, or only their ``data_dir``: a folder of ``<task>/<split>.<format>`` or of
            ``<task>`` saved by ``save_to_disk`` (and ``<task>/task.json``, if columns or labels can be read in two
            ways); ``"hub:glue"``; or None, for tasks from where their entries say.
        tasks: names of the tasks to load; None for those of ``data``, or all.
        specs: specifications of tasks, such as a saved run's; they take precedence over all other knowledge of a task.
        selecting: the run selects a checkpoint on validation. By default a task without a labelled test split is then
            cut, so that its results are not reported on the rows that selected it.
        cache_dir: folder of the cache; None for that of ``datasets``.
        console: where to say what is not as a reader may expect; None to warn instead.

    Raises:
        UnknownTask: a task is not in the data; the message names it and lists the tasks that are.
        DataError: a row cannot be used; the message names the file and the row.
    """
    require("loading data", "datasets")
    options = _Options.of(data)
    cache = Cache(cache_dir, options.overwrite_cache, options.preprocessing_num_workers)
    loader = _Loader(options, dict(specs or {}), selecting, cache, console)
    return loader.load(tasks if tasks is not None else options.tasks)


def _entries_of_file(options: _Options) -> Sequence[TaskSpec]:
    return () if options.task_file is None else read_task_entries(options.task_file, options.text_style)


class _Loader:
    """Loads tasks, each from its place, and collects what has to be said of them."""

    def __init__(
        self, options: _Options, specs: dict[str, TaskSpec], selecting: bool, cache: Cache, console: Console | None
    ):
        self.options, self.specs, self.selecting, self.cache, self.console = options, specs, selecting, cache, console
        self.of_file = {spec.name: spec for spec in _entries_of_file(options)}
        self.own = {**registered_tasks(), **self.of_file}
        self.shared_with_train: list[str] = []
        self.selected_and_reported: list[str] = []

    def load(self, tasks: Sequence[str] | None) -> dict[str, TaskData]:
        wanted = self.all_tasks() if tasks is None else list(tasks)
        places = {name: self.place(name) for name in wanted}
        unknown = [name for name, place in places.items() if place is None]
        if unknown:
            raise UnknownTask(self.unknown(unknown))
        found = {name: self.task(name, place) for name, place in places.items() if place is not None}
        self.say_what_was_cut()
        return found

    def all_tasks(self) -> list[str]:
        return available_tasks(self.options)

    def unknown(self, names: Sequence[str]) -> str:
        data_dir = self.options.data_dir
        there = list(dict.fromkeys([*available_tasks(data_dir), *self.own]))
        where = "the built-in data" if data_dir is None else data_dir
        hint = did_you_mean(names[0], there if data_dir is not None else [*there, *KNOWN])
        if data_dir is not None and getattr(self.entry(names[0]), "dataset", None) is not None:
            hint = f"; leave data_dir out to take {names[0]!r} from the Hub"
        return f"unknown task {', '.join(map(repr, names))}; {where} has {', '.join(there)}{hint}"

    def entry(self, name: str) -> TaskSpec | None:
        """The task's specification before its rows are seen; None if nothing is known of it."""
        return self.specs.get(name) or self.of_file.get(name) or find_task(name, self.options.text_style)

    def place(self, name: str) -> Place | None:
        entry, data_dir = self.entry(name), self.options.data_dir
        # A saved run's task has its files from its task.json, and data_dir may now be another place with one.
        in_folder = data_dir is not None and name not in self.own and name in _tasks_of(data_dir)
        if entry is not None and entry.train_file is not None and not in_folder:
            files = {split: path for split in SPLITS if (path := getattr(entry, f"{split}_file")) is not None}
            return Files(name, files, self.cache)
        if data_dir == HUB_GLUE and name in GLUE:
            return Hub(entry, GLUE_REPOSITORY, name, self.cache)
        if entry is not None and entry.dataset is not None and (data_dir is None or name in self.own):
            return Hub(entry, entry.dataset, entry.dataset_config, self.cache)
        if data_dir is None:
            return BuiltIn(name) if name in BUILTIN_SPECS else None
        if data_dir == HUB_GLUE or name not in _tasks_of(data_dir):
            return None
        return Folder(Path(data_dir) / name, entry, self.cache)

    def task(self, name: str, place: Place) -> TaskData:
        rows: dict[str, Rows] = {split: found for split in SPLITS if (found := place.rows(split)) is not None}
        for split in ("train", "validation"):
            if split not in rows:
                raise DataError(place.absent(split))
        if isinstance(place, Files):
            self.check_files(name, rows)
        if name in self.specs:
            spec = self.specs[name]
        else:
            spec = self.spec(name, place, rows["train"])
            spec = with_prefix(spec) if self.options.add_prefix else spec
        made = {split: self.examples(spec, rows[split], split) for split in rows}
        if name not in self.specs and name not in self.builtin_names():
            spec = dataclasses.replace(spec, rows_have_names=made["train"].held_names)
        splits = {split: examples.dataset for split, examples in made.items() if examples.dataset is not None}
        return TaskData(spec, self.arranged(name, splits), self.cache)

    def check_files(self, name: str, rows: dict[str, Rows]) -> None:
        """Leave out a test file that is the validation file, which selects a checkpoint; say where one is train."""
        if "test" in rows and rows["test"].content == rows["validation"].content:
            del rows["test"]
        for split in ("validation", "test"):
            if split in rows and rows[split].content == rows["train"].content:
                self.say(f"{name}: {split} has the rows of train, so that its results say nothing of new rows")

    def builtin_names(self) -> Sequence[str]:
        return tuple(BUILTIN_SPECS) if self.options.data_dir is None else ()

    def spec(self, name: str, place: Place, train: Rows) -> TaskSpec:
        """Return the entry of a task, changed by its ``task.json``, or a specification inferred from its rows."""
        given = place.given()
        entry = self.entry(name)
        try:
            if entry is not None:
                return dataclasses.replace(entry, **given)
            return spec_of_rows(name, train, place.name, given)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{place.name}/{TASK_FILE}: {error}") from error

    def examples(self, spec: TaskSpec, rows: Rows, split: str) -> Examples:
        made = make_examples(spec, rows, self.cache, may_lack_labels=split == "test")
        if made.dataset is None:
            self.say(f"{rows.name} has no labels, and is not used as a test split")
        elif made.unlabelled:
            self.say(f"{rows.name}: {made.unlabelled:,} rows without a label are left out")
        return made

    def arranged(self, name: str, splits: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        rule = options.split_validation_test
        if "test" not in splits and (rule or (rule is None and self.selecting)):
            if holds_out(name, len(splits["train"])):
                self.shared_with_train.append(name)
            return cut(name, splits, options.data_seed, options.max_train_samples)
        if "test" not in splits and self.selecting:
            self.selected_and_reported.append(name)
        return {**splits, "train": sample_train(splits["train"], options.max_train_samples, options.data_seed)}

    def say_what_was_cut(self) -> None:
        if self.shared_with_train:
            self.say(
                f"{', '.join(self.shared_with_train)}: {HELD_OUT_ROWS:,} rows of train are validation, and are not "
                "trained on (the authors' code trains on them too); the official validation is test"
            )
        if self.selected_and_reported:
            self.say(
                f"{', '.join(self.selected_and_reported)}: a checkpoint is selected, and results are reported, on the "
                "same rows, because split_validation_test is false and there is no labelled test split"
            )

    def say(self, message: str) -> None:
        if self.console is None:
            warnings.warn(message, stacklevel=2)
        else:
            self.console.print(message, soft_wrap=True, markup=False, highlight=False)
