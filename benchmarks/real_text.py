"""Compare the paper's methods on real text with one budget of steps, and transfer them to new tasks with few rows.

    python benchmarks/real_text.py train --t5 FOLDER --data FOLDER [--steps 1500] [--seeds 3] [--jobs 2] [--work DIR]
    python benchmarks/real_text.py fewshot --t5 FOLDER --data FOLDER --to trec scitail [--work DIR]

Every run is a `hyperformer-fast train` of its own, in a process with one thread. What is finished is kept in --work,
so that the same command goes on where it was stopped. Learning rates are one for each method, as no single one suits
both adapters and a whole T5; everything else is equal.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plots import draw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from timing import RESULTS, machine, write

METHODS = ("finetuning", "adapters", "hyperformer", "hyperformer++")
TASKS = ("sst2", "trec", "cola", "mrpc", "stsb", "rte")
LEARNING_RATES = {"finetuning": 5e-4, "adapters": 3e-3, "hyperformer": 3e-3, "hyperformer++": 3e-3}
NAME = "real-text"
ROOT = Path(__file__).resolve().parents[1]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train every method, and compare them")
    fewshot = commands.add_parser("fewshot", help="train without the new tasks, then transfer to them")
    for command in (train, fewshot):
        command.add_argument("--t5", required=True, help="folder of a T5 with its tokenizer")
        command.add_argument("--data", required=True, help="folder with a folder of files for each task")
        command.add_argument("--work", type=Path, default=Path("real-text-runs"), help="where the runs are kept")
        command.add_argument("--output", type=Path, default=RESULTS, help="where the results are written")
        command.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
        command.add_argument("--tasks", nargs="+", default=TASKS)
        command.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run (default: 1500)")
        command.add_argument("--batch", type=int, default=16, help="rows of a batch (default: 16)")
        command.add_argument("--length", type=int, default=64, help="longest source in tokens (default: 64)")
        command.add_argument("--reduction", type=int, default=16, help="reduction factor of the adapters (default: 16)")
        command.add_argument("--embedding", type=int, default=32, help="width of the task embeddings (default: 32)")
        command.add_argument("--eval-rows", type=int, default=400, help="rows of each task to evaluate (default: 400)")
        command.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
        command.add_argument(
            "--learning-rate", nargs="+", default=[], metavar="METHOD=X", help=f"default: {LEARNING_RATES}"
        )
    train.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")
    fewshot.add_argument("--to", nargs="+", default=["trec", "scitail"], help="the new tasks (default: trec scitail)")
    fewshot.add_argument("--samples", type=int, nargs="+", default=[4, 16, 32, 100])
    fewshot.add_argument("--seeds", type=int, default=3, help="seeds of each transfer (default: 3)")
    fewshot.add_argument("--fewshot-steps", type=int, default=100, help="steps of each transfer (default: 100)")
    options = parser.parse_args(arguments)
    given = dict(pair.split("=") for pair in options.learning_rate)
    options.rates = LEARNING_RATES | {method: float(rate) for method, rate in given.items()}
    return options


def configuration(options: argparse.Namespace, method: str, tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """The arguments of one run, as `hyperformer-fast train` reads them."""
    return {
        "model_name_or_path": str(Path(options.t5).resolve()),
        "data_dir": str(Path(options.data).resolve()),
        "tasks": list(tasks),
        "variant": method,
        "reduction_factor": options.reduction,
        "task_embedding_dim": options.embedding,
        "projected_task_embedding_dim": options.embedding,
        "max_steps": options.steps,
        "warmup_steps": options.steps // 10,
        "learning_rate": options.rates[method],
        "per_device_train_batch_size": options.batch,
        "max_source_length": options.length,
        "max_predict_samples": options.eval_rows,
        "seed": seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 20,
    }


def command(*arguments: str | Path, log: Path) -> None:
    """Run `hyperformer-fast` in a process of its own with one thread. RuntimeError with the end of its log."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as written:
        done = subprocess.run(
            [sys.executable, "-m", "hyperformer_fast", *map(str, arguments)],
            env=os.environ | threads | {"PYTHONPATH": paths},
            stdout=written,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"hyperformer-fast {arguments[0]} failed; the end of {log}:\n{log.read_text()[-2000:]}")


