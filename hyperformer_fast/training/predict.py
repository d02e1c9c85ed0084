"""Label new rows with a saved run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import TaskSpec, read_jsonl
from .evaluate import known_tasks, load_model
from .folder import RunError, read_run
from .generation import generate_texts
from .progress import progress_bars


def predict_run(
    run_dir: str | Path,
    task: str,
    rows: Sequence[Mapping[str, Any]] | str | Path,
    model: str | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Each row with its ``prediction`` and the generated ``text``.

    A prediction is the index of a class or a number, or None where the text is neither.

    Args:
        run_dir: folder of the run.
        task: one of the run's.
        rows: with the task's text columns; or the name of a JSON-lines file of them.
        model: where the T5 is now, if not where the run had it.

    Raises:
        RunError, CheckpointError, DataError, OSError: naming what is wrong.
    """
    console = console or Console()
    run, specs, _ = read_run(run_dir)
    known_tasks([task], specs)
    spec = specs[task]
    placed = read_jsonl(rows) if isinstance(rows, (str, Path)) else [(f"row {i}", row) for i, row in enumerate(rows, 1)]
    sources = [spec.source(row, where) for where, row in placed]
    adapted, tokenizer = load_model(run_dir, run, model, console)
    with progress_bars(console) as progress:
        bar = progress.add_task(f"predicting {task}", total=len(sources), note="")
        texts = generate_texts(
            adapted,
            tokenizer,
            spec,
            sources,
            run.eval_batch_size,
            run.max_source_length,
            lambda n: progress.advance(bar, n),
        )
    return [{**row, "prediction": spec.parse(text), "text": text} for (_, row), text in zip(placed, texts, strict=True)]


def row_of_texts(run_dir: str | Path, task: str, texts: Sequence[str]) -> dict[str, str]:
    """One row of the texts of a task's columns, in order. RunError where they are not as many."""
    _, specs, _ = read_run(run_dir)
    known_tasks([task], specs)
    spec: TaskSpec = specs[task]
    if len(texts) != len(spec.columns):
        raise RunError(f"{task} has {len(spec.columns)} texts ({', '.join(spec.columns)}), got {len(texts)}")
    return {aliases[0]: text for aliases, text in zip(spec.columns.values(), texts, strict=True)}
