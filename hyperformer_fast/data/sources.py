"""Load tasks from folders of JSON-lines files, from the built-in data, or (GLUE) from the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..extras import require
from .infer import infer_spec
from .jsonl import read_jsonl
from .task_file import TASK_FILE, read_task_file
from .tasks import GLUE, KNOWN, DataError, TaskSpec, builtin_spec, check_text

SPLITS = ("train", "validation", "test")

#: The only dataset that is ever downloaded, and only if ``data_dir`` is this name.
HUB_GLUE = "hub:glue"


class UnknownTask(ValueError):
    """A task is not in the data; the message lists the tasks that are."""


class Example(NamedTuple):
    """One row of a task as text: what the model reads and what it is to write."""

    task: str
    source: str
    target: str
    label: int | float


@dataclasses.dataclass
class TaskData:
    """A task's specification, and the examples of each of its splits."""

    spec: TaskSpec
    splits: dict[str, list[Example]]

    @property
    def report_split(self) -> str:
        """The split that results are reported on: ``test`` if there is one with labels, else ``validation``."""
        return "test" if "test" in self.splits else "validation"

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return the number of rows and a SHA-256 of each split, which tell a resumed run whether the data changed."""
        prints = {}
        for split, examples in self.splits.items():
            digest = hashlib.sha256(repr([tuple(example) for example in examples]).encode("utf-8", "surrogatepass"))
            prints[split] = {"rows": len(examples), "sha256": digest.hexdigest()}
        return prints


def available_tasks(data_dir: str | None) -> list[str]:
    """Return the names of the tasks in a data directory (None: the built-in data).

    Raises:
        DataError: ``data_dir`` is not a directory, or holds no task.
    """
    if data_dir is None:
        from .builtin import BUILTIN_TASKS

        return list(BUILTIN_TASKS)
    if data_dir == HUB_GLUE:
        return list(GLUE)
    if data_dir.startswith("hub:"):
        raise DataError(f"data_dir={data_dir!r}: the only data set taken from the Hub is {HUB_GLUE!r}")
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir={data_dir!r} is not a directory")
    found = sorted(path.parent.name for path in root.glob("*/train.jsonl"))
    if not found:
        raise DataError(f"data_dir={data_dir!r} holds no <task>/train.jsonl")
    return found


def load_tasks(
    data_dir: str | None,
    tasks: Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    specs: dict[str, TaskSpec] | None = None,
) -> dict[str, TaskData]:
    """Load tasks and check all of their rows.

    Args:
        data_dir: a directory of ``<task>/<split>.jsonl`` (and ``<task>/task.json``, if columns or labels can be read in
            two ways), ``"hub:glue"``, or None for the built-in tasks.
        tasks: names of the tasks to load; None for all.
        splits: splits to load. Only ``test`` may be absent from the data.
        specs: specifications of tasks, such as a saved run's; they take precedence over all other knowledge of a task.

    Raises:
        UnknownTask: a task is not in the data; the message names it and lists the tasks that are.
        DataError: a row cannot be used; the message names the file and the line.
    """
    there = available_tasks(data_dir)
    wanted = there if tasks is None else list(tasks)
    unknown = [task for task in wanted if task not in there]
    if unknown:
        where = "the built-in data" if data_dir is None else data_dir
        raise UnknownTask(f"unknown task {', '.join(map(repr, unknown))}; {where} has {', '.join(there)}")
    return {task: _load(data_dir, task, splits, (specs or {}).get(task)) for task in wanted}


def _load(data_dir: str | None, task: str, splits: Sequence[str], spec: TaskSpec | None) -> TaskData:
    rows = {split: found for split in splits if (found := _rows(data_dir, task, split))}
    if spec is None:
        spec = _spec_of(data_dir, task, rows.get("train") or _rows(data_dir, task, "train"))
    return TaskData(spec, {split: examples(spec, found) for split, found in rows.items()})


def _spec_of(data_dir: str | None, task: str, train: list[tuple[str, dict[str, Any]]]) -> TaskSpec:
    """Return a task's specification: the known one of its name, changed by its ``task.json``, or an inferred one."""
    if data_dir is None:
        return builtin_spec(task)
    folder = Path(data_dir) / task
    check_text(task, f"{data_dir!r}: the name {task!r} of a folder")
    given = {} if data_dir == HUB_GLUE else read_task_file(folder)
    try:
        if task in KNOWN:
            spec = dataclasses.replace(KNOWN[task], **given)
        else:
            spec = infer_spec(task, [row for _, row in train], str(folder), given)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{folder / TASK_FILE}: {error}") from error
    return dataclasses.replace(spec, rows_have_names=all(spec.holds_name(row) for _, row in train))


def examples(spec: TaskSpec, rows: list[tuple[str, dict[str, Any]]]) -> list[Example]:
    """Turn rows, each with its place, into examples. Raises DataError for the first that does not fit the task."""
    found = []
    for where, row in rows:
        label = spec.label(row, where)
        found.append(Example(spec.name, spec.source(row, where), spec.target(label), label))
    return found


def _rows(data_dir: str | None, task: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    if data_dir is None:
        from .builtin import load_builtin

        return [(f"built-in {task} {split}:{i}", row) for i, row in enumerate(load_builtin(task, split), 1)]
    if data_dir == HUB_GLUE:
        return _hub_rows(task, split)
    path = Path(data_dir) / task / f"{split}.jsonl"
    if split == "test" and not path.exists():
        return []
    if not path.is_file():
        raise DataError(f"{path} is absent")
    return read_jsonl(path)


def _hub_rows(task: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Download rows of GLUE from the dataset ``nyu-mll/glue``. Its test splits have no labels and are not used."""
    if split == "test":
        return []
    require("GLUE from the Hub", "datasets")
    from datasets import load_dataset

    name = "validation_matched" if (task, split) == ("mnli", "validation") else split
    try:
        rows = load_dataset("nyu-mll/glue", task, split=name)
    except Exception as error:  # the network and the library raise errors of many classes
        raise DataError(f"GLUE's {task} ({name}) could not be fetched from the Hub: {error}") from error
    return [(f"{HUB_GLUE} {task} {name}:{i}", dict(row)) for i, row in enumerate(rows, 1)]
