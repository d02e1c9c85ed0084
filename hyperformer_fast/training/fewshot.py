"""Few-shot transfer, as in the paper: train finished runs further on a few rows of a task that is new to them.

A study is a grid of cells: one for each run, number of rows and seed. Each finished cell is a file in the study's
folder, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..atomic import write_file
from ..checkpoint import DIGEST, CheckpointFile
from ..config import HyperFormerConfig
from ..data import TaskData, encode, load_tasks
from ..json_files import read_object
from ..model import HyperFormerModel
from ..task_fitting import nearest_task
from .arguments import NOT_SAVED, RunArguments
from .evaluate import load_model, weights_folder
from .fewshot_report import NAME, PLOT_NAME, TABLE_NAME, markdown, plot, summary, table
from .folder import RunError, read_run, write_json
from .lock import RunLock
from .progress import progress_bars, say
from .run import train_run
from .settle import overridden

STUDY_NAME = "study.json"
CELLS = "cells"
#: A name that nobody else gives a folder, because it is removed with all that is in it.
WORK = ".fewshot-work"

#: The trained task that the paper starts a new task of a kind from.
SOURCES: dict[str, str] = {
    **dict.fromkeys(("scitail", "superglue-cb", "cb", "snli", "sick", "superglue-rte", "rte", "trec"), "mnli"),
    **dict.fromkeys(("superglue-boolq", "boolq", "social_i_qa", "cosmos_qa", "commonsense_qa", "hellaswag"), "qnli"),
    **dict.fromkeys(("imdb", "yelp_polarity"), "sst2"),
    "paws": "qqp",
}

#: Arguments of a run that its transfer keeps. The others are of the run's own tasks and length.
_KEPT = frozenset(
    """fuse model_name_or_path tokenizer_name cache_dir model_revision text_style add_prefix max_source_length
    max_target_length val_max_target_length test_max_target_length
    learning_rate learning_rate_rule lr_scheduler_type optim optim_args adam_beta1 adam_beta2 adam_epsilon weight_decay
    max_grad_norm label_smoothing_factor loss_reduction
    per_device_train_batch_size per_device_eval_batch_size bf16 fp16 tf32 use_cpu dataloader_num_workers
    generation_max_length generation_num_beams generation_config""".split()
)

#: Arguments that the study itself decides.
_DECIDED = frozenset("tasks eval_tasks init_from output_dir max_train_samples seed data_seed single_task".split())

#: Fields of the model, which a transfer cannot change.
_OF_THE_METHOD = frozenset(field.name for field in dataclasses.fields(HyperFormerConfig))

_MAX_STEPS = 200
_FIRST_SEED = 42


@dataclasses.dataclass
class _Run:
    """A trained run that is to be transferred."""

    folder: Path
    label: str
    config: HyperFormerConfig
    arguments: RunArguments
    flat: dict[str, Any]
    model: HyperFormerModel | None = None  #: loaded when it is first needed
    tokenizer: PreTrainedTokenizerBase | None = None


def fewshot_run(
    run_dirs: Sequence[str | Path] | str | Path,
    task: str,
    *,
    samples: Sequence[int] = (4, 16, 32, 100),
    seeds: int = 5,
    init_from: str = "auto",
    train: str = "all",
    data_dir: str | None = None,
    task_file: str | None = None,
    output_dir: str | Path = "fewshot-output",
    model: str | None = None,
    console: Console | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Transfer runs to a new task with few rows, and report mean and deviation over seeds.

    For each run, number of rows and seed: the first rows of a permutation that ``data_seed`` draws, as in the authors'
    code, are trained with a new optimizer from the run's weights, and the task's test split (or its validation, if
    there is no test split) is evaluated. Seed number i is 42 + i, for the rows and for the training. ``output_dir``
    then has ``fewshot.json``, ``fewshot.md`` and ``fewshot.png``. Finished cells of an earlier start are kept; more
    runs, numbers of rows and seeds may be added to them.

    Args:
        run_dirs: folders of trained runs. The method is each run's own.
        task: the new task, which none of the runs has.
        samples: numbers of rows.
        seeds: how many seeds.
        init_from: the trained task whose embedding (or adapters) the new task starts from. ``"auto"``: the one that the
            paper takes for a task of this kind (``SOURCES``) if the run has it, else the one with the lowest loss on
            the very rows that are trained.
        train: ``"all"`` that the run trained, or the task ``"embedding"`` alone.
        data_dir, task_file: where the new task's data is; None for where the run's data is.
        output_dir: the study's folder.
        model: where the runs' T5 is now; None for where it was when they were trained.
        console: where to print; None for standard output.
        training: other arguments of a run, such as ``max_steps`` (200 by default) or ``learning_rate``, in place of
            those of the runs.

    Raises:
        RunError, RunConfigError, DataError, UnknownTask, CheckpointError: the study cannot start; nothing was written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("few-shot transfer runs in one process: start it without torchrun")
    console, folder = console or Console(), Path(output_dir)
    _check_grid(samples, seeds, train, training)
    runs = _read_runs([run_dirs] if isinstance(run_dirs, (str, Path)) else run_dirs, task, init_from, train)
    study = _Study(folder, task, init_from, train, data_dir, task_file, model, training, console)
    for run in runs:
        study.check(run, max(samples))
    with RunLock(folder):
        study.begin(runs)
        cells = [(run, rows, seed) for rows in samples for seed in range(seeds) for run in runs]
        with progress_bars(console) as progress:
            bar = progress.add_task(f"few-shot {task}", total=len(cells), note="")
            for run, rows, seed in cells:
                study.cell(run, rows, seed)
                progress.advance(bar)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        results = study.results(runs, samples, seeds)
        _write(folder, results, console)
    return results


def _check_grid(samples: Sequence[int], seeds: int, train: str, training: Mapping[str, Any]) -> None:
    wrong = [rows for rows in samples if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1]
    if wrong or not samples or len(set(samples)) < len(samples):
        raise RunError(f"samples must be different numbers of rows, each at least 1, got {list(samples)}")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise RunError(f"seeds must be at least 1, got {seeds!r}")
    if train not in ("all", "embedding"):
        raise RunError(f"train must be all or embedding, got {train!r}")
    for name in training:
        if name in _DECIDED:
            raise RunError(f"{name} is decided by the study itself: leave it out")
        if name in _OF_THE_METHOD:
            raise RunError(f"{name} is each run's own and cannot be changed: leave it out")


def _read_runs(folders: Sequence[str | Path], task: str, init_from: str, train: str) -> list[_Run]:
    if not folders:
        raise RunError("give at least one folder of a trained run")
    runs: list[_Run] = []
    for folder in map(Path, folders):
        arguments, _, content = read_run(folder)
        config = HyperFormerConfig.load(weights_folder(folder, Console(quiet=True)))
        if task in config.tasks:
            raise RunError(
                f"{folder} was trained on {task!r} already: few-shot transfer needs a task that is new to it"
            )
        if init_from != "auto" and init_from not in config.tasks:
            raise RunError(f"init_from={init_from!r} is not a task of {folder}, which has {', '.join(config.tasks)}")
        if train == "embedding" and not config.has_hypernetworks:
            raise RunError(
                f"train=embedding needs task embeddings, which variant {config.variant!r} of {folder} does not have: "
                "leave this run out, or use train=all"
            )
        assert config.variant is not None  # None only before a configuration is validated
        runs.append(_Run(folder, config.variant, config, arguments, content["arguments"]))
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({run.folder.name})"
    if len({run.label for run in runs}) < len(runs):
        raise RunError(f"runs must differ in variant or folder name, got {', '.join(run.label for run in runs)}")
    return runs


class _Study:
    """The cells of one study, and where they are kept."""

    def __init__(
        self,
        folder: Path,
        task: str,
        init_from: str,
        train: str,
        data_dir: str | None,
        task_file: str | None,
        model: str | None,
        training: Mapping[str, Any],
        console: Console,
    ):
        self.folder, self.task, self.init_from, self.train = folder, task, init_from, train
        self.data_dir, self.task_file, self.model = data_dir, task_file, model
        self.training, self.console = overridden({"max_steps": _MAX_STEPS}, training), console
        #: What the study's files have of them.
        self.told = {name: value for name, value in self.training.items() if name not in NOT_SAVED}
        self.data_prints: dict[str, Any] = {}

    def check(self, run: _Run, most: int) -> None:
        """Raise where an argument is wrong, or the new task cannot be read for ``run`` or has too few rows."""
        self._arguments(run, most, _FIRST_SEED, run.folder)
        data = self._data(run, None, _FIRST_SEED)
        self.data_prints[run.label] = data.fingerprint()
        rows = len(data.splits["train"])
        if rows < most:
            raise RunError(f"samples has {most}, but task {self.task!r} has {rows} training rows only")

    def begin(self, runs: Sequence[_Run]) -> None:
        """Write down what the study is. Raises RunError if the folder holds another one."""
        path = self.folder / STUDY_NAME
        now: dict[str, Any] = {
            "task": self.task,
            "init_from": self.init_from,
            "train": self.train,
            "training": self.told,
            "runs": {run.label: _weights_print(run.folder) for run in runs},
            # For each run, because a prefix or a text style is part of the sources.
            "data": self.data_prints,
        }
        if path.exists():
            before = read_object(path)
            runs_before = before.pop("runs", {})
            known = {label: runs_before.get(label, weights) for label, weights in now["runs"].items()}
            data_before = before.pop("data", {})
            settings = {name: value for name, value in now.items() if name not in ("runs", "data")}
            differs = [name for name, value in settings.items() if before.get(name) != value]
            if any(data_before.get(label, content) != content for label, content in now["data"].items()):
                differs.append("data")
            differs += [f"the weights of {label}" for label in known if known[label] != now["runs"][label]]
            if differs:
                raise RunError(
                    f"{self.folder} holds another study ({' and '.join(differs)} differ): choose another --output_dir"
                )
            now["runs"], now["data"] = {**runs_before, **now["runs"]}, {**data_before, **now["data"]}
        shutil.rmtree(self.folder / WORK, ignore_errors=True)  # what a stopped study left
        write_json(path, now)

    def _cell_file(self, run: _Run, rows: int, seed: int) -> Path:
        return self.folder / CELLS / run.label / f"{rows}-{seed}.json"

    def cell(self, run: _Run, rows: int, seed: int) -> None:
        """Train and evaluate one cell, unless that is done already."""
        file = self._cell_file(run, rows, seed)
        if file.exists():
            return
        source, why = self._source(run, rows, _FIRST_SEED + seed)
        arguments = self._arguments(run, rows, _FIRST_SEED + seed, self._start(run, source))
        results = train_run(arguments, console=Console(quiet=True))
        assert results is not None  # None only on other ranks
        of_task = results["tasks"][self.task]
        content = {
            "score": of_task["metrics"]["score"],
            "metrics": of_task["metrics"],
            "majority": of_task["majority"],
            "split": of_task["split"],
            "rows": of_task["rows"],
            "init_from": source,
            "chosen_by": why,
            "trained_parameters": results["trained_parameters"],
            "seconds": results["train_seconds"],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
        shutil.rmtree(self.folder / WORK / "run", ignore_errors=True)
        begun = "" if source is None else f", from {source}"
        say(self.console, f"{run.label}, {rows} rows, seed {seed}: {content['score']:.1f}{begun}")

    def _data_arguments(self, run: _Run) -> dict[str, Any]:
        here = run.arguments.data
        return {
            "data_dir": here.data_dir if self.data_dir is None else self.data_dir,
            "task_file": here.task_file if self.task_file is None else self.task_file,
        }

    def _data(self, run: _Run, rows: int | None, seed: int) -> TaskData:
        """The rows of a cell, by the arguments of its training; None for all rows."""
        of_cell = self._arguments(run, rows or 1, seed, run.folder)
        return load_tasks(
            dataclasses.replace(of_cell.data, max_train_samples=rows),
            [self.task],
            selecting=of_cell.selects,
            cache_dir=of_cell.model.cache_dir,
            console=self.console,
        )[self.task]

    def _arguments(self, run: _Run, rows: int, seed: int, start: Path) -> RunArguments:
        """The arguments of one cell's training."""
        flat = {name: value for name, value in run.flat.items() if name in _KEPT}
        # What the run's variant decides would otherwise be decided anew, without that variant.
        flat["add_prefix"] = run.arguments.adds_prefix
        flat |= overridden({"eval_strategy": "no", "save_strategy": "no", "warmup_steps": 0}, self.training)
        size = flat.get("per_device_train_batch_size", run.arguments.training.per_device_train_batch_size)
        flat |= self._data_arguments(run) | {
            "per_device_train_batch_size": min(size, rows),
            "init_from": str(start),
            "tasks": [self.task],
            "max_train_samples": rows,
            "data_seed": seed,
            "seed": seed,
            "output_dir": str(self.folder / WORK / "run"),
        }
        if self.model is not None:
            flat["model_name_or_path"] = self.model
        return RunArguments.from_dict({name: value for name, value in flat.items() if value is not None})

    def _loaded(self, run: _Run) -> tuple[HyperFormerModel, PreTrainedTokenizerBase]:
        if run.model is None or run.tokenizer is None:
            run.model, run.tokenizer = load_model(run.folder, run.arguments, self.model, Console(quiet=True))
        return run.model, run.tokenizer

    def _start(self, run: _Run, source: str | None) -> Path:
        """Return the folder with the weights that a cell starts from: the run's, with the new task."""
        folder = self.folder / WORK / "starts" / run.label / (source or "none").replace(os.sep, "_")
        if not folder.exists():
            model, _ = load_model(run.folder, run.arguments, self.model, Console(quiet=True))
            model.add_task(self.task, source)
            if self.train == "embedding":
                model.train_only_task_embeddings()
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            partial.rename(folder)
        return folder

    def _source(self, run: _Run, rows: int, seed: int) -> tuple[str | None, str]:
        """Return the task that the new one starts from, and what chose it."""
        if run.config.variant == "finetuning":
            return None, "the whole T5 is the task's"
        if self.init_from != "auto":
            return self.init_from, "asked for"
        named = SOURCES.get(self.task)
        if named in run.config.tasks:
            return named, "the paper's choice"
        if len(run.config.tasks) == 1:
            return run.config.tasks[0], "the only task"
        model, tokenizer = self._loaded(run)
        of_cell = self._arguments(run, rows, seed, run.folder).data
        lengths = of_cell.max_source_length, of_cell.max_target_length
        examples = encode(self._data(run, rows, seed), "train", tokenizer, *lengths)
        return nearest_task(model, examples)[0].task, "lowest loss on the rows"

    def results(self, runs: Sequence[_Run], samples: Sequence[int], seeds: int) -> dict[str, Any]:
        """Return the content of fewshot.json."""
        cells = {
            run.label: {
                str(rows): [read_object(self._cell_file(run, rows, seed)) for seed in range(seeds)] for rows in samples
            }
            for run in runs
        }
        scored = {cell["rows"] for of_run in cells.values() for grid in of_run.values() for cell in grid}
        if len(scored) > 1:
            raise RunError(
                f"{self.folder} has cells that were scored on {' and '.join(map(str, sorted(scored)))} rows, which "
                "cannot be compared: choose another --output_dir"
            )
        methods = {
            run.label: {
                "run": str(run.folder),
                "variant": run.config.variant,
                "cells": {rows: summary(of_seeds) for rows, of_seeds in cells[run.label].items()},
            }
            for run in runs
        }
        what = {"task": self.task, "train": self.train, "init_from": self.init_from, "training": self.told}
        return {**what, "samples": list(samples), "seeds": seeds, "methods": methods}


def _weights_print(run: Path) -> str:
    """Return a digest of a run's weights, by which a run that was trained anew is seen."""
    return str(CheckpointFile(weights_folder(run, Console(quiet=True))).description.get(DIGEST))


def _write(folder: Path, results: Mapping[str, Any], console: Console) -> None:
    write_json(folder / NAME, results)
    with write_file(folder / TABLE_NAME) as partial:
        Path(partial).write_text(markdown(results), encoding="utf-8")
    console.print(table(results))
    written = f"{NAME} and {TABLE_NAME}"
    try:
        plot(results, folder / PLOT_NAME)
        written = f"{NAME}, {TABLE_NAME} and {PLOT_NAME}"
    except Exception as error:  # the study is complete: a plot that fails must not fail it
        say(console, f"warning: {PLOT_NAME} could not be plotted: {type(error).__name__}: {error}")
    say(console, f"{written} are in {folder}")
