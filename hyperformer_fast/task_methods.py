"""The methods of a model by which tasks come, go and travel as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from . import task_changes, task_files, task_fitting
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

    def export_task(self, name: str, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write one task to a small safetensors file, which :meth:`import_task` takes into another copy of this model.

        The file holds the task's embedding (its adapters in variant ``"adapters"``) and says what it belongs to: the
        SHA-256 of the hypernetworks, which are all weights that tasks share, and the fingerprint of the T5. It appears
        in one step.

        Args:
            name: the task.
            path: the file to write; its folder is created if necessary.
            overwrite: replace a file of this name.

        Raises:
            ValueError: there is no such task, its values are not finite, or tasks have nothing of their own (variant
                ``"finetuning"``).
            FileExistsError: there is such a file, and ``overwrite`` is False.
            OSError: it cannot be written.
            RuntimeError: as :meth:`remove_task`.
        """
        task_files.export_task(self._model, name, path, overwrite)

    def import_task(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Add the task of a file that :meth:`export_task` wrote. On an error nothing has changed.

        A warning says where the T5 cannot be compared, because it is quantised here or was where the task was exported.
        The task is trained from now on if the model's other tasks are.

        Args:
            path: the file.
            name: the task's name here; None for the one in the file.

        Returns:
            The task's name.

        Raises:
            CheckpointError: (a ValueError) the file is broken, is no task, or belongs to other hypernetworks or another
                T5; the message has both hashes.
            ValueError: the name is taken.
            FileNotFoundError: there is no such file.
            RuntimeError: as :meth:`remove_task`.
        """
        return task_files.import_tasks(self._model, [path], [name])[0]

    def import_tasks(self, paths: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Add the tasks of several files, all or, on an error, none. The errors are those of :meth:`import_task`.

        Returns:
            The tasks' names, in the order of the files.
        """
        return task_files.import_tasks(self._model, paths)

    def fit_task(self, name: str, rows: Any, **options: Any) -> task_fitting.FittedTask:
        """Add a task whose embedding is learned from a few rows: :func:`hyperformer_fast.fit_task`."""
        return task_fitting.fit_task(self._model, name, rows, **options)

    def nearest_task(self, rows: Any, **options: Any) -> list[task_fitting.NearTask]:
        """The tasks by their loss on some rows, best first: :func:`hyperformer_fast.nearest_task`."""
        return task_fitting.nearest_task(self._model, rows, **options)

    @property
    def _model(self) -> HyperFormerModel:
        return cast("HyperFormerModel", self)
