"""Train a run from end to end: load, train, evaluate and report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..data import TaskData, load_tasks
from ..model import HyperFormerModel, get_hyperformer_model
from .arguments import RunConfig
from .base import load_base
from .evaluate import evaluate_model, limited, majority, show
from .folder import (
    BEST,
    CURVES_NAME,
    HISTORY_NAME,
    METRICS_NAME,
    RUN_NAME,
    check_free,
    check_same,
    clear,
    newest_checkpoint,
    remove,
    rotate,
    sweep,
    write_json,
    write_run,
)
from .lock import RunLock
from .progress import TrainingProgress, progress_bars, say
from .report import TITLES, plot_curves
from .trainer import HyperFormerTrainer, training_arguments

T = TypeVar("T")


def train_run(
    run: RunConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Train, evaluate and report. Returns the content of metrics.json, or None on a rank other than 0.

    The run folder then has run.json, the trained weights (which ``HyperFormerModel.from_pretrained`` loads), the last
    checkpoints, history.json, metrics.json and curves.png. Nothing in it changes before the first step is trained, and
    it is locked against other trainings until this one ends.

    Args:
        run: the configuration of the run.
        resume: continue from the newest complete checkpoint in ``output_dir``, or start anew if there is none yet.
        overwrite: replace an earlier run in ``output_dir``, which stays until the new one has trained a step.
        console: where to print; None for standard output.

    Raises:
        RunError, RunConfigError, DataError, UnknownTask, CheckpointError: the run cannot start; ``output_dir`` is
            unchanged. RunError is also raised during training if ``output_dir`` was deleted and another training now
            writes to it.
        TrainingDiverged: the loss or a weight is not finite.
    """
    console = console or Console()
    run = run.located()
    ours, finished = not dist.is_initialized(), False
    try:
        arguments = training_arguments(run)
        with contextlib.ExitStack() as stack:
            results = _train_run(run, arguments, resume, overwrite, console, stack)
        finished = True
        return results
    finally:
        # A process can hang on exit while a gloo group is alive. Destroying an NCCL group can hang if other ranks have
        # failed.
        if ours and dist.is_initialized() and (finished or dist.get_backend() == "gloo"):
            dist.destroy_process_group()


def _train_run(
    run: RunConfig,
    arguments: TrainingArguments,
    resume: bool,
    overwrite: bool,
    console: Console,
    stack: contextlib.ExitStack,
) -> dict[str, Any] | None:
    folder, first = Path(run.output_dir), arguments.process_index == 0

    locks: list[RunLock] = []

    def enter() -> None:
        locks.append(stack.enter_context(RunLock(folder)))
        if not resume and not overwrite:
            check_free(folder)

    _on_first(enter, first)
    data = load_tasks(run.data_dir, run.tasks)
    if resume:
        check_same(folder, run, data)
    started_with = {name: TaskData(task.spec, dict(task.splits)) for name, task in data.items()}
    data = limited(data, run)
    set_seed(run.seed)
    t5, tokenizer = load_base(run.model)
    model = get_hyperformer_model(t5, run.hyperformer_config(list(data)))
    trainer = HyperFormerTrainer(model, run, data, tokenizer, arguments)
    trainer.remove_callback(PrinterCallback)
    checkpoint, passed = _on_first(lambda: newest_checkpoint(folder), first) if resume else (None, [])
    keeper = None
    if first:
        # Without --overwrite, a run.json was left by a run that stopped before its first checkpoint.
        clear_first = not resume and (overwrite or (folder / RUN_NAME).exists())
        keeper = _FolderKeeper(folder, run, started_with, locks[0], checkpoint, clear_first, console)
        trainer.add_callback(keeper)
        sizes = ", ".join(f"{name} ({len(task.splits['train']):,})" for name, task in data.items())
        say(console, f"{len(data)} tasks: {sizes}")
        model.print_trainable_parameters()
        for line in passed:
            say(console, f"warning: skipped an incomplete checkpoint: {line}")
        if checkpoint is not None:
            say(console, f"resuming from {checkpoint.name}")
    seconds = _train(trainer, checkpoint, console)
    trainer.accelerator.wait_for_everyone()
    if run.keep_best and (folder / BEST).is_dir():
        model.load_weights(folder / BEST)
    results = evaluate_model(model, tokenizer, data, run, None, console if first else None)
    if keeper is None:
        return None
    keeper.keep()
    model.save_pretrained(folder)
    return _report(folder, run, model, data, trainer.state.log_history, results, seconds, console)


