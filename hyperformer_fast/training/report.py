"""Present a run's results: a table for the terminal, and a plot of its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: matplotlib's settings of every plot. parse_math: dollar signs in a task's name do not begin a formula.
PLOT_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}

TITLES = {
    "hyperformer++": "HyperFormer++",
    "hyperformer": "HyperFormer",
    "hyperformer-shared": "HyperFormer (shared)",
    "adapters": "adapters",
    "finetuning": "fine-tuning",
}


def results_table(results: Mapping[str, Any]) -> Table:
    """Build a table with a row for each metric of each task, for the model and the majority class, and the averages.

    Args:
        results: the content of metrics.json.
    """
    splits = sorted({task["split"] for task in results["tasks"].values()})
    table = Table("task", "metric", title=f"Results on {' / '.join(splits)}, in percent")
    for heading in ("majority class", TITLES[results["variant"]]):
        table.add_column(heading, justify="right")
    for name, task in results["tasks"].items():
        for metric, value in task["metrics"].items():
            if metric != "score":
                # rich would take brackets in a plain string for markup.
                table.add_row(Text(name), metric, f"{task['majority'][metric]:.1f}", f"{value:.1f}")
    table.add_section()
    for name, over in (("average", "of metrics"), ("", "of tasks")):
        key = f"average_{over.removeprefix('of ')}"
        table.add_row(name, over, f"{results[f'majority_{key}']:.1f}", f"{results[key]:.1f}", style="bold")
    return table


def notes(results: Mapping[str, Any]) -> list[str]:
    """Return remarks that a reader of the table needs."""
    lines = []
    validation = ", ".join(name for name, task in results["tasks"].items() if task["split"] == "validation")
    if validation:
        lines.append(
            f"{validation}: reported on validation, because there is no test split or validation was requested"
        )
    for name, task in results["tasks"].items():
        if task["unparsed"]:
            lines.append(
                f"{name}: {task['unparsed']} of {task['rows']} generated texts are no label and count as wrong"
            )
        if task.get("distinct") == 1 < task["rows"]:
            lines.append(f"{name}: one text was generated for all {task['rows']} rows; its loss may still have fallen")
    return lines


def plot_curves(
    history: Sequence[Mapping[str, Any]],
    majority: Mapping[str, float],
    path: str | Path,
    title: str = "HyperFormer++",
    rows: int | None = None,
) -> None:
    """Plot the training loss, and each task's validation score beside that of its majority class, into a PNG.

    Args:
        history: the Trainer's log, whose entries have ``step`` and ``loss``, or ``step`` and ``eval_<task>_score``.
        majority: score of the majority class on the same rows, by task.
        path: path of the PNG, which is replaced atomically.
        title: name of the model, and what else tells the run from others.
        rows: at most how many rows of each task were scored; None for all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    with plt.rc_context(PLOT_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=(1, 1.25), layout="constrained")
        _plot_loss(left, [(entry["step"], entry["loss"]) for entry in history if "loss" in entry])
        _plot_scores(right, history, majority, "" if rows is None else f", at most {rows} rows of each task")
        figure.suptitle(title)
        for axis in (left, right):
            axis.set_xlabel("optimizer step")
            axis.set_xlim(left=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25)
        with write_file(path) as partial:
            figure.savefig(partial, dpi=130, format="png")
        plt.close(figure)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to ``window - 1`` values before it."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def shown_name(task: str) -> str:
    """A task's name for a legend: matplotlib leaves out labels that begin with an underscore."""
    return f" {task}" if task.startswith("_") else task


def _plot_loss(axis: Axes, points: list[tuple[int, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_title("Training loss", loc="left", fontsize=10)
    axis.set_ylabel("cross-entropy per token")
    if not points:
        return
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 15)
    axis.plot(steps, values, color="0.8", linewidth=1, label="as logged")
    axis.plot(steps, smoothed(values, window), color="C0", linewidth=2, label=f"mean of {window}")
    axis.set_yscale("log")
    # The loss often stays within a decade, where plain numbers are easier to read than powers of ten.
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False)


def _plot_scores(axis: Axes, history: Sequence[Mapping[str, Any]], majority: Mapping[str, float], rows: str) -> None:
    axis.set_title(f"Validation score{rows} (dotted: majority class)", loc="left", fontsize=10)
    axis.set_ylabel("mean of the task's metrics, percent")
    lines = {task: f"eval_{task}_score" for task in majority} | {"average": "eval_average_metrics"}
    for i, (task, key) in enumerate(lines.items()):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if not points:
            continue
        is_average = key == "eval_average_metrics"
        color = "black" if is_average else f"C{i % 10}"
        axis.plot(
            *zip(*points, strict=True),
            color=color,
            marker="o",
            markersize=4,
            linewidth=2.5 if is_average else 1.5,
            # Many tasks end at 100 percent, where the last line hides the others.
            label=f"{shown_name(task)}: {points[-1][1]:.1f}",
        )
        if not is_average:
            axis.axhline(majority[task], color=color, linestyle=":", linewidth=1.2)
    if axis.lines:
        axis.set_ylim(top=102)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
