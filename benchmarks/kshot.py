"""Learn an unseen task by its embedding alone from k rows: accuracy and seconds over k.

    python benchmarks/kshot.py RUN_DIR [--task paraphrase] [--samples 4 16 64] [--seeds 5] [--steps 100]
                               [--learning-rate 0.2] [--eval-rows 400] [--data DIR] [--output DIR]

RUN_DIR is a run of `hyperformer-fast train` that has not seen the task. For each k and seed, `fit_task` learns an
embedding from the first k rows of a permutation of the training rows, from the trained task with the least loss on
them. Scores are of the task's test rows (validation, where there are none), beside those of that trained task as it is,
and of the most frequent class of the training rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from rich.console import Console
from timing import arguments, machine, show, write

from hyperformer_fast import fit_task, nearest_task
from hyperformer_fast.data import TaskData, encode, load_tasks
from hyperformer_fast.data.splits import sample_train
from hyperformer_fast.training.evaluate import load_model, majority
from hyperformer_fast.training.folder import read_run
from hyperformer_fast.training.generation import generate_texts
from hyperformer_fast.training.metrics import score

_NEW = "new task"


def options_of() -> argparse.Namespace:
    parser = arguments(__doc__, quick="one seed, k = 4, two steps, eight rows to score")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--task", default="paraphrase", help="the unseen task (default: paraphrase)")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64], help="k (default: 4 16 64)")
    parser.add_argument("--seeds", type=int, default=5, help="samples of each size (default: 5)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each fit (default: 100)")
    parser.add_argument("--learning-rate", type=float, default=0.2, help="default: 0.2")
    parser.add_argument("--eval-rows", type=int, default=400, help="rows to score (default: 400)")
    parser.add_argument("--data", help="folder of the task's data; default: where the run's was")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(samples=[4], seeds=1, steps=2, eval_rows=8)
    return options


class Bench:
    """A run's model, and the rows of the unseen task."""

    def __init__(self, options: argparse.Namespace):
        self.options, quiet = options, Console(quiet=True)
        run, _, _ = read_run(options.run_dir)
        self.model, self.tokenizer = load_model(options.run_dir, run, None, quiet)
        self.lengths = run.data.max_source_length, run.data.max_target_length
        place = run.data.data_dir if options.data is None else options.data
        self.data = load_tasks(place, [options.task], console=quiet)[options.task]
        self.split = self.data.report_split
        chosen = self.data.splits[self.split]
        self.rows = chosen.select(range(min(options.eval_rows, len(chosen))))

    def sampled(self, k: int, seed: int) -> list[dict[str, Any]]:
        few = sample_train(self.data.splits["train"], k, seed)
        return list(encode(TaskData(self.data.spec, {"train": few}), "train", self.tokenizer, *self.lengths))

    def scored(self, task: str) -> float:
        """The score of the rows with the weights of one of the model's tasks."""
        spec = self.data.spec
        self.model.rename_task(task, spec.name)  # by which generate_texts asks for it
        try:
            texts = generate_texts(self.model, self.tokenizer, spec, self.rows["source"], 64, self.lengths[0])
        finally:
            self.model.rename_task(spec.name, task)
        return score(spec, [spec.parse(text) for text in texts], self.rows["label"])["score"]

    def cell(self, k: int, seed: int) -> dict[str, Any]:
        options, rows = self.options, self.sampled(k, seed)
        start = time.perf_counter()
        nearest = nearest_task(self.model, rows[:32])[0].task
        chosen = time.perf_counter() - start
        fitted = fit_task(
            self.model, _NEW, rows, steps=options.steps, learning_rate=options.learning_rate, init_from=nearest
        )
        found = {"score": self.scored(_NEW), "nearest": nearest, "nearest_score": self.scored(nearest)}
        self.model.remove_task(_NEW)
        losses = {"first_loss": fitted.losses[0], "last_loss": fitted.losses[-1]}
        return {**found, **losses, "fit_seconds": fitted.seconds, "nearest_seconds": chosen}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options)
    cells = {}
    for k in options.samples:
        cells[k] = [bench.cell(k, 42 + seed) for seed in range(options.seeds)]
        mean = statistics.fmean(cell["score"] for cell in cells[k])
        print(f"{k} rows: {mean:.1f}, {statistics.fmean(cell['fit_seconds'] for cell in cells[k]):.1f} s", flush=True)
    return {
        "task": options.task,
        "split": bench.split,
        "rows": len(bench.rows),
        "tasks": bench.model.hyperformer_config.tasks,
        "learned_numbers": bench.model.hyperformer_config.embedding_dim,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "majority": majority(bench.data, bench.split, len(bench.rows))["score"],
        "cells": cells,
    }


def shown(cells: list[dict[str, Any]], name: str) -> str:
    values = [cell[name] for cell in cells]
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    options = options_of()
    where, found = machine(), measure(options)
    columns = ("rows", "embedding learned", "nearest task as it is", "most frequent class", "seconds", "nearest task")
    rows = []
    for k, cells in found["cells"].items():
        nearest = ", ".join(dict.fromkeys(cell["nearest"] for cell in cells))
        scores = shown(cells, "score"), shown(cells, "nearest_score"), f"{found['majority']:.1f}"
        rows.append((k, *scores, shown(cells, "fit_seconds"), nearest))
    title = f"{found['task']} by {found['learned_numbers']} numbers, {found['split']}, percent, {found['steps']} steps"
    show(title, where, columns, rows)
    write(f"kshot-{found['task']}", where, found, options.output)


if __name__ == "__main__":
    main()
