"""Progress for a terminal, and lines for a log."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback


def say(console: Console, line: str) -> None:
    """Print a line as it is: what a name or a path has in brackets or colons is neither markup nor an emoji."""
    console.print(Text(line), soft_wrap=True)


def progress_bars(console: Console) -> Progress:
    """Bars with a note at their end; shown where there is a terminal."""
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


class TrainingProgress(TrainerCallback):
    """One bar for the run and a line for each evaluation; without a terminal also ten lines with the loss."""

    def __init__(self, progress: Progress, console: Console):
        self.progress, self.console, self.bar, self.said = progress, console, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")
            self.said = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.progress.update(self.bar, note=f"loss {logs['loss']:.3f}")
            if not self.console.is_terminal and state.global_step >= self.said + state.max_steps / 10:
                self.said = state.global_step
                say(self.console, f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.3f}")
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if scores:
            line = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
            say(self.console, f"step {state.global_step}: {line}")
