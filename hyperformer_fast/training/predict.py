"""Predict the labels or the texts of new rows with a saved run.

The rows are read twice: first to check all of them, which needs no model, and then stretch by stretch, of which only
one is in memory. So errors come before any work, and a large file needs no more memory than a small one. (A source that
cannot be read twice, a JSON list and the writing of parquet need all rows at once.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..checkpoint import weights_file
from ..data import DataError, TaskSpec
from ..data.cache import file_print, text_print
from ..model import HyperFormerModel
from .arguments import RunArguments
from .evaluate import known_tasks, load_model, weights_folder
from .folder import RUN_NAME, RunError, kept_tasks, read_run
from .generation import generate_mixed
from .outputs import Columns, Output, check_output, output_for
from .progress import progress_bars, say
from .ranks import on_first, process_group, rank_and_size
from .tables import Row, Source, json_line, open_rows

#: The column that names each row's task, where rows of several tasks stand together.
TASK_COLUMN = "task"

#: How many batches of rows are read at once, and sorted by length.
BATCHES_READ = 32


def predict_run(
    run_dir: str | Path,
    rows: Any,
    task: str | None = None,
    model: str | None = None,
    console: Console | None = None,
    batch_size: int | None = None,
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
        batch_size: rows in a batch; None for the run's ``per_device_eval_batch_size``.

    Raises:
        RunError: the run cannot be used, a task is not the run's, or the rows have columns of both names.
        CheckpointError, DataError, OSError: the weights, a row or a file cannot be used.
    """
    with process_group():
        console = console or Console(quiet=rank_and_size()[0] > 0)
        work = _Work(run_dir, rows, task, model, console, batch_size)
        return [row for stretch in work.stretches() for row in stretch]


def predict_file(
    run_dir: str | Path,
    source: str | Path | None = None,
    output: str | Path | None = None,
    task: str | None = None,
    texts: Sequence[str] | None = None,
    model: str | None = None,
    console: Console | None = None,
    batch_size: int | None = None,
) -> None:
    """Label the rows of a file, or one row of texts, and write them: ``hyperformer-fast predict``.

    The output grows beside its place (``out.csv.partial``) and takes its name when it is whole. If that is interrupted,
    the same call goes on behind the last stretch of rows that was written; one that would write something else is
    refused.

    Args:
        run_dir: the run folder.
        source: the file of the rows, as :func:`predict_run` reads it; None with ``texts``.
        output: the file to write, in the format that its suffix names; it must not be ``source``. None: JSON lines are
            printed to standard output.
        task, model, batch_size: as for :func:`predict_run`.
        texts: one text for each of the task's columns, in order, in place of ``source``.
        console: where to print; None for standard error.

    Raises:
        RunError, CheckpointError, DataError, OSError: as for :func:`predict_run`; or ``output`` cannot be written, or
            is the unfinished output of another call.
    """
    if (source is None) == (texts is None):
        raise RunError("give either a file of rows or the texts of one row")
    if output is not None:
        check_output(output, source, run_dir)
    with process_group():
        first = rank_and_size()[0] == 0
        console = console or Console(stderr=True, quiet=not first)
        rows = source if texts is None else [row_of_texts(run_dir, task, texts)]
        work = _Work(run_dir, rows, task, model, console, batch_size)
        if output is None:
            for stretch in work.stretches():
                if first:
                    encoding = sys.stdout.encoding or "utf-8"
                    sys.stdout.write("".join(json_line(row, encoding) for row in stretch))
                    sys.stdout.flush()
            return
        with contextlib.ExitStack() as stack:
            written: Output | None = None

            def begin() -> int:
                nonlocal written
                written = stack.enter_context(output_for(Path(output), work.rows, work.columns, work.stamp()))
                return written.done

            def add(stretch: list[Row]) -> None:
                assert written is not None
                written.add(stretch)

            def finish() -> None:
                assert written is not None
                written.finish()

            done = on_first(begin)
            if done:
                say(console, f"going on behind row {done} of {work.count}")
            try:
                for stretch in work.stretches(done):
                    on_first(functools.partial(add, stretch))
                    done += len(stretch)
                on_first(finish)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; the same command goes on behind row {done} of {work.count}"
                ) from None
        say(console, f"{work.count} rows in {output}")


