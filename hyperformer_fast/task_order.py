"""What the task indices of a model mean while tasks come and go.

``task_index`` counts a model's tasks in their order. Where a task is removed, those behind it move up, and an index
that a collator, a data loader's worker or a caller computed before would silently stand for another task. So a model
remembers what each index meant first, and refuses one that stands for another task now, until it is told that nobody
holds old ones. Names are never in doubt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class TaskOrder:
    """The meanings of a model's task indices, and the lock under which its tasks change.

    A forward takes the lock while it chooses its weights, so that it sees the tasks as they are before or after a
    change in another thread, and never in between. Copies and pickles have a lock of their own.
    """

    def __init__(self, tasks: Sequence[str]):
        self.lock = threading.RLock()
        self._meant: list[str | None] = []
        #: Indices that stand for another task than they did, with that task; None where they meant several.
        self.stale: Mapping[int, str | None] = {}
        self.accept(tasks)

    def __reduce__(self) -> tuple[object, ...]:
        return _copy_of, (list(self._meant), dict(self.stale))

    def accept(self, tasks: Sequence[str]) -> None:
        """Let each index stand for the task that has this place now."""
        self._meant, self.stale = list(tasks), {}

    def changed(self, tasks: Sequence[str]) -> None:
        """Take note of the tasks after some were added or removed."""
        self._meant += tasks[len(self._meant) :]
        self.stale = {i: meant for i, (task, meant) in enumerate(zip(tasks, self._meant)) if task != meant}

    def renamed(self, old: str, new: str, tasks: Sequence[str]) -> None:
        """Take note of a task's new name. What meant a task that had this name and was removed means none now."""
        self._meant = [None if meant == new else new if meant == old else meant for meant in self._meant]
        self.changed(tasks)

    def expect_current(self, indices: Iterable[int], tasks: Sequence[str]) -> None:
        """Raise ValueError where an index may have been computed for other tasks than ``tasks``, the present ones."""
        for index in sorted({int(each) for each in indices} & self.stale.keys()):
            meant = self.stale[index]
            before = "another task" if meant is None else repr(meant)
            raise ValueError(
                f"task_index {index} stood for {before} before tasks of this model were removed, and stands for "
                f"{tasks[index]!r} now: name the tasks (task=), or call renumber_tasks() once nothing holds old indices"
            )

    def checked(self, task_index: Tensor, tasks: Sequence[str]) -> Tensor:
        """Return ``task_index`` [B] if none is stale.

        On a CPU a stale one is an error. On a device, and in a compiled graph, where no number can be looked at, it
        becomes an index out of range.

        Raises:
            ValueError: as :meth:`expect_current`.
        """
        if not self.stale:
            return task_index
        if task_index.device.type == "cpu" and not torch.compiler.is_compiling():
            self.expect_current(task_index.tolist(), tasks)
            return task_index
        stale = torch.tensor(list(self.stale), dtype=task_index.dtype, device=task_index.device)
        return torch.where(torch.isin(task_index, stale), len(tasks), task_index)


def _copy_of(meant: list[str | None], stale: dict[int, str | None]) -> TaskOrder:
    order = TaskOrder(())
    order._meant, order.stale = meant, stale
    return order
