"""Predict the labels or the texts of new rows with a saved run."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..data import DataError, TaskSpec
from .arguments import RunArguments
from .evaluate import known_tasks, load_model
from .folder import RunError, kept_tasks, read_run
from .generation import generate_texts
from .progress import progress_bars, say
from .ranks import process_group, rank_and_size
from .tables import Table, check_output, json_line, read_table, write_table

#: The column that names each row's task, where rows of several tasks stand together.
TASK_COLUMN = "task"


def predict_run(
    run_dir: str | Path,
    rows: Any,
    task: str | None = None,
    model: str | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Return each row with two more columns, its ``prediction`` and the generated ``prediction_text``.

    No column of a row is replaced: if any row already has one of these columns, the new column is named
    ``hyperformer_prediction`` or ``hyperformer_prediction_text`` in all rows, and a line on ``console`` says so.

    A prediction is a number, a class, or the text itself where the task's target is free text. A class is given by its
    name if the labels of the training rows or of these rows are names, else by its index. The prediction is None if the
    generated text is no label.

    Every process of a ``torchrun`` shares the work, and returns all rows.

    Args:
        run_dir: the run folder.
        rows: rows with the task's text columns: a ``datasets.Dataset``, a sequence of mappings, or the path of a file
            (.jsonl, .json, .csv, .tsv, .parquet) or of a data set's folder.
        task: the task of all rows. None: the column ``task`` of the rows names it (as text, or as a ``ClassLabel``), or
            the run has only one.
        model: where the T5 is now; None for where it was when the run was trained.
        console: where to print; None for standard output.

    Raises:
        RunError: the run cannot be used, a task is not the run's, or the rows have columns of both names.
        CheckpointError, DataError, OSError: the weights, a row or a file cannot be used.
    """
    with process_group():
        return _predict(run_dir, rows, task, model, console or Console(quiet=rank_and_size()[0] > 0)).rows


def predict_file(
    run_dir: str | Path,
    source: str | Path | None = None,
    output: str | Path | None = None,
    task: str | None = None,
    texts: Sequence[str] | None = None,
    model: str | None = None,
    console: Console | None = None,
) -> None:
    """Label the rows of a file, or one row of texts, and write them: ``hyperformer-fast predict``.

    Args:
        run_dir: the run folder.
        source: the file of the rows, as :func:`predict_run` reads it; None with ``texts``.
        output: the file to write, in the format that its suffix names; it must not be ``source``. None: JSON lines are
            printed to standard output.
        task, model: as for :func:`predict_run`.
        texts: one text for each of the task's columns, in order, in place of ``source``.
        console: where to print; None for standard error.

    Raises:
        RunError, CheckpointError, DataError, OSError: as for :func:`predict_run`; or ``output`` cannot be written.
    """
    if (source is None) == (texts is None):
        raise RunError("give either a file of rows or the texts of one row")
    if output is not None:
        check_output(output, source)
    with process_group():
        first = rank_and_size()[0] == 0
        console = console or Console(stderr=True, quiet=not first)
        rows = source if texts is None else [row_of_texts(run_dir, task, texts)]
        table = _predict(run_dir, rows, task, model, console)
        if not first:
            return
        if output is None:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write("".join(json_line(row, encoding) for row in table.rows))
            return
        write_table(Path(output), table)
        say(console, f"{len(table.rows)} rows in {output}")


def _predict(run_dir: str | Path, rows: Any, task: str | None, model: str | None, console: Console) -> Table:
    run, specs = _run_and_tasks(run_dir)
    rows, task = _in_todays_order(rows, task, specs)
    table = read_table(rows)
    names = _tasks_of_rows(table, task, specs)
    sources = [specs[name].source_text(row, place) for name, row, place in zip(names, table.rows, table.places)]
    columns = [_free_column(column, table, console) for column in ("prediction", "prediction_text")]
    adapted, tokenizer = load_model(run_dir, run, model, console)
    on_device: Any = adapted  # the annotations of transformers take a device for the model itself
    on_device.to(run.training.device)
    found: list[tuple[Any, str]] = [(None, "")] * len(sources)
    with progress_bars(console) as progress:
        # Task by task, because each has its own way to decode (beams, longest target).
        for name in dict.fromkeys(names):
            spec, chosen = specs[name], [i for i, of in enumerate(names) if of == name]
            by_name = _by_name(spec, table, chosen)
            bar = progress.add_task(f"predicting {name}", total=len(chosen), note="")
            written = generate_texts(
                adapted,
                tokenizer,
                spec,
                [sources[i] for i in chosen],
                run.training.per_device_eval_batch_size,
                run.data.max_source_length,
                functools.partial(progress.advance, bar),
                **_decoding(spec, tokenizer, run),
            )
            for i, text in zip(chosen, written, strict=True):
                found[i] = spec.answer(spec.parse(text), by_name), text
    labelled = [{**row, **dict(zip(columns, pair))} for row, pair in zip(table.rows, found, strict=True)]
    return Table(labelled, table.places, table.features, columns)


