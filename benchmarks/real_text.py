"""Compare the paper's methods on real text with one budget of steps, and transfer them to new tasks with few rows.

    python benchmarks/real_text.py train --t5 FOLDER --data FOLDER [--steps 1500] [--seeds 3] [--jobs 2] [--work DIR]
    python benchmarks/real_text.py fewshot --t5 FOLDER --data FOLDER --to trec scitail [--work DIR]

It is the short form of `study.py`: four methods, evaluated on all validation rows. Every run is
a `hyperformer-fast train` of its own, in a process with one thread. What is finished is kept in --work, so that the
same command goes on where it was stopped. Learning rates are one for each method, as no single one suits both adapters
and a whole T5; everything else is equal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import compared, comparison_table, splits_in_words
from configurations import LEARNING_RATES, TEXT_SIZES, TEXT_TASKS, TEXT_TRANSFER, text_configuration, text_options
from plots import draw
from rich.console import Console
from runs import command, in_parallel, train_all, where_runs_ran
from timing import RESULTS, write

from hyperformer_fast import HyperFormerConfig

METHODS = ("finetuning", "adapters", "hyperformer", "hyperformer++")
NAME = "real-text"


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train every method, and compare them")
    fewshot = commands.add_parser("fewshot", help="train without the new tasks, then transfer to them")
    for each in (train, fewshot):
        each.add_argument("--t5", required=True, help="folder of a T5 with its tokenizer")
        each.add_argument("--data", required=True, help="folder with a folder of files for each task")
        each.add_argument("--work", type=Path, default=Path("real-text-runs"), help="where the runs are kept")
        each.add_argument("--output", type=Path, default=RESULTS, help="where the results are written")
        each.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
        each.add_argument("--tasks", nargs="+", default=TEXT_TASKS)
        text_options(each)
        each.add_argument(
            "--learning-rate", nargs="+", default=[], metavar="METHOD=X", help=f"default: {LEARNING_RATES}"
        )
    train.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")
    fewshot.add_argument("--to", nargs="+", default=TEXT_TRANSFER, help="the new tasks (default: trec scitail)")
    fewshot.add_argument("--samples", type=int, nargs="+", default=[4, 16, 32, 100])
    fewshot.add_argument("--seeds", type=int, default=3, help="seeds of each transfer (default: 3)")
    fewshot.add_argument("--fewshot-steps", type=int, default=100, help="steps of each transfer (default: 100)")
    options = parser.parse_args(arguments)
    given = dict(pair.split("=") for pair in options.learning_rate)
    options.rates = LEARNING_RATES | {method: float(rate) for method, rate in given.items()}
    return options


def configuration(options: argparse.Namespace, method: str, tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """The arguments of one run."""
    return text_configuration(options, {"variant": method}, tasks, options.rates[method], seed)


def compare(options: argparse.Namespace) -> None:
    runs = {
        (method, seed): (
            (options.work / f"{method}-{seed}").resolve(),
            configuration(options, method, options.tasks, seed),
        )
        for seed in range(options.seeds)
        for method in options.methods
    }
    results = compared(train_all(runs, options.jobs), options.methods)
    results["settings"] = settings(options, options.tasks) | {"recipes": recipes_of(runs)}
    rows = splits_in_words(results["evaluated"])
    title = f"Real text: {rows}, percent, {options.seeds} seeds, {options.steps} steps of {options.batch} rows"
    Console(width=140).print(comparison_table(results, title))
    draw(write(NAME, where_runs_ran(), results, options.output))


def recipes_of(runs: Mapping[tuple[str, int], tuple[Path, Any]]) -> dict[str, str]:
    """The recipe that the runs of each method were trained by.

    Runs that an earlier release left in --work were trained as the authors do, whatever the default is now.

    Raises:
        SystemExit: the runs of a method differ.
    """
    found: dict[str, str] = {}
    for (method, seed), (folder, _) in runs.items():
        recipe = HyperFormerConfig.load(folder).recipe
        if found.setdefault(method, recipe) != recipe:
            raise SystemExit(
                f"{folder} (seed {seed}) was trained by recipe {recipe!r}, other runs of {method} by "
                f"{found[method]!r}: choose another --work"
            )
    return found


def fewshot(options: argparse.Namespace) -> None:
    tasks = [task for task in options.tasks if task not in options.to]
    runs = {
        method: ((options.work / "without" / method).resolve(), configuration(options, method, tasks, 0))
        for method in options.methods
    }
    train_all(runs, options.jobs)
    folders = [folder for folder, _ in runs.values()]
    calls = {task: (lambda task=task: transfer(options, task, folders)) for task in options.to}
    studies = in_parallel("transfer", calls, options.jobs, lambda task, _: f"{task}: done")
    for task, results in studies.items():
        results["settings"] = settings(options, tasks)
        print((options.work / f"to-{task}" / "fewshot.md").read_text())
        draw(write(f"fewshot-{task}", where_runs_ran(), results, options.output))


def transfer(options: argparse.Namespace, task: str, runs: Sequence[Path]) -> dict[str, Any]:
    """Transfer the runs to one task in a process of its own; return the content of its fewshot.json."""
    folder = options.work / f"to-{task}"
    grid = ["--samples", *map(str, options.samples), "--seeds", str(options.seeds)]
    grid += ["--max_steps", str(options.fewshot_steps), "--max_predict_samples", str(options.eval_rows)]
    grid += ["--output_dir", str(folder)]
    command("fewshot", *runs, "--task", task, *grid, log=folder / "study.log")
    results = json.loads((folder / "fewshot.json").read_text())
    for method in results["methods"].values():
        del method["run"]  # a path of this machine
    return results


def settings(options: argparse.Namespace, tasks: Sequence[str]) -> dict[str, Any]:
    """What the results depend on, without the paths of this machine."""
    names = ("steps", "batch", *TEXT_SIZES, "eval_rows", "seeds")
    return {
        "t5": Path(options.t5).name,
        "tasks": list(tasks),
        "learning_rates": {method: options.rates[method] for method in options.methods},
        **{name: getattr(options, name) for name in names},
    }


def main() -> None:
    options = options_of()
    {"train": compare, "fewshot": fewshot}[options.command](options)


if __name__ == "__main__":
    main()
