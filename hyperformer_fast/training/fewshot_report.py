"""Present a few-shot study: its summary over seeds, a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..atomic import write_file
from .report import PLOT_STYLE, TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, TABLE_NAME, PLOT_NAME = "fewshot.json", "fewshot.md", "fewshot.png"


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the cells of one method and number of rows over their seeds.

    ``deviation`` is the standard deviation of a sample (over n - 1), None for a single seed.
    """
    scores = [cell["score"] for cell in cells]
    return {
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "scores": scores,
        "majority": statistics.fmean(cell["majority"]["score"] for cell in cells),
        "init_from": [cell["init_from"] for cell in cells],
        "split": cells[0]["split"],
        "rows": cells[0]["rows"],
        "trained_parameters": cells[0]["trained_parameters"],
    }


def _title(label: str) -> str:
    variant, bracket, rest = label.partition(" (")
    return TITLES.get(variant, variant) + bracket + rest


def _rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    for samples in map(str, results["samples"]):
        cells = [method["cells"][samples] for method in results["methods"].values()]
        shown = [
            f"{cell['mean']:.1f}" + ("" if cell["deviation"] is None else f" ± {cell['deviation']:.1f}")
            for cell in cells
        ]
        yield [samples, f"{statistics.fmean(cell['majority'] for cell in cells):.1f}", *shown]


def _headings(results: Mapping[str, Any]) -> list[str]:
    return ["rows", "majority class of the rows", *map(_title, results["methods"])]


def _caption(results: Mapping[str, Any]) -> str:
    cell = next(iter(next(iter(results["methods"].values()))["cells"].values()))
    what = "" if results["train"] == "all" else ", the task embedding alone trained"
    length = "max_steps" if "max_steps" in results["training"] else "num_train_epochs"
    rows, seeds, steps = (
        f"{count:g} {word}{'s' * (count != 1)}"
        for count, word in (
            (cell["rows"], "row"),
            (results["seeds"], "seed"),
            (results["training"][length], {"max_steps": "step", "num_train_epochs": "epoch"}[length]),
        )
    )
    return f"Transfer to {results['task']}: {cell['split']}, {rows}, percent, {seeds}, {steps}{what}"


def table(results: Mapping[str, Any], caption: str | None = None) -> Table:
    """Return mean and deviation of each method and number of rows as a table for the terminal.

    Args:
        results: the content of ``fewshot.json``.
        caption: what the table shows; None for the task, the seeds and the steps.
    """
    out = Table(title=Text(_caption(results) if caption is None else caption))
    for heading in _headings(results):
        out.add_column(Text(heading), justify="right")
    for row in _rows(results):
        out.add_row(*row)
    return out


def markdown(results: Mapping[str, Any]) -> str:
    """Return the same table in Markdown."""
    headings = _headings(results)
    lines = [f"{_caption(results)}.", "", *(f"| {' | '.join(row)} |" for row in (headings, ["---:"] * len(headings)))]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows(results))]) + "\n"


def plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Plot the score of each method over the number of rows into a PNG, which is replaced atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(PLOT_STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        draw_scores(axis, results)
        axis.set_title(_caption(results), loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
        with write_file(path) as partial:
            figure.savefig(partial, dpi=130, format="png")
        plt.close(figure)


def draw_scores(axis: Axes, results: Mapping[str, Any]) -> None:
    """Draw the score of each method over the number of rows, with its deviation over seeds."""
    samples, methods = results["samples"], results["methods"]
    cells: list[Mapping[str, Any]] = []
    for i, (label, method) in enumerate(methods.items()):
        cells = [method["cells"][str(rows)] for rows in samples]
        # Bars at the same place would hide each other.
        places = [rows * 1.03 ** (i - (len(methods) - 1) / 2) for rows in samples]
        means, deviations = [cell["mean"] for cell in cells], [cell["deviation"] or 0.0 for cell in cells]
        axis.errorbar(places, means, yerr=deviations, marker="o", markersize=4, capsize=3, label=_title(label))
    axis.plot(samples, [cell["majority"] for cell in cells], color="0.5", linestyle=":", label="majority class")
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(samples, [str(rows) for rows in samples])
    axis.set_xlabel("training rows")
    axis.set_ylabel("mean of the task's metrics, percent")