def _on_first(act: Callable[[], T], first: bool) -> T:
    """Call ``act`` on rank 0, and return its result on every rank.

    An exception is raised on every rank too, so that none waits for rank 0.
    """
    told: list[Any] = [None, None]
    if first:
        try:
            told[0] = act()
        except Exception as error:
            told[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    result, refusal = told
    if refusal is not None:
        raise refusal
    return result


class _FolderKeeper(TrainerCallback):
    """Prepares the run folder on rank 0 once the first step is trained, and checks later that it is still the run's.

    A run that fails before its first step (a refused backend, lack of memory) therefore leaves the folder unchanged.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        data: dict[str, TaskData],
        lock: RunLock,
        checkpoint: Path | None,
        clear_first: bool,
        console: Console,
    ):
        self.folder, self.run, self.data, self.lock, self.console = folder, run, data, lock, console
        self.checkpoint, self.clear_first, self.begun = checkpoint, clear_first, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.begun or control.should_save or control.should_evaluate:
            self.keep()

    def keep(self) -> None:
        """Make sure that the run may write to its folder. Raises RunError if another training now writes to it."""
        if self.lock.renew() or (self.begun and not (self.folder / RUN_NAME).is_file()):
            lost = f"warning: {self.folder} or its {RUN_NAME} was deleted during the run"
            say(self.console, f"{lost}; it is created again, without its earlier files")
            write_run(self.folder, self.run, self.data)
        if not self.begun:
            self._begin()
            self.begun = True

    def _begin(self) -> None:
        if self.clear_first:
            clear(self.folder)
        elif self.checkpoint is None:
            # Otherwise the best weights of an earlier attempt could be mistaken for this run's.
            remove(self.folder / BEST)
        sweep(self.folder)
        rotate(self.folder, self.run.save_total_limit)
        write_run(self.folder, self.run, self.data)


def _train(trainer: HyperFormerTrainer, checkpoint: Path | None, console: Console) -> float:
    started = time.perf_counter()
    with progress_bars(console) as progress:
        trainer.add_callback(TrainingProgress(progress, console))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return time.perf_counter() - started


def _report(
    folder: Path,
    run: RunConfig,
    model: HyperFormerModel,
    data: dict[str, TaskData],
    history: list[dict[str, Any]],
    results: dict[str, Any],
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    count = model.parameter_count()
    results |= {
        "steps": run.steps,
        "train_seconds": round(seconds, 1),
        "trained_parameters": count.trained,
        "t5_parameters": count.t5_total,
        "percent_per_task": count.percent_per_task,
    }
    write_json(folder / HISTORY_NAME, history)
    write_json(folder / METRICS_NAME, results)
    show(results, console)
    baselines = {name: majority(task, "validation", run.eval_rows)["score"] for name, task in data.items()}
    written = f"weights and {METRICS_NAME}"
    try:
        plot_curves(history, baselines, folder / CURVES_NAME, TITLES[results["variant"]])
        written = f"weights, {METRICS_NAME} and {CURVES_NAME}"
    except Exception as error:  # the run is complete: a plot that fails must not fail it
        say(console, f"warning: {CURVES_NAME} could not be plotted: {type(error).__name__}: {error}")
    say(console, f"trained in {seconds:.0f} s; {written} are in {folder}")
    return results
