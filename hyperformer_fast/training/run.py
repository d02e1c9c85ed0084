"""Train a run from end to end: load, train, evaluate and report."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import concatenate_datasets
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from ..data import TaskData, available_tasks, encode
from ..model import HyperFormerModel
from .arguments import RunArguments, RunConfigError
from .diagnostics_plot import has_diagnostics, plot_diagnostics
from .evaluate import evaluate_tasks, load_data, majority, show, tokenised
from .field_checks import check_task_names
from .folder import (
    CURVES_NAME,
    DIAGNOSTICS_NAME,
    HISTORY_NAME,
    METRICS_NAME,
    RUN_NAME,
    RunError,
    check_free,
    check_own,
    check_same,
    clear,
    has_weights,
    newest_checkpoint,
    write_json,
    write_run,
)
from .keeper import FolderKeeper
from .lock import RunLock
from .metrics import average_metrics, average_tasks
from .progress import TrainingProgress, progress_bars, quiet, say
from .ranks import lost_process_explained, on_first, together
from .report import TITLES, plot_curves
from .settle import check_metric
from .start import build_model, say_other_texts, with_earlier_texts
from .trainer import HyperFormerTrainer
from .training_arguments import refusals_named


def train_run(arguments: RunArguments, console: Console | None = None, **old: bool) -> dict[str, Any] | None:
    """Train, evaluate and report. Returns the content of metrics.json, or None on a rank other than 0.

    The run folder then has run.json, the trained weights (which ``HyperFormerModel.from_pretrained`` loads), the last
    checkpoints, history.json, metrics.json, curves.png and, if diagnostics were logged, diagnostics.png. Nothing in it
    changes before the first step is trained, and it is locked against other trainings until this one ends.

    Args:
        arguments: all arguments. ``training.resume_from_checkpoint`` continues from the newest complete checkpoint in
            ``output_dir`` ("true"; the run starts anew if there is none yet), or from the one that it names;
            ``training.overwrite_output_dir`` replaces an earlier run, which stays until the new one has trained a step.
        console: where to print; None for standard output.
        old: ``resume`` and ``overwrite``, which version 0.1 took beside a RunConfig.

    Raises:
        RunError, RunConfigError, DataError, UnknownTask, CheckpointError: the run cannot start; ``output_dir`` is
            unchanged. RunError is also raised during training if ``output_dir`` was deleted and another training now
            writes to it.
        TrainingDiverged: the loss or a weight is not finite.
        OtherProcessFailed: another process of the run raised an error, or was killed.
    """
    console, finished = console or Console(), False
    arguments = with_earlier_texts(arguments.located())
    for name, new, value in (("resume", "resume_from_checkpoint", "true"), ("overwrite", "overwrite_output_dir", True)):
        if name in old:
            warnings.warn(f"set training.{new} of the arguments, in place of {name}", DeprecationWarning, stacklevel=2)
            setattr(arguments.training, new, value if old.pop(name) else getattr(arguments.training, new))
    if old:
        raise TypeError(f"train_run got an unexpected argument {next(iter(old))!r}")
    try:
        with lost_process_explained():
            train = _single_task_runs if arguments.data.single_task else _run
            results = train(arguments, console)
        finished = True
        return results
    finally:
        # A process can hang on exit while a gloo group is alive. Destroying an NCCL group can hang if other ranks have
        # failed.
        started = arguments.started_process_group and dist.is_initialized()
        if started and (finished or dist.get_backend() == "gloo"):
            dist.destroy_process_group()


def _single_task_runs(arguments: RunArguments, console: Console) -> dict[str, Any] | None:
    """Train each task in a run of its own in ``output_dir/<task>``, and report all of them together."""
    folder, training = Path(str(arguments.training.output_dir)), arguments.training
    resume, _ = _resuming(arguments, folder)
    if not resume:
        on_first(lambda: (check_own if training.overwrite_output_dir else check_free)(folder))
    tasks = arguments.data.tasks or available_tasks(arguments.data)
    check_task_names("tasks", tasks)
    # Otherwise what is wrong with the last task would be found only after the others are trained.
    data = together(lambda: load_data(arguments, tasks, None, selecting=arguments.selects))
    if training.eval_strategy != "no":
        for name in tasks:  # the same on every process
            check_metric(training.metric_for_best_model, {name: data[name].spec.metrics})
    secrets = {"token": arguments.model.token, "hub_token": training.hub_token}
    found: list[dict[str, Any]] = []

    def begun() -> None:
        if training.overwrite_output_dir:
            clear(folder)  # of an earlier run that trained the tasks together
        # What --resume_from_checkpoint reads in the folder of them all.
        write_run(folder, arguments, {}, training.world_size)

    for task in tasks:
        place = folder / task
        own = {"tasks": [task], "eval_tasks": [task], "single_task": False, "output_dir": str(place), **secrets}
        # A task that was finished without a checkpoint is trained anew, for it may be for more steps.
        if training.overwrite_output_dir or (resume and has_weights(place) and newest_checkpoint(place) == (None, [])):
            own["overwrite_output_dir"] = True
        elif resume and (place / RUN_NAME).is_file():
            own["resume_from_checkpoint"] = "true"
        if training.process_index == 0:
            say(console, f"{task}: a run of its own in {place}")
        part = RunArguments.from_dict({**arguments.to_dict(), **own})
        results = _run(part, console, begun)
        if results is not None:
            found.append(results)
    if not found:
        return None
    parts = {name: result for each in found for name, result in each["tasks"].items()}
    model, most = ({name: part[which] for name, part in parts.items()} for which in ("metrics", "majority"))
    overall = {
        **found[0],
        "average_metrics": average_metrics(model),
        "average_tasks": average_tasks(model),
        "majority_average_metrics": average_metrics(most),
        "majority_average_tasks": average_tasks(most),
        "train_seconds": round(sum(each["train_seconds"] for each in found), 1),
        "tasks": parts,
    }
    write_json(folder / METRICS_NAME, overall)
    show(overall, console)
    return overall


def _run(arguments: RunArguments, console: Console, begun: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Train one run; ``begun`` is called once its folder is written to."""
    with contextlib.ExitStack() as stack:
        return _locked_run(arguments, console, begun, stack)


