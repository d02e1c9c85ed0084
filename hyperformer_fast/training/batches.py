"""The batches that a training takes from a dataset with several tasks, from any step on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import TaskBatchSampler
from ..task_order import TaskOrder


def task_of_rows(dataset: Any, tasks: Sequence[str], order: TaskOrder | None = None) -> NDArray[np.int64]:
    """Return the index in ``tasks`` of each row's task, as an int64 array.

    Args:
        dataset: rows with a column ``task_index`` (indices in ``tasks``) or ``task`` (names, or a ``ClassLabel`` of
            them). With a single task neither is needed.
        tasks: the model's tasks.
        order: what indices meant before tasks of the model were removed.

    Raises:
        ValueError: there is no such column, or a row has an unknown task, or an index that meant another one.
    """
    columns = getattr(dataset, "column_names", None) or (list(dataset[0]) if len(dataset) else [])
    # Names, which ``encode`` gives as well, are in no doubt.
    if "task_index" in columns and not (order is not None and order.stale and "task" in columns):
        found = np.asarray(_column(dataset, "task_index"), dtype=np.int64)
        if order is not None and order.stale:
            order.expect_current(np.unique(found).tolist(), tasks)
        beyond = found[(found < 0) | (found >= len(tasks))]
        if beyond.size:
            raise ValueError(
                f"column 'task_index' has {beyond[0]}; the model's {len(tasks)} tasks are 0 to {len(tasks) - 1}"
            )
        return found
    if "task" not in columns:
        if len(tasks) == 1:
            return np.zeros(len(dataset), dtype=np.int64)
        raise ValueError(
            f"the dataset has no column 'task' or 'task_index', but the model has the tasks {', '.join(tasks)}; its "
            f"columns are {', '.join(columns) or 'none'}"
        )
    values = list(_column(dataset, "task"))
    names = class_names(dataset)
    if names is not None:
        values = [names[value] for value in values]
    index = {name: i for i, name in enumerate(tasks)}
    unknown = next((value for value in dict.fromkeys(values) if value not in index), None)
    if unknown is not None:
        cure = "" if isinstance(unknown, str) else "; call a column of indices 'task_index', or make it a ClassLabel"
        raise ValueError(f"column 'task' has {unknown!r}; the model's tasks are {', '.join(tasks)}{cure}")
    return np.fromiter((index[value] for value in values), dtype=np.int64, count=len(values))


def class_names(dataset: Any) -> list[str] | None:
    """Return the names behind the integers of a column ``task`` that is a ClassLabel."""
    return getattr((getattr(dataset, "features", None) or {}).get("task"), "names", None)


def _column(dataset: Any, name: str) -> Any:
    if hasattr(dataset, "with_format"):
        return dataset.with_format(None)[name][:]
    return [dataset[i][name] for i in range(len(dataset))]


class EpochBatches:
    """Cuts the one stream of a run's batches into epochs, which the Trainer asks for one after the other.

    The stream depends on nothing but the sampler, so a resumed run goes on where it stopped, and a run that is
    lengthened trains on what a longer run would have trained on.

    Args:
        sampler: the batches of the whole run, as positions in the rows sorted by task.
        order: the row at each position.
        steps: optimizer steps in an epoch.
        next_step: returns the optimizer step that the Trainer takes next, counted from 0; None if it takes no more.
    """

    def __init__(
        self, sampler: TaskBatchSampler, order: NDArray[np.int64], steps: int, next_step: Callable[[], int | None]
    ):
        self.sampler, self.order, self.steps, self.next_step = sampler, order, steps, next_step
        self._stream: Iterator[list[int]] = iter(())
        self._taken: int | None = None

    def __len__(self) -> int:
        return self.steps * self.sampler.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        step = self.next_step()
        if step is None:
            return
        if self._taken is None:
            # A Trainer that resumes within an epoch skips the batches of that epoch itself.
            step -= step % self.steps
        begin = step * self.sampler.accumulation
        if self._taken is None or self._taken > begin:
            self._stream, self._taken = iter(self.sampler), 0
        for _ in itertools.islice(self._stream, begin - self._taken):
            pass
        self._taken = begin
        for batch in itertools.islice(self._stream, len(self)):
            self._taken += 1
            yield self.order[batch].tolist()