def train(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Train one run, unless it is finished; return the content of its metrics.json."""
    said, metrics = folder.with_suffix(".json"), folder / "metrics.json"
    wanted = json.dumps({**config, "output_dir": str(folder)}, indent=1)
    if not metrics.exists() or not said.exists() or said.read_text() != wanted:
        said.parent.mkdir(parents=True, exist_ok=True)
        metrics.unlink(missing_ok=True)
        said.write_text(wanted)
        command("train", said, "--overwrite_output_dir", "true", log=folder.with_suffix(".log"))
    return json.loads(metrics.read_text())


def train_all(options: argparse.Namespace, runs: Mapping[Any, tuple[Path, dict[str, Any]]]) -> dict[Any, Any]:
    """Train runs, some at a time, with a bar; return what each found."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    found = {}
    with (
        Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as progress,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        bar = progress.add_task("training", total=len(runs))
        jobs = {pool.submit(train, *run): key for key, run in runs.items()}
        for job in concurrent.futures.as_completed(jobs):
            key, result = jobs[job], job.result()
            found[key] = result
            progress.advance(bar)
            progress.console.print(
                f"{key}: {result['average_metrics']:.1f} on average, trained in {result['train_seconds']:.0f} s"
            )
    return found


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation of a sample."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def compared(found: Mapping[tuple[str, int], Mapping[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Summarise runs over their seeds: every metric of every task, both averages, and the parameters."""
    first = next(iter(found.values()))
    of_majority = {
        "average_metrics": first["majority_average_metrics"],
        "average_tasks": first["majority_average_tasks"],
        "tasks": {name: task["majority"] for name, task in first["tasks"].items()},
    }
    results: dict[str, Any] = {"majority": of_majority, "methods": {}}
    for method in methods:
        runs = [run for (of, _), run in sorted(found.items()) if of == method]
        results["methods"][method] = {
            **{name: spread([run[name] for run in runs]) for name in ("average_metrics", "average_tasks")},
            "trained_parameters": runs[0]["trained_parameters"],
            "percent_per_task": runs[0]["percent_per_task"],
            "train_seconds": [run["train_seconds"] for run in runs],
            "tasks": {
                name: {metric: spread([run["tasks"][name]["metrics"][metric] for run in runs]) for metric in metrics}
                for name, metrics in of_majority["tasks"].items()
            },
        }
    return results


def shown(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:.1f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.1f}")


def comparison_table(results: Mapping[str, Any]) -> Table:
    """A row for each metric and average, a column for the majority class and each method."""
    table = Table("task", "metric", title="Real text, percent, mean and deviation over seeds")
    for heading in ("majority class", *results["methods"]):
        table.add_column(heading, justify="right")
    methods, most = results["methods"].values(), results["majority"]
    for name, metrics in most["tasks"].items():
        for metric, value in metrics.items():
            if metric != "score":
                table.add_row(name, metric, f"{value:.1f}", *(shown(m["tasks"][name][metric]) for m in methods))
    table.add_section()
    for average in ("average_metrics", "average_tasks"):
        table.add_row("average", average.removeprefix("average_"), f"{most[average]:.1f}",
                      *(shown(m[average]) for m in methods))  # fmt: skip
    table.add_section()
    table.add_row("trained", "parameters", "", *(f"{m['trained_parameters']:,}" for m in methods))
    table.add_row("", "of the T5, per task", "", *(f"{m['percent_per_task']:.2f} %" for m in methods))
    return table


def compare(options: argparse.Namespace) -> None:
    runs = {
        (method, seed): (
            (options.work / f"{method}-{seed}").resolve(),
            configuration(options, method, options.tasks, seed),
        )
        for seed in range(options.seeds)
        for method in options.methods
    }
    results = compared(train_all(options, runs), options.methods)
    results["settings"] = settings(options, options.tasks)
    Console(width=140).print(comparison_table(results))
    draw(write(NAME, machine(), results, options.output))


def fewshot(options: argparse.Namespace) -> None:
    tasks = [task for task in options.tasks if task not in options.to]
    runs = {
        method: ((options.work / "without" / method).resolve(), configuration(options, method, tasks, 0))
        for method in options.methods
    }
    train_all(options, runs)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        studies = list(
            pool.map(lambda task: transfer(options, task, [folder for folder, _ in runs.values()]), options.to)
        )
    for task, results in zip(options.to, studies):
        results["settings"] = settings(options, tasks)
        print((options.work / f"to-{task}" / "fewshot.md").read_text())
        draw(write(f"fewshot-{task}", machine(), results, options.output))


def transfer(options: argparse.Namespace, task: str, runs: Sequence[Path]) -> dict[str, Any]:
    """Transfer the runs to one task in a process of its own; return the content of its fewshot.json."""
    folder, started = options.work / f"to-{task}", time.perf_counter()
    grid = ["--samples", *map(str, options.samples), "--seeds", str(options.seeds)]
    grid += ["--max_steps", str(options.fewshot_steps), "--output_dir", str(folder)]
    command("fewshot", *runs, "--task", task, *grid, log=folder / "study.log")
    print(f"{task}: {time.perf_counter() - started:.0f} s")
    return json.loads((folder / "fewshot.json").read_text())


def settings(options: argparse.Namespace, tasks: Sequence[str]) -> dict[str, Any]:
    """What the results depend on, without the paths of this machine."""
    names = ("steps", "batch", "length", "reduction", "embedding", "eval_rows", "seeds")
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
