"""``hyperformer-fast export``: the graphs of a saved run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..training.evaluate import known_tasks, load_model
from ..training.folder import kept_tasks, read_run
from ..training.predict import _decoding
from ..training.progress import say
from .artifact import export_model
from .formats import expect_packages


def export_run(
    run_dir: str | Path,
    format: str,
    output: str | Path,
    tasks: Sequence[str] | None = None,
    model: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Export a saved run as :func:`~hyperformer_fast.export.export_model` does, with its tokenizer and the way in which
    each task is decoded.

    Args:
        run_dir: the run folder.
        format: ``"torch"``, ``"onnx"`` or ``"aoti"``.
        output: the folder to write.
        tasks: the tasks to export, in this order; by default all of the run's model.
        model: where the T5 is now; None for where it was when the run was trained.
        console: where to print; None for standard output.

    Returns:
        What ``export.json`` holds.

    Raises:
        RunError, CheckpointError, MissingPackage, ValueError, OSError: the run cannot be used or exported, or the
            folder not be written.
    """
    console = console or Console()
    expect_packages(format)
    run, own, content = read_run(run_dir)
    specs = {**own, **kept_tasks(content)}
    if tasks is not None:
        known_tasks(tasks, specs)
    adapted, tokenizer = load_model(run_dir, run, model, console)
    names = list(adapted.hyperformer_config.tasks if tasks is None else tasks)
    generation = {name: _decoding(specs[name], tokenizer, run) for name in names if name in specs}
    description = export_model(adapted, output, format, names, tokenizer, generation)
    size = sum(each["bytes"] for each in description["files"].values())
    say(console, f"{len(names)} tasks in {output} ({size / 1e6:,.1f} MB)")
    return description
