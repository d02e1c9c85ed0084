"""Run `hyperformer-fast` many times, each in a process of its own with one thread, and nothing that is finished again.

A run is its whole configuration. Beside its folder lies the JSON that it was started with (``<folder>.json``), and it
is repeated only if that differs.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timing import machine

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
#: What `hyperformer-fast train` says at its end where the loss or a weight was not finite.
DIVERGED = "training stopped; earlier checkpoints are intact"

Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")


class Diverged(RuntimeError):
    """A training ended because its loss or a weight was not finite."""


class _NotBegun(Exception):
    """A call was not begun, because another had failed."""


def command(*arguments: str | Path, log: Path) -> None:
    """Run `hyperformer-fast` in a process of its own with one thread.

    Raises:
        Diverged, RuntimeError: it failed. The message has the end of its log.
    """
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as written:
        done = subprocess.run(
            [sys.executable, "-m", "hyperformer_fast", *map(str, arguments)],
            env=os.environ | ONE_THREAD | {"PYTHONPATH": paths},
            stdout=written,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        end = log.read_text()[-2000:]
        # the command breaks its message at spaces
        kind = Diverged if DIVERGED in " ".join(end.split()) else RuntimeError
        raise kind(f"hyperformer-fast {arguments[0]} failed; the end of {log}:\n{end}")


def beside(folder: Path, ending: str) -> Path:
    """The file of a run that lies beside its folder: ``<folder>.json`` and the like."""
    return folder.with_name(folder.name + ending)


def train(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Train one run, unless it is finished; return the content of its metrics.json.

    Raises:
        Diverged: it diverged, now or when it was trained.
        RuntimeError: it failed otherwise.
    """
    said, metrics, diverged = beside(folder, ".json"), folder / "metrics.json", beside(folder, ".diverged")
    wanted = json.dumps({**config, "output_dir": str(folder)}, indent=1)
    same = said.exists() and said.read_text() == wanted
    if same and diverged.exists():
        raise Diverged(diverged.read_text())
    if not same or not metrics.exists():
        said.parent.mkdir(parents=True, exist_ok=True)
        for stale in (metrics, diverged, beside(folder, ".validation.json")):
            stale.unlink(missing_ok=True)
        said.write_text(wanted)
        try:
            command("train", said, "--overwrite_output_dir", "true", log=beside(folder, ".log"))
        except Diverged as error:
            diverged.write_text(str(error))
            raise
    return json.loads(metrics.read_text())


def on_validation(folder: Path) -> dict[str, Any]:
    """Evaluate a finished run on its validation rows, unless that is done; return the same content as metrics.json.

    What an earlier version of the command found without the losses of tasks is found again.
    """
    kept = beside(folder, ".validation.json")
    if not kept.exists() or any("loss" not in task for task in json.loads(kept.read_text())["tasks"].values()):
        command("evaluate", folder, "--split", "validation", log=beside(folder, ".validation.log"))
        (folder / "evaluation.json").rename(kept)
    return json.loads(kept.read_text())


def in_parallel(
    title: str, calls: Mapping[Key, Callable[[], Found]], jobs: int, say: Callable[[Key, Found], str]
) -> dict[Key, Found]:
    """Call all of ``calls``, ``jobs`` at a time, under a progress bar; return what each returned, in their order.

    The first error ends it once the calls that have begun are done: those that wait are not begun.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    found: dict[Key, Found] = {}
    ending = threading.Event()

    def begin(call: Callable[[], Found]) -> Found:
        if ending.is_set():
            raise _NotBegun
        try:
            return call()
        except BaseException:
            ending.set()
            raise

    with (
        Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as progress,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        bar = progress.add_task(title, total=len(calls))
        started = {pool.submit(begin, call): key for key, call in calls.items()}
        try:
            for job in concurrent.futures.as_completed(started):
                if isinstance(job.exception(), _NotBegun):
                    continue
                key = started[job]
                found[key] = job.result()
                progress.advance(bar)
                progress.console.print(say(key, found[key]), markup=False, highlight=False)
        finally:
            ending.set()  # also where the user interrupts
    return {key: found[key] for key in calls}


def said(key: object, result: Mapping[str, Any]) -> str:
    """The line that is printed when a run is finished."""
    return f"{key}: {result['average_metrics']:.1f} on average, trained in {result['train_seconds']:.0f} s"


def train_all(
    runs: Mapping[Key, tuple[Path, Mapping[str, Any]]], jobs: int, title: str = "training"
) -> dict[Key, dict[str, Any]]:
    """Train runs; return the content of each one's metrics.json."""
    calls = {key: (lambda run=run: train(*run)) for key, run in runs.items()}
    return in_parallel(title, calls, jobs, said)


def where_runs_ran() -> dict[str, str]:
    """The machine, as the results name it."""
    return machine() | {"threads": "1"}
