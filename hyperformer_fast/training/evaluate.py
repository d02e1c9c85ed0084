"""Evaluate a model or a saved run on whole splits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..checkpoint import WEIGHTS_NAME
from ..data import TaskData, TaskSpec, load_tasks
from ..model import HyperFormerModel
from .arguments import RunConfig
from .base import load_base
from .folder import EVALUATION_NAME, RunError, checkpoints, read_run, write_json
from .generation import evaluate_examples
from .metrics import average, majority_score
from .progress import progress_bars, say
from .report import notes, results_table


def evaluate_run(
    run_dir: str | Path,
    split: str | None = None,
    tasks: Sequence[str] | None = None,
    model: str | None = None,
    data_dir: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a saved run: print the results, write them to ``evaluation.json`` in the run folder, and return them.

    If the file cannot be written, a warning is printed instead.

    Args:
        run_dir: the run folder. The newest checkpoint of an unfinished run is used.
        split: train, validation or test; None for test if there is one, else validation.
        tasks: tasks to evaluate, all of which must be the run's; None for all of them.
        model, data_dir: where the T5 and the data are now; None for where they were when the run was trained.
        console: where to print; None for standard output.

    Raises:
        RunError, CheckpointError, DataError, OSError: the run, its weights, its data or a file cannot be used.
    """
    console = console or Console()
    run, specs, _ = read_run(run_dir)
    chosen = known_tasks(tasks, specs)
    data = load_tasks(data_dir or run.data_dir, chosen, specs=specs)
    adapted, tokenizer = load_model(run_dir, run, model, console)
    results = evaluate_model(adapted, tokenizer, limited(data, run), run, split, console)
    show(results, console)
    try:
        write_json(Path(run_dir) / EVALUATION_NAME, results)
    except OSError as error:
        say(console, f"warning: the results above were not written to {EVALUATION_NAME}: {error}")
    return results


def evaluate_model(
    model: HyperFormerModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, TaskData],
    run: RunConfig,
    split: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model on whole splits and return the content of metrics.json.

    For each task the content has the split, the number of rows, the metrics of the model and of the majority class, and
    the number of generated texts that are no label. It also has the averages over tasks.
    """
    for name, task in data.items():
        if split is not None and split not in task.splits:
            raise RunError(f"task {name!r} has no split {split!r}; it has {', '.join(task.splits)}")
    tasks: dict[str, dict[str, Any]] = {}
    with progress_bars(console or Console(quiet=True)) as progress:
        for name, task in data.items():
            chosen = split or task.report_split
            examples = task.splits[chosen]
            bar = progress.add_task(f"evaluating {name}", total=len(examples), note=chosen)
            metrics, unparsed = evaluate_examples(
                model,
                tokenizer,
                task.spec,
                examples,
                run.eval_batch_size,
                run.max_source_length,
                functools.partial(progress.advance, bar),
            )
            tasks[name] = {
                "split": chosen,
                "rows": len(examples),
                "metrics": metrics,
                "majority": majority(task, chosen),
                "unparsed": unparsed,
            }
    return {
        "variant": model.hyperformer_config.variant,
        "average": average({name: task["metrics"] for name, task in tasks.items()}),
        "majority_average": average({name: task["majority"] for name, task in tasks.items()}),
        "tasks": tasks,
    }


def majority(task: TaskData, split: str, rows: int | None = None) -> dict[str, float]:
    """Return the metrics of always answering train's most frequent label, on the first ``rows`` rows of a split."""
    train, labels = ([example.label for example in task.splits[name]] for name in ("train", split))
    return majority_score(task.spec, train, labels[:rows])


def limited(data: dict[str, TaskData], run: RunConfig) -> dict[str, TaskData]:
    """Truncate the splits in ``data`` to as many rows as the run uses, and return ``data``."""
    for task in data.values():
        for split, examples in task.splits.items():
            task.splits[split] = examples[: run.max_train_rows if split == "train" else run.max_eval_rows]
    return data


def load_model(
    run_dir: str | Path, run: RunConfig, model: str | None, console: Console
) -> tuple[HyperFormerModel, PreTrainedTokenizerBase]:
    """Load (model in eval mode, tokenizer) of a saved run."""
    weights = Path(run_dir)
    if not (weights / WEIGHTS_NAME).is_file():
        whole = checkpoints(weights)
        if not whole:
            raise RunError(f"{run_dir} has no weights and no complete checkpoint yet")
        weights = whole[-1]
        say(console, f"the run is not finished: using {weights.name}")
    t5, tokenizer = load_base(model or run.model)
    return HyperFormerModel.from_pretrained(t5, weights).eval(), tokenizer


def known_tasks(tasks: Sequence[str] | None, specs: Mapping[str, TaskSpec]) -> list[str]:
    """Return ``tasks``, or all of the run's if None. Raises RunError for a task that the run was not trained on."""
    for task in tasks or ():
        if task not in specs:
            raise RunError(f"unknown task {task!r}; this run has {', '.join(specs)}")
    return list(tasks or specs)


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the table of results and its notes."""
    console.print(results_table(results))
    for line in notes(results):
        say(console, line)
