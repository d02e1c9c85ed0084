"""The folder of a run: what lies in it, who may write to it, and which of its checkpoints are whole."""

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

#: A checkpoint without one of these would resume as something else, silently.
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", WEIGHTS_NAME)

_FILES = (RUN_NAME, WEIGHTS_NAME, CONFIG_NAME, METRICS_NAME, HISTORY_NAME, CURVES_NAME, EVALUATION_NAME)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunError(ValueError):
    """A run that cannot be started, resumed or read; the message says what to do."""


def write_json(path: str | Path, content: Any) -> None:
    """As a whole file, or not at all."""
    with write_file(path) as partial:
        Path(partial).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. One that is being written has another name."""
    return [path for path in _numbered(Path(folder)) if not missing_files(path)]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """(The newest complete checkpoint or None, why each newer one was passed over.)"""
    passed: list[str] = []
    for path in reversed(_numbered(folder)):
        missing = missing_files(path)
        if not missing:
            return path, passed
        passed.append(f"{path.name} lacks {' and '.join(missing)}")
    return None, passed


def missing_files(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks of the files that resuming needs."""
    missing = [name for name in NEEDED if not (checkpoint / name).is_file()]
    return missing if rng_files(checkpoint) else [*missing, "rng_state*.pth"]


def rng_files(checkpoint: Path) -> set[str]:
    """The names of the files with RNG states, one for each process."""
    return {path.name for path in checkpoint.glob("rng_state*.pth")}


def _numbered(folder: Path) -> list[Path]:
    """Every directory with a checkpoint's name, by number."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if path.is_dir()]


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a kill leaves nothing half-deleted under the name of a whole one.

    Of a symbolic link only the link goes: what it leads to is not the run's.
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
    """Delete a file, a directory with all it holds, or a symbolic link (not what it leads to); absent ones are fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """RunError where the folder holds a run."""
    if holds_run(folder):
        raise RunError(
            f"{folder} holds another run: go on with it (--resume), replace it (--overwrite), or choose another "
            "--output-dir"
        )


def holds_run(folder: Path) -> bool:
    """Whether weights of a run, finished or not, lie there. A ``run.json`` alone is nothing that could be lost."""
    return (folder / WEIGHTS_NAME).exists() or (folder / BEST).exists() or any(folder.glob("checkpoint-*"))


def clear(folder: Path) -> None:
    """Remove a run, lest a part of it be taken for one of the next; files that are not a run's stay."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    remove(folder / BEST)
    for path in folder.glob("checkpoint-*"):
        if _CHECKPOINT.fullmatch(path.name):
            remove_checkpoint(path)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted. Only for the process that trains there."""
    for aside in folder.glob(".checkpoint-*.previous"):
        recover_directory(aside.with_name(aside.name[1 : -len(".previous")]))
    leftovers = [folder / STAGING, *folder.glob(".checkpoint-*.previous")]
    # ".writable-PID" is the probe of an earlier version, killed before it was removed.
    leftovers += [*folder.glob(".checkpoint-*.old"), *folder.glob(".writable-[0-9]*")]
    for path in leftovers:
        remove(path)
    for place in (folder, folder / BEST):
        sweep_leftovers(place)


def write_run(folder: Path, run: RunConfig, data: dict[str, TaskData]) -> None:
    """Write ``run.json``: the arguments, the tasks' specs, rows and hashes of the data, versions."""
    content = {
        "format_version": FORMAT_VERSION,
        "arguments": {**run.to_dict(), "tasks": list(data)},
        "tasks": {name: task.spec.to_dict() for name, task in data.items()},
        "data": {name: task.fingerprint() for name, task in data.items()},
        "versions": {"hyperformer_fast": __version__, **_versions("torch", "transformers")},
    }
    write_json(folder / RUN_NAME, content)


def read_run(folder: str | Path) -> tuple[RunConfig, dict[str, TaskSpec], dict[str, Any]]:
    """(arguments, specs, data fingerprints) of ``run.json``. RunError where it is absent or not a run's."""
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
        raise RunError(f"{path} is not a run's: {error!r}") from error


def check_same(folder: Path, run: RunConfig, data: dict[str, TaskData]) -> None:
    """RunError where ``run`` on ``data`` would train something else than the run in ``folder`` does."""
    before, _, prints = read_run(folder)
    theirs, ours = before.to_dict(), {**run.to_dict(), "tasks": list(data)}
    for name in ours:
        if name not in MAY_CHANGE and theirs[name] != ours[name]:
            raise RunError(f"cannot resume {folder}: {name} was {theirs[name]!r}, and is {ours[name]!r} now")
    for name, task in data.items():
        train = task.fingerprint()["train"]
        if prints.get(name, {}).get("train") != train:
            raise RunError(f"cannot resume {folder}: the training rows of {name!r} are not those it started with")


def _versions(*names: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
