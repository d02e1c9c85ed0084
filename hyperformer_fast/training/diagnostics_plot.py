"""The plot of a run's diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_file
from ..task_similarity import COLLAPSED
from .diagnostics import PREFIX
from .report import PLOT_STYLE, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The most tasks that have a colour of their own.
_COLOURS = 10

_Points = tuple[list[float], list[float]]


def has_diagnostics(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the Trainer's log has figures to plot."""
    return any(name.startswith(PREFIX) for entry in history for name in entry)


def plot_diagnostics(history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "HyperFormer++") -> None:
    """Plot how far apart the tasks are, and what their gradients do to each other, into a PNG.

    Args:
        history: the Trainer's log, whose entries have ``step`` and what ``diagnostics_steps`` makes it log.
        path: path of the PNG, which is replaced atomically.
        title: name of the model.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    entries = [entry for entry in history if any(name.startswith(PREFIX) for name in entry)]
    with plt.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11.5, 9.0), layout="constrained")
        figure.suptitle(f"{title}: diagnostics", x=0.01, ha="left", fontsize=12)
        _plot_cosines(axes[0, 0], entries)
        _plot_variation(axes[0, 1], entries)
        _plot_shares(axes[1, 0], entries)
        _plot_conflicts(axes[1, 1], entries)
        for axis in axes.flat:
            axis.set_xlabel("optimizer step")
            axis.set_xlim(0, max([float(entry["step"]) for entry in entries], default=1.0))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
            axis.grid(alpha=0.25)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=9)
            else:
                axis.text(0.5, 0.5, "nothing was logged for this", transform=axis.transAxes, ha="center", color="0.5")
        with write_file(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
        plt.close(figure)


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> _Points:
    found = [(entry["step"], entry[PREFIX + name]) for entry in entries if PREFIX + name in entry]
    return [step for step, _ in found], [value for _, value in found]


def _draw(axis: Axes, points: _Points, label: str | None, **style: Any) -> None:
    if points[0]:
        axis.plot(*points, label=label, marker="o", markersize=3, **style)


def _stacks(entries: Sequence[Mapping[str, Any]], figure: str) -> list[str]:
    """The stacks that have this figure."""
    names = (name.removeprefix(PREFIX) for entry in entries for name in entry if name.endswith(f"/{figure}"))
    return list(dict.fromkeys(name.removesuffix(f"/{figure}") for name in names))


def _plot_cosines(axis: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("How alike the tasks are", loc="left")
    axis.set_ylabel("mean cosine of two tasks")
    _draw(axis, _points(entries, "task_embedding_cosine_mean"), "task embeddings", color="black")
    for i, stack in enumerate(_stacks(entries, "weight_cosine_mean")):
        inputs, weights = (_points(entries, f"{stack}/{what}_cosine_mean") for what in ("input", "weight"))
        _draw(axis, inputs, f"generators' inputs, {stack}", color=f"C{i}", linestyle="--")
        _draw(axis, weights, f"adapters' weights, {stack}", color=f"C{i}")
    axis.set_ylim(top=1.02)


def _plot_variation(axis: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_title("What of the adapters' weights depends on the task", loc="left")
    axis.set_ylabel("variance over tasks / mean square")
    for i, stack in enumerate(_stacks(entries, "weight_variation")):
        _draw(axis, _points(entries, f"{stack}/weight_variation"), stack, color=f"C{i}")
    if axis.lines:
        axis.axhline(COLLAPSED / 2, color="C3", linestyle=":", label="collapsed")
        axis.set_yscale("log")
        # Plain numbers, because dollar signs begin no formula here.
        axis.yaxis.set_major_locator(LogLocator(numticks=9))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(COLLAPSED / 5, 1.3)


def _plot_shares(axis: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("Each task's share of the gradient", loc="left")
    axis.set_ylabel("norm / sum of norms")
    start = f"{PREFIX}gradient_share/"
    tasks = list(dict.fromkeys(name.removeprefix(start) for each in entries for name in each if name.startswith(start)))
    for i, task in enumerate(tasks):
        label = shown_name(task) if i < _COLOURS else "other tasks" if i == _COLOURS else None
        _draw(axis, _points(entries, f"gradient_share/{task}"), label, color=f"C{i}" if i < _COLOURS else "0.7")
    if tasks:
        axis.set_ylim(bottom=0)


def _plot_conflicts(axis: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("How the tasks' gradients agree", loc="left")
    axis.set_ylabel("cosine of two tasks' gradients")
    _draw(axis, _points(entries, "gradient_cosine_mean"), "mean of all pairs", color="C0")
    _draw(axis, _points(entries, "gradient_cosine_min"), "pair that conflicts most", color="C3")
    _draw(axis, _points(entries, "gradient_conflicts"), "share of pairs that conflict", color="0.6", linestyle="--")
    if axis.lines:
        axis.axhline(0.0, color="black", linewidth=0.8)
