"""Draw the plots of the results; also again, from their JSON, without measuring anything:

    python benchmarks/plots.py [benchmarks/results/adapter-avx512-cpu-2threads.json ...]

Without arguments it redraws every result that a plot is kept of. Each plot is beside its JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from timing import RESULTS, described

#: The label of every axis that shows how a rival compares.
RATIO = "time of the rival over ours\n(above 1: ours is faster)"
#: Steps of a logarithmic axis within a decade, where the axis spans little more than one.
FINE, COARSE = (1, 1.5, 2, 3, 4, 5, 7), (1,)
#: Inches of a figure with one row of the legend, and of each further row.
HEIGHT, LEGEND_ROW = 4.2, 0.22
#: Letters of the legend's font in an inch, and letters that a line's sample takes the room of.
LETTERS_PER_INCH, LETTERS_PER_LINE = 12, 7
#: Differences below this are drawn at it: a logarithmic axis has no zero.
LEAST = 1e-9


@contextlib.contextmanager
def panels(count: int, path: Path, where: Mapping[str, str], **settings) -> Iterator[Sequence]:
    """``count`` axes side by side in one style, under the machine's description; saved as ``path`` at the end.

    The lines of all axes share one legend, below them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with plt.rc_context({**style, "grid.alpha": 0.25, "axes.titlesize": 11}):
        figure, axes = plt.subplots(
            1, count, figsize=(max(8, 4.3 * count), HEIGHT), squeeze=False, layout="constrained", **settings
        )
        try:
            yield axes[0]
            figure.suptitle(described(where), fontsize=9)
            lines = {}
            for axis in axes[0]:
                for line, label in zip(*axis.get_legend_handles_labels()):
                    lines.setdefault(label, line)
            letters = max(map(len, lines)) + LETTERS_PER_LINE
            columns = min(len(lines), int(figure.get_figwidth() * LETTERS_PER_INCH / letters)) or 1
            figure.set_figheight(HEIGHT + LEGEND_ROW * (math.ceil(len(lines) / columns) - 1))
            figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False)
            figure.savefig(path, dpi=130)
        finally:
            plt.close(figure)


def plain_logarithmic(axis, ticks: Sequence[float] | None = None) -> None:
    """Make ``axis`` (an ``xaxis`` or ``yaxis``) logarithmic with plain numbers for ticks: 6, not 6 x 10^0.

    Args:
        ticks: where they are; chosen by the axis' limits if not given.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    subs = FINE if high / low < 30 else COARSE
    axis.set_major_locator(FixedLocator(ticks) if ticks is not None else LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def adapter(results: list[dict], where: Mapping[str, str], path: Path) -> None:
    """Each rival's time over ours, over the number of rows: a panel for each pass and dtype."""
    shown = sorted({(r["backward"], r["dtype"]) for r in results})
    rivals = list(dict.fromkeys(name for r in results for name in r["ratios"] if name != "hyperformer_fast"))
    widths = sorted({(r["d"], r["b"]) for r in results})
    rows = sorted({r["N"] for r in results})
    with panels(len(shown), path, where, sharey=True) as axes:
        for axis, (backward, dtype) in zip(axes, shown):
            chosen = [r for r in results if (r["backward"], r["dtype"]) == (backward, dtype)]
            for i, name in enumerate(rivals):
                for style, (d, b) in zip(("-", "--", ":", "-."), widths):
                    points = sorted(
                        (r["N"], r["ratios"][name])
                        for r in chosen
                        if (r["d"], r["b"]) == (d, b) and name in r["ratios"]
                    )
                    label = f"{name}, d={d}, b={b}" if len(widths) > 1 else name
                    if points:
                        axis.plot(*zip(*points), style, color=f"C{i}", marker="o", markersize=3.5, label=label)
            axis.axhline(1, color="0.4", linewidth=1)
            axis.set(xlabel="rows N", title=f"{'forward and backward' if backward else 'forward'}, {dtype}")
            plain_logarithmic(axis.xaxis, rows)
        plain_logarithmic(axes[0].yaxis)
        axes[0].set_ylabel(RATIO)