def _locked_run(
    arguments: RunArguments, console: Console, begun: Callable[[], None], stack: contextlib.ExitStack
) -> dict[str, Any] | None:
    training = arguments.training
    folder, first = Path(str(training.output_dir)), training.process_index == 0
    resume, named = _resuming(arguments, folder)
    locks: list[RunLock] = []

    def enter() -> None:
        locks.append(stack.enter_context(RunLock(folder)))
        if not resume:
            (check_own if training.overwrite_output_dir else check_free)(folder)

    on_first(enter)
    data, trained = together(lambda: _load(arguments, console if first else None))
    if resume:
        same = {name: data[name] for name in trained}
        together(lambda: check_same(folder, arguments, same, training.world_size))
    set_seed(training.seed)
    model, tokenizer = together(lambda: build_model(arguments, trained, list(data)))
    trainer = together(lambda: _trainer(arguments, model, tokenizer, data, trained))
    checkpoint, passed = named, list[str]()
    if resume and named is None:
        checkpoint, passed = on_first(lambda: newest_checkpoint(folder))
        if checkpoint is None and passed:
            raise RunError(f"cannot resume {folder}: {'; '.join(passed)}. Start anew with --overwrite_output_dir")
        if checkpoint is None and has_weights(folder):
            raise RunError(
                f"cannot resume {folder}: it has a finished run's weights, but no checkpoint. Start another run from "
                "them with --init_from, or replace them with --overwrite_output_dir"
            )
    keeper = None
    if first:
        # Without overwriting, a run.json was left by a run that stopped before its first checkpoint.
        clear_first = not resume and (training.overwrite_output_dir or (folder / RUN_NAME).exists())
        keeper = FolderKeeper(folder, arguments, data, locks[0], checkpoint, clear_first, console, begun)
        trainer.add_callback(keeper)
        sizes = ", ".join(f"{name} ({len(data[name].splits['train']):,})" for name in trained)
        say(console, f"{len(trained)} task{'s' * (len(trained) > 1)}: {sizes}")
        if not console.quiet:
            model.print_trainable_parameters()
        for line in passed:
            say(console, f"warning: skipped an incomplete checkpoint: {line}")
        if checkpoint is not None:
            say(console, f"resuming from {checkpoint.name}")
    started = time.perf_counter()
    with progress_bars(console) as progress:
        trainer.add_callback(TrainingProgress(progress, console))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    trainer.accelerator.wait_for_everyone()
    if keeper is not None:
        keeper.keep()
    # Before the evaluation, which may fail; to the Hub they go with its scores.
    trainer.save_model(str(folder), _internal_call=True)
    evaluated = {name: data[name] for name in arguments.data.eval_tasks or trained}
    results = evaluate_tasks(trainer, evaluated, arguments, None, console if first else None)
    if keeper is not None:
        keeper.keep()
    model.card_metrics = {
        name: {metric: value for metric, value in task["metrics"].items() if metric != "score"}
        for name, task in results["tasks"].items()
    }
    trainer.save_model(str(folder))
    if keeper is None:
        return None
    return _report(arguments, model, evaluated, trainer, results, seconds, console)


