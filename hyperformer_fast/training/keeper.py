"""Prepare a run's folder once there is something to keep in it, and see that it stays the run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import TaskData
from .arguments import RunArguments
from .folder import BEST, RUN_NAME, checkpoints, clear, remove, remove_checkpoint, rotate, sweep, write_run
from .lock import RunLock
from .progress import say


class FolderKeeper(TrainerCallback):
    """Prepares the run folder on rank 0 once the first step is trained, and checks later that it is still the run's.

    A run that fails before its first step (a refused backend, lack of memory) therefore leaves the folder unchanged.

    Args:
        folder: the run folder.
        run, data: what run.json says.
        lock: the run's lock on the folder.
        checkpoint: the checkpoint that the run resumes from.
        clear_first: remove the files of an earlier run.
        console: where to warn.
        begun: called once the folder is prepared.
    """

    def __init__(
        self,
        folder: Path,
        run: RunArguments,
        data: dict[str, TaskData],
        lock: RunLock,
        checkpoint: Path | None,
        clear_first: bool,
        console: Console,
        begun: Callable[[], None],
    ):
        self.folder, self.run, self.data, self.lock, self.console = folder, run, data, lock, console
        self.checkpoint, self.clear_first, self.begun = checkpoint, clear_first, False
        self.tell_begun = begun
        self.best: str | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.best = state.best_model_checkpoint
        if not self.begun or control.should_save or control.should_evaluate:
            self.keep()

    def keep(self) -> None:
        """Make sure that the run may write to its folder. Raises RunError if another training now writes to it."""
        if self.lock.renew() or (self.begun and not (self.folder / RUN_NAME).is_file()):
            lost = f"warning: {self.folder} or its {RUN_NAME} was deleted during the run"
            say(self.console, f"{lost}; it is created again, without its earlier files")
            self._write()
        if not self.begun:
            self._begin()
            self.begun = True
            self.tell_begun()

    def _begin(self) -> None:
        if self.clear_first:
            clear(self.folder)
        elif self.checkpoint is None:
            # Otherwise the best weights of an earlier attempt could be mistaken for this run's.
            remove(self.folder / BEST)
        else:
            # The run goes on from this checkpoint, so later ones are no longer its own.
            step = int(self.checkpoint.name.removeprefix("checkpoint-"))
            for later in checkpoints(self.folder):
                if int(later.name.removeprefix("checkpoint-")) > step:
                    remove_checkpoint(later)
        sweep(self.folder)
        rotate(self.folder, self.run.training.save_total_limit, self.best)
        self._write()

    def _write(self) -> None:
        write_run(self.folder, self.run, self.data, self.run.training.world_size)
