"""A run from end to end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, set_seed

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
    check_free,
    check_same,
    check_writable,
    checkpoints,
    clear,
    sweep,
    write_json,
    write_run,
)
from .progress import TrainingProgress, progress_bars
from .report import TITLES, plot_curves
from .trainer import HyperFormerTrainer


def train_run(
    run: RunConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Train, evaluate and report; returns what metrics.json holds (None on a rank that is not the first).

    The folder of the run then has run.json, the trained weights (as ``HyperFormerModel.from_pretrained`` reads them),
    the last checkpoints, history.json, metrics.json and curves.png.

    Args:
        run: everything the run depends on.
        resume: go on from the newest complete checkpoint of ``output_dir``, or from the start where there is none yet.
        overwrite: an earlier run in ``output_dir`` may be replaced. It is left alone until the new one is known to
            start.

    Raises:
        RunError, DataError, UnknownTask, CheckpointError: before anything is changed in ``output_dir``.
        TrainingDiverged: the loss or a weight is not finite.
    """
    console = console or Console()
    run = run.located()
    folder = Path(run.output_dir)
    first = int(os.environ.get("RANK", "0")) == 0
    if first and not resume and not overwrite:
        check_free(folder)
    data = load_tasks(run.data_dir, run.tasks)
    if resume:
        check_same(folder, run, data)
    started_with = {name: TaskData(task.spec, dict(task.splits)) for name, task in data.items()}
    data = limited(data, run)
    set_seed(run.seed)
    t5, tokenizer = load_base(run.model)
    model = get_hyperformer_model(t5, run.hyperformer_config(list(data)))
    if first:
        check_writable(folder)
    trainer = HyperFormerTrainer(model, run, data, tokenizer)
    trainer.remove_callback(PrinterCallback)
    if first:
        if overwrite and not resume:
            clear(folder)
        sweep(folder)
        write_run(folder, run, started_with)
        sizes = ", ".join(f"{name} ({len(task.splits['train']):,})" for name, task in data.items())
        console.print(f"{len(data)} tasks: {sizes}", soft_wrap=True)
        model.print_trainable_parameters()
    seconds = _train(trainer, checkpoints(folder) if resume else [], console)
    trainer.accelerator.wait_for_everyone()
    if run.keep_best and (folder / BEST).is_dir():
        model.load_weights(folder / BEST)
    results = evaluate_model(model, tokenizer, data, run, None, console if first else None)
    if not first:
        return None
    model.save_pretrained(folder)
    return _report(folder, run, model, data, trainer.state.log_history, results, seconds, console)


def _train(trainer: HyperFormerTrainer, whole: list[Path], console: Console) -> float:
    started = time.perf_counter()
    if whole:
        console.print(f"going on from {whole[-1].name}")
    with progress_bars(console) as progress:
        trainer.add_callback(TrainingProgress(progress, console))
        trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
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
    baselines = {name: majority(task, "validation", run.eval_rows)["score"] for name, task in data.items()}
    plot_curves(history, baselines, folder / CURVES_NAME, TITLES[results["variant"]])
    show(results, console)
    console.print(
        f"trained in {seconds:.0f} s; weights, {METRICS_NAME} and {CURVES_NAME} are in {folder}", soft_wrap=True
    )
    return results
