"""Evaluate a model or a saved run on whole splits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from rich.console import Console
from transformers import GenerationConfig, PreTrainedTokenizerBase, Seq2SeqTrainer

from ..data import TaskData, TaskSpec, encode, load_tasks
from ..model import HyperFormerModel
from .arguments import RunArguments
from .base import fuse_of, load_base
from .folder import EVALUATION_NAME, RunError, checkpoints, has_weights, read_run, write_json
from .metrics import average_metrics, average_tasks, majority_score
from .progress import EvaluationProgress, progress_bars, quiet, say
from .ranks import process_group, rank_and_size
from .report import notes, results_table
from .trainer import HyperFormerTrainer


def evaluate_run(
    run_dir: str | Path,
    split: str | None = None,
    tasks: Sequence[str] | None = None,
    model: str | None = None,
    data_dir: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a saved run: print the results, write them to ``evaluation.json`` in the run folder, and return them.

    If the file cannot be written, a warning is printed instead. The processes of a ``torchrun`` share the rows, and
    the first one prints and writes.

    Args:
        run_dir: the run folder. The newest checkpoint of an unfinished run is used.
        split: train, validation or test; None for test if there is one, else validation.
        tasks: tasks to evaluate, all of which must be the run's; None for its ``eval_tasks``, by default all of them.
        model, data_dir: where the T5 and the data are now; None for where they were when the run was trained.
        console: where to print; None for standard output.

    Raises:
        RunError, CheckpointError, DataError, OSError: the run, its weights, its data or a file cannot be used.
    """
    with process_group():
        first = rank_and_size()[0] == 0
        console = console or Console(quiet=not first)
        run, specs, content = read_run(run_dir)
        if not specs and content.get("kept_tasks"):
            raise RunError(
                f"no task of {run_dir} can be evaluated, because all were renamed or imported, and have no data under "
                "their names: predict takes a file of rows"
            )
        chosen = known_tasks(tasks or run.data.eval_tasks, specs)
        if data_dir is not None:
            run.data.data_dir = data_dir
        if data_dir is not None or not os.path.isfile(run.data.task_file or ""):
            run.data.task_file = None  # the run has what it said of its tasks, and their files may be elsewhere now
        adapted, tokenizer = load_model(run_dir, run, model, console)
        data = load_data(run, chosen, console, specs, selecting=content.get("selecting", False))
        trainer = HyperFormerTrainer(
            adapted, run.training, processing_class=tokenizer, tasks={name: task.spec for name, task in data.items()}
        )
        quiet(trainer)
        results = evaluate_tasks(trainer, data, run, split, console)
    if first:
        show(results, console)
        try:
            write_json(Path(run_dir) / EVALUATION_NAME, results)
        except OSError as error:
            say(console, f"warning: the results above were not written to {EVALUATION_NAME}: {error}")
    return results


def load_data(
    run: RunArguments,
    tasks: Sequence[str] | None,
    console: Console | None,
    specs: Mapping[str, TaskSpec] | None = None,
    selecting: bool = False,
) -> dict[str, TaskData]:
    """Load tasks as the run's arguments say; on several processes the first one fills the cache."""
    chosen = dataclasses.replace(run.data, add_prefix=run.adds_prefix)
    with run.training.main_process_first(local=False, desc="loading data"):
        return load_tasks(
            chosen, tasks, specs=specs, selecting=selecting, cache_dir=run.model.cache_dir, console=console
        )