def apart(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The difference of each pair, relative to the first."""
    return [abs(x - y) / abs(x) for x, y in zip(a, b)]


def training(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The demo's loss with the reference and with the kernels, and how far the losses are apart."""
    curves = results["losses"]
    reference, ours, control = curves
    steps = range(1, len(curves[reference]) + 1)
    with panels(2, path, where) as (left, right):
        for style, name, color in (("-", reference, "C0"), ("--", ours, "C1")):
            left.plot(steps, curves[name], style, color=color, label=name)
        left.set(xlabel="optimizer step", ylabel="loss", title="training loss of the demo, float32")
        for name, color in ((ours, "C1"), (control, "0.6")):
            gaps = [max(LEAST, gap) for gap in apart(curves[reference], curves[name])]
            right.plot(steps, gaps, color=color, label=name)
        right.axhline(1e-4, color="0.4", linewidth=1, linestyle=":")
        right.set(
            xlabel="optimizer step", ylabel="relative difference (1e-09: equal)",
            title="difference from the reference's loss",
        )  # fmt: skip
        plain_logarithmic(right.yaxis)


def gpu_report(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The share of a copy's bandwidth that the adapter reaches, over the number of rows."""
    found = [
        entry
        for part in results.values()
        for entry in part["entries"]
        if "forward_of_copy_bandwidth" in entry and entry["tasks"] == "one"
    ]
    with panels(1, path, where) as (axis,):
        for i, (backend, dtype) in enumerate(sorted({(r["backend"], r["dtype"]) for r in found})):
            rows = sorted((r for r in found if (r["backend"], r["dtype"]) == (backend, dtype)), key=lambda r: r["N"])
            for style, name, words in (("-", "forward", "forward"), ("--", "both", "forward and backward")):
                shares = [100 * r[f"{name}_of_copy_bandwidth"] for r in rows]
                label = f"{backend}, {words}, {dtype}"
                axis.plot([r["N"] for r in rows], shares, style, color=f"C{i}", marker="o", markersize=3.5, label=label)
        axis.set(xlabel="rows N", ylabel="% of a copy's bandwidth", title="the adapter, d = 768, b = 24")
        plain_logarithmic(axis.xaxis, sorted({r["N"] for r in found}))


def real_text(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The score of each method on each task of real text, with its deviation over seeds, above the majority class."""
    most, methods = results["majority"], results["methods"]
    groups = [*most["tasks"], "average"]
    with panels(1, path, where) as (axis,):
        for i, (name, method) in enumerate(methods.items()):
            found = [*(task["score"] for task in method["tasks"].values()), method["average_metrics"]]
            places = [group + (i - (len(methods) - 1) / 2) * 0.8 / len(methods) for group in range(len(groups))]
            axis.bar(
                places,
                [one["mean"] for one in found],
                width=0.8 / len(methods),
                yerr=[one["deviation"] or 0.0 for one in found],
                capsize=2,
                label=name,
            )
        for group, score in enumerate([*(task["score"] for task in most["tasks"].values()), most["average_metrics"]]):
            label = "majority class" if group == 0 else None
            axis.hlines(score, group - 0.42, group + 0.42, color="black", linestyle=":", label=label)
        axis.set_xticks(range(len(groups)), groups)
        steps, batch = results["settings"]["steps"], results["settings"]["batch"]
        axis.set(ylabel="mean of the task's metrics, percent", title=f"real text, {steps} steps of {batch} rows")
        axis.grid(axis="x", visible=False)


def fewshot(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The score on a new task over the number of its rows that are trained."""
    from hyperformer_fast.training.fewshot_report import draw_scores

    with panels(1, path, where) as (axis,):
        draw_scores(axis, results)


def step(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The time of each row over the bare T5's, and what the time goes to in the groups that were looked into."""
    looked = [(name, group) for name, group in results.items() if group["components"]][:2]
    with panels(1 + len(looked), path, where) as (first, *others):
        rows = list(dict.fromkeys(row for group in results.values() for row in group["rows"] if row != "bare"))
        height = 0.8 / max(1, len(rows))
        for i, row in enumerate(rows):
            for place, group in enumerate(results.values()):
                if row in group["rows"]:
                    found = group["rows"][row]
                    low, high = found["quartiles"]
                    spread = [[max(0.0, found["ratio"] - low)], [max(0.0, high - found["ratio"])]]
                    first.barh(
                        [-place - (i + 0.5) * height], [found["ratio"]], height, xerr=spread, color=f"C{i}", label=row
                    )
        first.axvline(1, color="0.4", linewidth=1)
        first.set_yticks([-place - 0.4 for place in range(len(results))], list(results), fontsize=6)
        first.set(xlabel="time over the bare T5's", title="a step")
        first.grid(axis="y", visible=False)
        parts = list(dict.fromkeys(part for _, g in looked for found in g["components"].values() for part in found))
        for axis, (name, group) in zip(others, looked):
            bottom = [0.0] * len(group["components"])
            for i, part in enumerate(parts):
                sizes = [found.get(part, 0.0) for found in group["components"].values()]
                color = f"C{i}" if i < 10 else ("black", "0.7")[i - 10]
                axis.bar(range(len(sizes)), sizes, bottom=bottom, color=color, hatch="//", label=f"of it {part}")
                bottom = [a + b for a, b in zip(bottom, sizes)]
            axis.set_xticks(
                range(len(bottom)), list(group["components"]), rotation=30, ha="right", rotation_mode="anchor"
            )
            axis.set(ylabel="in times of the bare step")
            axis.set_title(name.replace(" dropout", "\ndropout"), fontsize=9)
            axis.grid(axis="x", visible=False)


#: By the start of a result's file name.
PLOTS = {
    "adapter": adapter,
    "training": training,
    "gpu-report": gpu_report,
    "real-text": real_text,
    "fewshot": fewshot,
    "step": step,
}


def draw(path: Path) -> Path | None:
    """Draw the plot of a result's JSON; returns the PNG's path, or None if such results have no plot."""
    for start, plot in PLOTS.items():
        if path.name.startswith(f"{start}-"):
            found = json.loads(path.read_text())
            plot(found["results"], found["machine"], path.with_suffix(".png"))
            return path.with_suffix(".png")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: those that a plot is kept of)")
    options = parser.parse_args()
    for path in options.results or [p for p in sorted(RESULTS.glob("*.json")) if p.with_suffix(".png").exists()]:
        drawn = draw(path)
        if drawn is None:
            sys.exit(f"{path.name}: no plot is made of such results, only of {', '.join(PLOTS)}")
        print(drawn)


if __name__ == "__main__":
    main()
