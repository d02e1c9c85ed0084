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

    No column of a row is replaced: where a row has one of these names, the result takes the name
    ``hyperformer_prediction`` or ``hyperformer_text`` in all of them, which is said on ``console``.

    A prediction is a number or a class, as the training rows or these rows hold it: by its name where their labels are
    names, else by its index. It is None where the text is neither.

    Args:
        run_dir: folder of the run.
        task: one of the run's.
        rows: with the task's text columns; or the name of a JSON-lines file of them.
        model: where the T5 is now, if not where the run had it.

    Raises:
        RunError: also where the rows have columns of both names.
        CheckpointError, DataError, OSError: naming what is wrong.
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
    """The name under which all rows can take a result: ``column``, or, where one has it already, another."""
    taken = {name for _, row in placed for name in row}
    if column not in taken:
        return column
    other = f"hyperformer_{column}"
    if other in taken:
        raise RunError(f"the rows have columns {column!r} and {other!r}: rename one, nothing of theirs is replaced")
    console.print(
        f"the rows have a column {column!r} of their own: the model's is {other!r}", soft_wrap=True, markup=False
    )
    return other


def row_of_texts(run_dir: str | Path, task: str, texts: Sequence[str]) -> dict[str, str]:
    """One row of the texts of a task's columns, in order. RunError where they are not as many."""
    _, specs, _ = read_run(run_dir)
    known_tasks([task], specs)
    spec: TaskSpec = specs[task]
    if len(texts) != len(spec.columns):
        raise RunError(f"{task} has {len(spec.columns)} texts ({', '.join(spec.columns)}), got {len(texts)}")
    return {aliases[0]: text for aliases, text in zip(spec.columns.values(), texts, strict=True)}