def _resuming(arguments: RunArguments, folder: Path) -> tuple[bool, Path | None]:
    """Return whether to resume, and the checkpoint that is named for it."""
    wanted = arguments.training.resume_from_checkpoint
    if wanted in (None, False) or str(wanted).lower() == "false":
        return False, None
    if arguments.training.overwrite_output_dir:
        raise RunConfigError("resume_from_checkpoint and overwrite_output_dir exclude each other")
    if str(wanted).lower() == "true":
        return True, None
    named = Path(str(wanted)).absolute()
    if not named.is_dir():
        raise RunConfigError(f"resume_from_checkpoint must be true or the path of a checkpoint, got {wanted!r}")
    if named.resolve().parent != folder.resolve():
        raise RunConfigError(
            f"resume_from_checkpoint={wanted!r} is not a checkpoint of output_dir={str(folder)!r}: set output_dir to "
            "its folder, or start a new run from its weights with init_from"
        )
    return True, named


def _load(arguments: RunArguments, console: Console | None) -> tuple[dict[str, TaskData], list[str]]:
    """Return the data of the tasks that are trained or evaluated, and the names of those that are trained."""
    chosen = arguments.data
    selecting = arguments.selects
    data = load_data(arguments, chosen.tasks, console, selecting=selecting)
    trained = list(data)
    others = [task for task in chosen.eval_tasks or () if task not in data]
    if others:
        data |= load_data(arguments, others, console, selecting=selecting)
    if console is not None:
        say_other_texts(arguments, data, console)
    return data, trained


def _trainer(
    arguments: RunArguments,
    model: HyperFormerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, TaskData],
    trained: Sequence[str],
) -> HyperFormerTrainer:
    training, chosen, tasks = arguments.training, arguments.data, list(model.hyperformer_config.tasks)
    evaluate = training.eval_strategy != "no" or training.eval_on_start
    with training.main_process_first(local=False, desc="tokenising"):
        lengths = chosen.max_source_length, chosen.max_target_length
        train = concatenate_datasets(
            [encode(data[name], "train", tokenizer, *lengths, index=tasks.index(name)) for name in trained]
        )
        validation = {
            name: tokenised(
                data[name], "validation", tokenizer, tasks, chosen.max_source_length, chosen.max_eval_samples
            )
            for name in (chosen.eval_tasks or trained if evaluate else ())
        }
    check_metric(training.metric_for_best_model, {name: data[name].spec.metrics for name in validation})
    with refusals_named():
        trainer = HyperFormerTrainer(
            model,
            training,
            train_dataset=train,
            eval_dataset=validation if evaluate else None,
            processing_class=tokenizer,
            tasks={name: task.spec for name, task in data.items()},
            callbacks=arguments.callbacks(),
        )
    trainer.max_target_length = chosen.val_max_target_length or chosen.max_target_length
    quiet(trainer)
    return trainer


def _report(
    arguments: RunArguments,
    model: HyperFormerModel,
    data: dict[str, TaskData],
    trainer: HyperFormerTrainer,
    results: dict[str, Any],
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    folder, count, history = Path(str(trainer.args.output_dir)), model.parameter_count(), trainer.state.log_history
    results |= {
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 1),
        "trained_parameters": count.trained,
        "t5_parameters": count.t5_total,
        "percent_per_task": count.percent_per_task,
    }
    write_json(folder / HISTORY_NAME, history)
    write_json(folder / METRICS_NAME, results)
    show(results, console)
    rows, title, written = arguments.data.max_eval_samples, TITLES[results["variant"]], ["weights", METRICS_NAME]

    def curves() -> None:
        baselines = {name: majority(task, "validation", rows)["score"] for name, task in data.items()}
        plot_curves(history, baselines, folder / CURVES_NAME, f"{title}, seed {trainer.args.seed}", rows)

    plots: dict[str, Callable[[], None]] = {CURVES_NAME: curves}
    if has_diagnostics(history):
        plots[DIAGNOSTICS_NAME] = lambda: plot_diagnostics(history, folder / DIAGNOSTICS_NAME, title)
    for name, plot in plots.items():
        try:
            plot()
            written.append(name)
        except Exception as error:  # the run is complete: a plot that fails must not fail it
            say(console, f"warning: {name} could not be plotted: {type(error).__name__}: {error}")
    if trainer.collapsed_pairs:
        (first, second), *others = trainer.collapsed_pairs
        more = f" and {len(others)} more pairs" if others else ""
        say(console, f"warning: {first!r} and {second!r}{more} collapsed onto each other while training (see above)")
    say(console, f"trained in {seconds:.0f} s; {', '.join(written[:-1])} and {written[-1]} are in {folder}")
    return results
