"""Where the rows of a task are: built in, in files, in a folder, or in a data set of the Hub."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .builtin import load_builtin
from .cache import Cache
from .formats import SUFFIXES, Rows, rows_of_dataset, rows_of_file, saved_dataset, split_file
from .task_file import read_task_file
from .tasks import SPLITS, DataError, TaskSpec, check_text

GLUE_REPOSITORY = "nyu-mll/glue"


class Place:
    """Where the rows of a task are."""

    name: str

    def rows(self, split: str) -> Rows | None:
        """Return the rows of a split, or None if there is no such split."""
        raise NotImplementedError

    def absent(self, split: str) -> str:
        return f"{self.name} has no split {split!r}"

    def given(self) -> dict[str, Any]:
        """Return the fields that the task's ``task.json`` gives."""
        return {}


class BuiltIn(Place):
    def __init__(self, task: str):
        self.task, self.name = task, f"built-in {task}"

    def rows(self, split: str) -> Rows:
        name = f"{self.name} {split}"
        read = lambda columns: ((f"{name}:{i}", row) for i, row in enumerate(load_builtin(self.task, split), 1))  # noqa: E731
        return Rows(name, name, read)


class Files(Place):
    def __init__(self, task: str, files: Mapping[str, str], cache: Cache):
        self.name, self.files, self.cache = f"task {task!r}", files, cache

    def rows(self, split: str) -> Rows | None:
        if split not in self.files:
            return None
        path = Path(self.files[split])
        if not path.is_file():
            raise DataError(f"{self.name}: {split}_file {str(path)!r} is absent")
        return rows_of_file(path, self.cache.folder)

    def absent(self, split: str) -> str:
        return f"{self.name} has no {split}_file"


class Folder(Place):
    """``<data_dir>/<task>``: a file for each split, or what ``save_to_disk`` wrote."""

    def __init__(self, folder: Path, entry: TaskSpec | None = None, cache: Cache | None = None):
        self.folder, self.name, self.cache = folder, str(folder), cache or Cache()
        self.mapping = entry.splits if entry is not None else {}

    def has_train(self) -> bool:
        inner = ("train/state.json", "train/dataset_info.json", "dataset_dict.json")
        if split_file(self.folder, "train") is not None or any((self.folder / name).is_file() for name in inner):
            return True
        return "train_file" in self.given()

    def rows(self, split: str) -> Rows | None:
        own = {name: path for name in SPLITS if (path := self.given().get(f"{name}_file")) is not None}
        if own:
            return Files(self.folder.name, own, self.cache).rows(split)
        for name in self.names(split):
            path = split_file(self.folder, name)
            if path is not None:
                return rows_of_file(path, self.cache.folder)
            saved = saved_dataset(self.folder / name)
            if saved is not None:
                return rows_of_dataset(saved, str(self.folder / name))
        return None

    def names(self, split: str) -> list[str]:
        """The names that the split may have: its own, then that of the Hub's split which the entry says that it is."""
        mapped = self.mapping.get(split)
        of_validation = self.mapping.get("validation")
        names = [split] if split == "train" or mapped is None else [split, mapped]
        if split == "test":
            # A test split that is the validation split under another name is none.
            has_own = self._has("validation")
            taken = {"validation"} | (set() if has_own or of_validation is None else {of_validation})
            names = [name for name in names if name not in taken]
        return names

    def _has(self, name: str) -> bool:
        return split_file(self.folder, name) is not None or (self.folder / name / "state.json").is_file()

    def absent(self, split: str) -> str:
        return f"{self.folder / split}.jsonl is absent (or {', '.join(SUFFIXES[1:])})"

    @functools.cache  # noqa: B019 (a place lives as long as its task is loaded)
    def given(self) -> dict[str, Any]:
        check_text(self.folder.name, f"{str(self.folder.parent)!r}: the name {self.folder.name!r} of a folder")
        return read_task_file(self.folder)


class Hub(Place):
    """A data set of the Hub, or whatever else ``datasets.load_dataset`` finds under its name."""

    def __init__(self, entry: TaskSpec | None, repository: str, configuration: str | None, cache: Cache):
        self.repository, self.configuration, self.cache = repository, configuration, cache
        self.name = f"{repository} {configuration}" if configuration else repository
        default = {"train": "train", "validation": "validation", "test": "test"}
        if repository == GLUE_REPOSITORY:
            default = {"train": "train", "validation": "validation"}
            if configuration == "mnli":
                default |= {"validation": "validation_mismatched", "test": "validation_matched"}
        self.mapping = dict((entry.splits if entry is not None else None) or default)
        if self.mapping.get("test") == self.mapping.get("validation"):
            self.mapping.pop("test", None)
        self.found: Any = None

    def rows(self, split: str) -> Rows | None:
        there = self.mapping.get(split)
        if there is None:
            return None
        if self.found is None:
            self.found = self.fetched()
        return rows_of_dataset(self.found[there], f"{self.name} {there}") if there in self.found else None

    def fetched(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.repository, self.configuration, cache_dir=self.cache.folder)
        except Exception as error:  # the network and the library raise errors of many classes
            raise DataError(f"{self.name} could not be fetched from the Hub: {error}") from error

    def absent(self, split: str) -> str:
        return (
            f"{self.name} has no split {self.mapping.get(split, split)!r}, only {', '.join(self.found or ())}; say "
            f"which of them is {split!r} in the field 'splits' of the task's entry"
        )
