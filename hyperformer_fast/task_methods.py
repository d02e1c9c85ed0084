"""The methods of a model by which tasks come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from . import task_changes
from .saving import SavedModel
from .task_order import TaskOrder

if TYPE_CHECKING:
    from .hypernetwork import AdapterSource
    from .model import HyperFormerModel


class ManagedTasks(SavedModel):
    """The part of a model that adds and removes tasks.

    No other weight moves: all other parameters stay the same objects with the same bits, and forwards that run in other
    threads go on with the tasks that they began with. What was kept for inference is made anew at the next forward.

    An optimizer made before does not know a new parameter, and keeps one that was removed, with its state. It goes by
    the order of parameters, so that its saved state does not fit the model any more: after tasks have changed, train
    with a new optimizer (a new Trainer), and wrap the model in DistributedDataParallel anew.
    """

    _task_order: TaskOrder

    def add_task(self, name: str, init_from: str | list[str] | None = None) -> None:
        """Add a task, with an embedding of its own.

        Args:
            name: the new task's name.
            init_from: a task to copy the embedding of, a list of tasks to take the mean of, or None for a standard
                normal draw.

        An optimizer made before does not know the new parameter.

        Raises:
            ValueError: the name is taken, or ``init_from`` names an unknown task.
        """
        with self._task_order.lock:
            self.task_embeddings.add_task(name, init_from)
            self.hyperformer_config = self.task_embeddings.config
            for net in self.hypernetworks.values():
                cast("AdapterSource", net).add_task(self.hyperformer_config, name, init_from)
            self._task_order.changed(self.hyperformer_config.tasks)

    def remove_task(self, name: str) -> None:
        """Remove a task, and its embedding (or adapters) unless another task uses the same.

        Names go on to stand for the same tasks. The tasks behind the removed one move up in
        ``hyperformer_config.tasks``, so that a ``task_index`` which was computed before may now stand for another task.
        Such an index is refused with a ValueError (and becomes NaN on a GPU and in a compiled graph) until
        :meth:`renumber_tasks` is called. The collator gives names in place of indices until then.

        Raises:
            ValueError: there is no such task, or no other one.
            RuntimeError: the hypernetworks are spread over processes or offloaded, or the gradients of the tasks are
                being watched.
        """
        task_changes.remove(self._model, name)

    def rename_task(self, old: str, new: str) -> None:
        """Give a task another name. Its index and its parameters stay what they are.

        Raises:
            ValueError: there is no task ``old``, or ``new`` is taken.
            RuntimeError: as :meth:`remove_task`.
        """
        task_changes.rename(self._model, old, new)

    def renumber_tasks(self) -> None:
        """Let each ``task_index`` stand for the task that has this place in ``hyperformer_config.tasks`` now.

        To be called after :meth:`remove_task` once nothing holds indices that were computed before: no data set with a
        column ``task_index`` and without names, no worker of a data loader, no batch that is on its way.
        """
        with self._task_order.lock:
            self._task_order.accept(self.hyperformer_config.tasks)

    @property
    def _model(self) -> HyperFormerModel:
        return cast("HyperFormerModel", self)
