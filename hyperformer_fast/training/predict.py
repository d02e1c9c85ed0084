"""Predict the labels of new rows with a saved run."""

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
    """Return each row with two more columns, its ``prediction`` and the generated ``text``.

    No column of a row is replaced: if any row already has one of these columns, the new column is named
    ``hyperformer_prediction`` or ``hyperformer_text`` in all rows, and a line on ``console`` says so.

    A prediction is a number or a class. A class is given by its name if the labels of the training rows or of these
    rows are names, else by its index. The prediction is None if the generated text is no label.

    Args:
        run_dir: the run folder.
        task: one of the run's tasks.
        rows: rows with the task's text columns, or the path of a JSON-lines file of them.
        model: where the T5 is now; None for where it was when the run was trained.
        console: where to print; None for standard output.

    Raises:
        RunError: the run cannot be used, or the rows have columns of both names.
        CheckpointError, DataError, OSError: the weights, a row or a file cannot be used.
    """
    console = console or Console()
    run, specs, _ = read_run(run_dir)
    known_tasks([task], specs)
    spec = specs[task]
    placed = read_jsonl(rows) if isinstance(rows, (str, Path)) else [(f"row {i}", row) for i, row in enumerate(rows, 1)]
    sources = [spec.source(row, where) for where, row in placed]
    prediction, generated = (_free_column(column, placed, console) for column in ("prediction", "text"))
    by_name = spec.rows_have_names or any(spec.holds_name(row) for _, row in placed)
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
    return [
        {**row, prediction: spec.answer(spec.parse(text), by_name), generated: text}
        for (_, row), text in zip(placed, texts, strict=True)
    ]


def _free_column(column: str, placed: Sequence[tuple[str, Mapping[str, Any]]], console: Console) -> str:
    """Return a name for a new column that no row has: ``column`` if possible, else ``hyperformer_<column>``."""
    taken = {name for _, row in placed for name in row}
    if column not in taken:
        return column
    other = f"hyperformer_{column}"
    if other in taken:
        raise RunError(f"the rows have columns {column!r} and {other!r}: rename one of them, so that none is replaced")
    console.print(
        f"the rows already have a column {column!r}: the new one is named {other!r}", soft_wrap=True, markup=False
    )
    return other


def row_of_texts(run_dir: str | Path, task: str, texts: Sequence[str]) -> dict[str, str]:
    """Make a row of the texts of a task's columns, in order. Raises RunError if their number does not match."""
    _, specs, _ = read_run(run_dir)
    known_tasks([task], specs)
    spec: TaskSpec = specs[task]
    if len(texts) != len(spec.columns):
        raise RunError(f"{task} has {len(spec.columns)} texts ({', '.join(spec.columns)}), got {len(texts)}")
    return {aliases[0]: text for aliases, text in zip(spec.columns.values(), texts, strict=True)}