def evaluate_tasks(
    trainer: HyperFormerTrainer,
    data: Mapping[str, TaskData],
    run: RunArguments,
    split: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a trainer's model on whole splits and return the content of metrics.json.

    For each task the content has the split, the number of rows, the metrics of the model and of the majority class, the
    loss (the cross-entropy without label smoothing, as the Trainer's ``eval_loss`` the mean over a batch's target
    tokens, and over batches, weighted by their rows; not where several processes share the rows, because the stock loop
    then leaves some of the last batch out), and how many of the generated texts are distinct and how many are no label.
    It also has the averages.
    """
    for name, task in data.items():
        if split is not None and split not in task.splits:
            raise RunError(f"task {name!r} has no split {split!r}; it has {', '.join(task.splits)}")
    tasks: dict[str, dict[str, Any]] = {}
    trainer.max_target_length = run.data.test_max_target_length or run.data.max_target_length
    # a saved run is evaluated without smoothing, and in float32 a loss that ends a training is to be the same number
    smoother, trainer.label_smoother = trainer.label_smoother, None
    with progress_bars(console or Console(quiet=True)) as progress:
        follower = EvaluationProgress(progress)
        trainer.add_callback(follower)
        try:
            for name, task in data.items():
                chosen = split or task.report_split
                lengths = run.data.max_source_length, run.data.max_predict_samples
                rows = tokenised(task, chosen, trainer.processing_class, trainer.task_names, *lengths)
                follower.begin(f"evaluating {name}", len(rows), chosen)
                outcome = trainer.evaluate_task(name, rows, metric_key_prefix="test")
                assert outcome.texts is not None  # every task here has a specification
                tasks[name] = {
                    "split": chosen,
                    "rows": len(rows),
                    "metrics": outcome.scores,
                    "majority": majority(task, chosen, run.data.max_predict_samples),
                    **({"loss": outcome.metrics["test_loss"]} if trainer.args.world_size == 1 else {}),
                    "distinct": len(set(outcome.texts)),
                    "unparsed": [task.spec.parse(text) for text in outcome.texts].count(None),
                }
        finally:
            trainer.remove_callback(follower)
            trainer.label_smoother = smoother
    model, most = ({name: task[which] for name, task in tasks.items()} for which in ("metrics", "majority"))
    return {
        "variant": trainer.accelerator.unwrap_model(trainer.model).hyperformer_config.variant,
        "average_metrics": average_metrics(model),
        "average_tasks": average_tasks(model),
        "majority_average_metrics": average_metrics(most),
        "majority_average_tasks": average_tasks(most),
        "tasks": tasks,
    }


def tokenised(
    task: TaskData,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    max_source_length: int,
    limit: int | None = None,
) -> Dataset:
    """Return the first ``limit`` rows of a split with their tokens and labels, as a HyperFormerTrainer takes them.

    ``tasks`` are all of the model's.
    """
    index = list(tasks).index(task.spec.name)
    tokens = encode(task, split, tokenizer, max_source_length, limit=limit, index=index)
    return tokens.add_column("label", task.splits[split][: len(tokens)]["label"])


def majority(task: TaskData, split: str, rows: int | None = None) -> dict[str, float]:
    """Return the metrics of always answering train's most frequent label, on the first ``rows`` rows of a split."""
    train, labels = (list(task.splits[name]["label"]) for name in ("train", split))
    return majority_score(task.spec, train, labels[:rows])


def load_model(
    run_dir: str | Path, run: RunArguments, model: str | None, console: Console
) -> tuple[HyperFormerModel, PreTrainedTokenizerBase]:
    """Load (model in eval mode, tokenizer) of a saved run. The model generates by the run's ``generation_config``."""
    weights = weights_folder(run_dir, console)
    t5, tokenizer = load_base(run.model, model)
    if run.training.generation_config is not None:
        decoding = cast("str | GenerationConfig", run.training.generation_config)  # a saved run has no Path
        t5.generation_config = Seq2SeqTrainer.load_generation_config(decoding)
    return HyperFormerModel.from_pretrained(weights, t5=t5, fuse=fuse_of(run.model)).eval(), tokenizer


def weights_folder(run_dir: str | Path, console: Console) -> Path:
    """Return the folder with the weights of a run: its own, or that of its newest checkpoint if it is not finished."""
    folder = Path(run_dir)
    if has_weights(folder):
        return folder
    whole = checkpoints(folder)
    if not whole:
        raise RunError(f"{run_dir} has no weights and no complete checkpoint yet")
    say(console, f"the run in {run_dir} is not finished: using {whole[-1].name}")
    return whole[-1]


def known_tasks(tasks: Sequence[str] | None, specs: Mapping[str, TaskSpec]) -> list[str]:
    """Return ``tasks``, or all of the run's if None. Raises RunError for a task that the run was not trained on."""
    if not specs:
        raise RunError("this folder holds runs of single tasks: name that of a task in it")
    for task in tasks or ():
        if task not in specs:
            raise RunError(f"unknown task {task!r}; this run has {', '.join(specs)}")
    return list(tasks or specs)


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the table of results and its notes."""
    console.print(results_table(results))
    for line in notes(results):
        say(console, line)