class _Work:
    """The rows to predict, all of which were checked, and how.

    Raises:
        RunError, DataError, OSError: as for :func:`predict_run`.
    """

    def __init__(
        self, run_dir: str | Path, rows: Any, task: Any, model: str | None, console: Console, batch_size: int | None
    ):
        self._run_dir, self._model, self._console = run_dir, model, console
        self._run, self._specs = _run_and_tasks(run_dir)
        if batch_size is not None and batch_size < 1:
            raise RunError(f"batch_size must be at least 1, got {batch_size}")
        self._batch_size = batch_size or self._run.training.per_device_eval_batch_size
        rows, self._task = _in_todays_order(rows, task, self._specs)
        if self._task is not None:
            known_tasks([self._task], self._specs)
        self.rows = open_rows(rows)
        found = _survey(self.rows, self._task, self._specs, BATCHES_READ * self._batch_size)
        self.count, self._digest, self._by_name = found.count, found.digest, found.by_name
        self._digests = found.digests
        taken = dict.fromkeys([*found.columns, *self.rows.features])
        added = [_free_column(column, taken, console) for column in ("prediction", "prediction_text")]
        self.columns = Columns(added, [*found.columns, *added])

    def stamp(self) -> dict[str, Any]:
        """Return what tells the output of this work from any other, but for the file's name."""
        weights = weights_file(weights_folder(self._run_dir, Console(quiet=True)))
        content = (Path(self._run_dir) / RUN_NAME).read_text(encoding="utf-8")
        return {
            "hyperformer_fast": __version__,
            "rows": self.count,
            "content of the rows": self._digest,
            "task": self._task,
            "columns": list(self.columns.added),
            "run.json": text_print(content),
            "weights": None if weights is None else file_print(weights),
            "batch_size": self._batch_size,
            "batches that are read at once": BATCHES_READ,
        }

    def stretches(self, done: int = 0) -> Iterator[list[Row]]:
        """Yield the rows behind the first ``done`` ones with their predictions, some batches of rows at a time."""
        digest = hashlib.sha256()
        rows = _digested(self.rows, digest)
        for _ in itertools.islice(rows, done):
            pass
        size = BATCHES_READ * self._batch_size
        if done < self.count:
            adapted, tokenizer = load_model(self._run_dir, self._run, self._model, self._console)
            on_device: Any = adapted  # the annotations of transformers take a device for the model itself
            on_device.to(self._run.training.device)
            decoding = {name: _decoding(self._specs[name], tokenizer, self._run) for name in self._by_name}
            with progress_bars(self._console) as progress:
                bar = progress.add_task("predicting", total=self.count, completed=done, note="")
                advance = functools.partial(progress.advance, bar)
                while stretch := list(itertools.islice(rows, size)):
                    done += len(stretch)
                    # Before they are written, because the same call goes on behind what is written.
                    if self._digests.get(done) != digest.hexdigest():
                        raise _changed()
                    yield self._predicted(stretch, adapted, tokenizer, decoding, advance)
        if digest.hexdigest() != self._digest:
            raise _changed()

    def _predicted(
        self,
        placed: Sequence[tuple[str, Row]],
        adapted: HyperFormerModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Mapping[str, Mapping[str, Any]],
        advance: Any,
    ) -> list[Row]:
        names = [_task_of(row, place, self._task, self._specs, self.rows.features) for place, row in placed]
        tasks = [str(name or next(iter(self._specs))) for name in names]
        sources = [self._specs[name].source_text(row, place) for name, (place, row) in zip(tasks, placed)]
        length = self._run.data.max_source_length
        texts = generate_mixed(adapted, tokenizer, tasks, sources, decoding, self._batch_size, length, advance)
        labelled = []
        for name, (_, row), text in zip(tasks, placed, texts, strict=True):
            spec = self._specs[name]
            found = spec.answer(spec.parse(text), self._by_name[name]), text
            labelled.append({**row, **dict(zip(self.columns.added, found))})
        return labelled


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What all rows together say.

    Args:
        count: how many there are.
        columns: the names of their columns, in the order in which they first occur.
        digest: of their content.
        digests: the same of the first rows, by their number: of each stretch's end.
        by_name: for each task that a row is of, whether its classes are to be given by their names.
    """

    count: int
    columns: Sequence[str]
    digest: str
    digests: Mapping[int, str]
    by_name: Mapping[str, bool]


def _changed() -> RunError:
    return RunError("the rows changed while they were read: start anew")


def _survey(rows: Source, task: str | None, specs: Mapping[str, TaskSpec], size: int) -> _Survey:
    """Check every row, ``size`` of which are a stretch. Raises RunError or DataError for the first that cannot be
    predicted."""
    digest, columns, count = hashlib.sha256(), dict[str, None](), 0
    by_name: dict[str, bool] = {}
    digests: dict[int, str] = {}
    without: str | None = None
    for place, row in _digested(rows, digest):
        count += 1
        if not count % size:
            digests[count] = digest.hexdigest()
        columns.update(dict.fromkeys(row))
        name = _task_of(row, place, task, specs, rows.features)
        if name is None:  # it has no column that would name its task
            without = without or place
            if len(specs) > 1:
                continue
            name = next(iter(specs))
        spec = specs[name]
        spec.source_text(row, place)
        by_name[name] = by_name.get(name, False) or spec.holds_name(row)
    if without is not None and TASK_COLUMN in columns:
        raise _no_task(without, None, specs)
    if without is not None and len(specs) > 1:
        raise RunError(
            f"name the task of the rows, or add a column {TASK_COLUMN!r} to them; this run has {', '.join(specs)}"
        )
    for name in by_name:
        by_name[name] = by_name[name] or _declared_by_name(specs[name], rows)
    digests[count] = digest.hexdigest()
    return _Survey(count, list(columns), digest.hexdigest(), digests, by_name)


def _digested(rows: Iterable[tuple[str, Row]], digest: Any) -> Iterator[tuple[str, Row]]:
    for place, row in rows:
        digest.update(json.dumps(row, default=str, skipkeys=True).encode() + b"\n")
        yield place, row


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


def _task_of(
    row: Row, place: str, task: str | None, specs: Mapping[str, TaskSpec], features: Mapping[str, Any]
) -> str | None:
    """Return the name of a row's task, None where neither the call nor the row names it."""
    named = row.get(TASK_COLUMN)
    label_names = getattr(features.get(TASK_COLUMN), "names", None)
    if label_names is not None and isinstance(named, int) and 0 <= named < len(label_names):
        named = label_names[named]
    known = isinstance(named, str) and named in specs
    if task is not None:
        # A column of that name may hold anything else, but a row of another task must not be taken for this one's.
        if known and named != task:
            raise DataError(f"{place}: column {TASK_COLUMN!r} says {named!r}, but the task given is {task!r}")
        return task
    if TASK_COLUMN not in row:
        return None
    if not known:
        raise _no_task(place, named, specs)
    return str(named)


def _no_task(place: str, named: Any, specs: Mapping[str, TaskSpec]) -> DataError:
    return DataError(
        f"{place}: column {TASK_COLUMN!r} must be the name of one of the run's tasks ({', '.join(specs)}), got "
        f"{named!r}"
    )


def _declared_by_name(spec: TaskSpec, rows: Source) -> bool:
    """Return whether the classes of a task's rows are to be given by their names, whatever labels the rows have."""
    if spec.rows_have_names:
        return True
    features = (rows.features.get(column) for column in spec.label_columns)
    # Also in another order than the task's, where the index of a class would be that of another name.
    return any(sorted(getattr(each, "names", None) or [""]) == sorted(map(str, spec.label_names)) for each in features)


def _free_column(column: str, taken: Iterable[str], console: Console) -> str:
    """Return a name for a new column that no row has: ``column`` if possible, else ``hyperformer_<column>``."""
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
