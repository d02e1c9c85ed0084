"""The run folder: its files, which of its checkpoints are complete, and how they are removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..atomic import recover_directory, sweep_leftovers, write_file
from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME
from ..data import TaskData, TaskSpec
from ..json_files import parse
from .arguments import MAY_CHANGE, RunConfig

RUN_NAME = "run.json"
HISTORY_NAME = "history.json"
METRICS_NAME = "metrics.json"
CURVES_NAME = "curves.png"
EVALUATION_NAME = "evaluation.json"
BEST = "best"
STAGING = ".saving"

FORMAT_VERSION = 1

#: Files that a checkpoint must have. Without one of them a resumed run would silently train something else.
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", WEIGHTS_NAME)

_FILES = (RUN_NAME, WEIGHTS_NAME, CONFIG_NAME, METRICS_NAME, HISTORY_NAME, CURVES_NAME, EVALUATION_NAME)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunError(ValueError):
    """A run cannot be started, resumed or read; the message says what to do."""


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically."""
    with write_file(path) as partial:
        Path(partial).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. A checkpoint that is being written has another name."""
    return [path for path in _numbered(Path(folder)) if not missing_files(path)]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint or None, and for each newer one what it lacks."""
    passed: list[str] = []
    for path in reversed(_numbered(folder)):
        missing = missing_files(path)
        if not missing:
            return path, passed
        passed.append(f"{path.name} lacks {' and '.join(missing)}")
    return None, passed


def missing_files(checkpoint: Path) -> list[str]:
    """Return the names of the files that resuming needs and the checkpoint lacks."""
    missing = [name for name in NEEDED if not (checkpoint / name).is_file()]
    return missing if rng_files(checkpoint) else [*missing, "rng_state*.pth"]


def rng_files(checkpoint: Path) -> set[str]:
    """Return the names of the checkpoint's files with RNG states; each process has one."""
    return {path.name for path in checkpoint.glob("rng_state*.pth")}


def _numbered(folder: Path) -> list[Path]:
    """Return every directory that is named like a checkpoint, in the order of their steps."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if path.is_dir()]


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, which is renamed first so that a kill leaves no incomplete checkpoint under its name.

    If it is a symbolic link, only the link is removed, because its target does not belong to the run.
    """
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}.old")
    remove(doomed)
    os.rename(path, doomed)
    remove(doomed)


def rotate(folder: Path, limit: int) -> None:
    """Delete all but the newest ``limit`` checkpoints."""
    for old in checkpoints(folder)[:-limit]:
        remove_checkpoint(old)


def remove(path: Path) -> None:
    """Delete a file, a directory with its contents, or a symbolic link (but not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Raise RunError if the folder holds a run."""
    if holds_run(folder):
        raise RunError(
            f"{folder} holds another run: continue it (--resume), replace it (--overwrite), or choose another "
            "--output-dir"
        )


def holds_run(folder: Path) -> bool:
    """Return whether the folder has weights of a run. A ``run.json`` alone does not count: nothing would be lost."""
    return (folder / WEIGHTS_NAME).exists() or (folder / BEST).exists() or any(folder.glob("checkpoint-*"))


def clear(folder: Path) -> None:
    """Remove all files of a run, so that none is mistaken for the next run's. Other files in the folder stay."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    remove(folder / BEST)
    for path in folder.glob("checkpoint-*"):
        if _CHECKPOINT.fullmatch(path.name):
            remove_checkpoint(path)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted. Only the process that trains there may call this."""
    for aside in folder.glob(".checkpoint-*.previous"):
        recover_directory(aside.with_name(aside.name[1 : -len(".previous")]))
    leftovers = [folder / STAGING, *folder.glob(".checkpoint-*.previous")]
    # Earlier versions of this library leave the probe file ".writable-PID" if they are killed.
    leftovers += [*folder.glob(".checkpoint-*.old"), *folder.glob(".writable-[0-9]*")]
    for path in leftovers:
        remove(path)
    for place in (folder, folder / BEST):
        sweep_leftovers(place)


def write_run(folder: Path, run: RunConfig, data: dict[str, TaskData]) -> None:
    """Write ``run.json``: the arguments, the tasks' specifications, the data's fingerprints and library versions."""
    content = {
        "format_version": FORMAT_VERSION,
        "arguments": {**run.to_dict(), "tasks": list(data)},
        "tasks": {name: task.spec.to_dict() for name, task in data.items()},
        "data": {name: task.fingerprint() for name, task in data.items()},
        "versions": {"hyperformer_fast": __version__, **_versions("torch", "transformers")},
    }
    write_json(folder / RUN_NAME, content)


def read_run(folder: str | Path) -> tuple[RunConfig, dict[str, TaskSpec], dict[str, Any]]:
    """Read (arguments, specifications, data fingerprints) from ``run.json``.

    Raises:
        RunError: the file is absent or cannot be read, or its content is not a run's.
    """
    path = Path(folder) / RUN_NAME
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder} is not the folder of a run: it has no {RUN_NAME}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    try:
        if content["format_version"] != FORMAT_VERSION:
            raise RunError(
                f"{path} has format version {content['format_version']}; this library reads {FORMAT_VERSION}"
            )
        specs = {name: TaskSpec.from_dict(fields) for name, fields in content["tasks"].items()}
        return RunConfig.from_dict(content["arguments"]), specs, content["data"]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} does not describe a run: {error!r}") from error


def check_same(folder: Path, run: RunConfig, data: dict[str, TaskData]) -> None:
    """Raise RunError if ``run`` on ``data`` would train something else than the run in ``folder``."""
    before, _, prints = read_run(folder)
    theirs, ours = before.to_dict(), {**run.to_dict(), "tasks": list(data)}
    for name in ours:
        if name not in MAY_CHANGE and theirs[name] != ours[name]:
            raise RunError(f"cannot resume {folder}: {name} was {theirs[name]!r} and is now {ours[name]!r}")
    for name, task in data.items():
        train = task.fingerprint()["train"]
        if prints.get(name, {}).get("train") != train:
            raise RunError(f"cannot resume {folder}: the training rows of {name!r} have changed since it started")


def _versions(*names: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
