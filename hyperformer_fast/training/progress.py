"""Progress bars for a terminal, and lines of text for a log."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


def say(console: Console, line: str) -> None:
    """Print a line verbatim: brackets and colons in a name or a path are not taken for markup or an emoji."""
    console.print(Text(line), soft_wrap=True)


def progress_bars(console: Console) -> Progress:
    """Return progress bars that end in a note. They are shown only on a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )


def quiet(trainer: Trainer) -> None:
    """Take away the Trainer's own output, in whose place ours is shown."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


class EvaluationProgress(TrainerCallback):
    """Shows a bar for each part of an evaluation."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.bar: TaskID | None = None

    def begin(self, description: str, rows: int, note: str) -> None:
        self.bar = self.progress.add_task(description, total=rows, note=note)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.progress.advance(self.bar, args.per_device_eval_batch_size * args.world_size)


class TrainingProgress(TrainerCallback):
    """Shows a bar for the run and a line for each evaluation; without a terminal, also ten lines with the loss."""

    def __init__(self, progress: Progress, console: Console):
        self.progress, self.console = progress, console
        self.bar: TaskID | None = None
        self.said = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")
            self.said = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.progress.update(self.bar, note=f"loss {logs['loss']:.3f}")
            if not self.console.is_terminal and state.global_step >= self.said + state.max_steps / 10:
                self.said = state.global_step
                say(self.console, f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.3f}")
        scores = {
            name.removeprefix("eval_").removesuffix("_score"): value for name, value in logs.items() if _shown(name)
        }
        if scores:
            line = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
            say(self.console, f"step {state.global_step}: {line}")


def _shown(name: str) -> bool:
    return name.startswith("eval_") and name.endswith(("_score", "eval_average_metrics", "eval_average_tasks"))