def _run_and_tasks(run_dir: str | Path) -> tuple[RunArguments, dict[str, TaskSpec]]:
    """Return a run's arguments, and all tasks of its model: its own, and those of the run that it started from."""
    run, specs, content = read_run(run_dir)
    return run, {**specs, **kept_tasks(content)}


def _decoding(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, run: RunArguments) -> dict[str, Any]:
    """Return the arguments of ``generate`` with which the run's final evaluation decodes a task."""
    training, data = run.training, run.data
    length = training.generation_max_length or data.test_max_target_length or data.max_target_length
    beams = training.generation_num_beams
    return {**spec.generation_kwargs(tokenizer, length), **({} if beams is None else {"num_beams": beams})}


def _in_todays_order(rows: Any, task: Any, specs: Mapping[str, TaskSpec]) -> tuple[Any, str | None]:
    """Return (rows, task), also of a call that gives them in the order of version 0.1: task first."""
    swapped = isinstance(rows, str) and rows in specs and task is not None
    if swapped and not (isinstance(task, str) and task in specs):
        warnings.warn("predict_run takes the rows before the task", DeprecationWarning, stacklevel=4)
        return task, rows
    return rows, task


def _tasks_of_rows(table: Table, task: str | None, specs: Mapping[str, TaskSpec]) -> list[str]:
    """Return the name of each row's task."""
    if task is not None:
        known_tasks([task], specs)
    elif TASK_COLUMN not in table.columns():
        if len(specs) > 1:
            raise RunError(
                f"name the task of the rows, or add a column {TASK_COLUMN!r} to them; this run has {', '.join(specs)}"
            )
        return list(specs) * len(table.rows)
    label_names = getattr(table.features.get(TASK_COLUMN), "names", None)
    names = []
    for row, place in zip(table.rows, table.places):
        named = row.get(TASK_COLUMN)
        if label_names is not None and isinstance(named, int) and 0 <= named < len(label_names):
            named = label_names[named]
        known = isinstance(named, str) and named in specs
        if task is not None:
            # A column of that name may hold anything else, but a row of another task must not be taken for this one's.
            if known and named != task:
                raise DataError(f"{place}: column {TASK_COLUMN!r} says {named!r}, but the task given is {task!r}")
            names.append(task)
            continue
        if not known:
            raise DataError(
                f"{place}: column {TASK_COLUMN!r} must be the name of one of the run's tasks ({', '.join(specs)}), "
                f"got {named!r}"
            )
        names.append(str(named))
    return names


def _by_name(spec: TaskSpec, table: Table, chosen: Sequence[int]) -> bool:
    """Return whether the classes of a task's rows are to be given by their names."""
    if spec.rows_have_names or any(spec.holds_name(table.rows[i]) for i in chosen):
        return True
    features = (table.features.get(column) for column in spec.label_columns)
    # Also in another order than the task's, where the index of a class would be that of another name.
    return any(sorted(getattr(each, "names", None) or [""]) == sorted(map(str, spec.label_names)) for each in features)


def _free_column(column: str, table: Table, console: Console) -> str:
    """Return a name for a new column that no row has: ``column`` if possible, else ``hyperformer_<column>``."""
    taken = {*table.columns(), *table.features}
    if column not in taken:
        return column
    other = f"hyperformer_{column}"
    if other in taken:
        raise RunError(f"the rows have columns {column!r} and {other!r}: rename one of them, so that none is replaced")
    say(console, f"the rows already have a column {column!r}: the new one is named {other!r}")
    return other


def row_of_texts(run_dir: str | Path, task: str | None, texts: Sequence[str]) -> dict[str, str]:
    """Make a row of the texts of a task's columns, in order. Raises RunError if their number does not match."""
    _, specs = _run_and_tasks(run_dir)
    if task is None and len(specs) > 1:
        raise RunError(f"name the task of the text; this run has {', '.join(specs)}")
    task = task or next(iter(specs))
    known_tasks([task], specs)
    spec: TaskSpec = specs[task]
    if len(texts) != len(spec.columns):
        raise RunError(f"{task} has {len(spec.columns)} texts ({', '.join(spec.columns)}), got {len(texts)}")
    return {aliases[0]: text for aliases, text in zip(spec.columns.values(), texts, strict=True)}
