"""Draw the plots of the results; also again, from their JSON, without measuring anything:

    python benchmarks/plots.py [benchmarks/results/adapter-avx512-cpu-2threads.json ...]

Without arguments it redraws every result that a plot is kept of. Each plot is beside its JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing import panels, plain_logarithmic
from study_plots import comparison, fewshot, many, options, rates
from timing import RESULTS

#: The label of every axis that shows how a rival compares.
RATIO = "time of the rival over ours\n(above 1: ours is faster)"
#: Differences below this are drawn at it: a logarithmic axis has no zero.
LEAST = 1e-9
#: The kinds of rows in the plot of decoding, and how their names start.
OF_DECODING = {"the bare T5": "bare", "hyperformer_fast": ("fused", "unfused"), "other libraries": ("PEFT", "adapters")}


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


def step(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The time of each row over the bare T5's, and what the time goes to in the groups that were looked into."""
    looked = [(name, group) for name, group in results.items() if group["components"]][:2]
    with panels(1 + len(looked), path, where, height=6.4, gridspec_kw={"width_ratios": [1.5, *[1] * len(looked)]}) as (
        first,
        *others,
    ):
        rows = list(dict.fromkeys(row for group in results.values() for row in group["rows"] if row != "bare"))
        for i, row in enumerate(rows):
            measured = [
                (place, group["rows"][row]) for place, group in enumerate(results.values()) if row in group["rows"]
            ]
            ratios = [found["ratio"] for _, found in measured]
            spread = [[abs(found["quartiles"][end] - found["ratio"]) for _, found in measured] for end in (0, 1)]
            # rows of a group one below the other, so that no dot hides another
            places = [-place - 0.7 * i / max(1, len(rows) - 1) for place, _ in measured]
            first.errorbar(ratios, places, xerr=spread, fmt="o", markersize=4.5, linewidth=1, color=f"C{i}", label=row)
        for place in range(1, len(results)):
            first.axhline(0.15 - place, color="0.9", linewidth=0.8)
        first.axvline(1, color="0.4", linewidth=1)
        # A row that something else disturbed would press all others together.
        most = max(found["ratio"] for group in results.values() for found in group["rows"].values())
        first.set_xlim(0, 1.1 * most)
        first.set_yticks([-place - 0.35 for place in range(len(results))], list(results), fontsize=8)
        first.set(xlabel="time over the bare T5's", title="a step")
        first.grid(axis="y", visible=False)
        parts = list(dict.fromkeys(part for _, g in looked for found in g["components"].values() for part in found))
        for axis, (name, group) in zip(others, looked):
            bottom = [0.0] * len(group["components"])
            for i, part in enumerate(parts):
                sizes = [found.get(part, 0.0) for found in group["components"].values()]
                color = f"C{i}" if i < 10 else ("black", "0.7")[i - 10]
                axis.bar(range(len(sizes)), sizes, bottom=bottom, color=color, label=f"{part} (bars)")
                bottom = [a + b for a, b in zip(bottom, sizes)]
            axis.set_xticks(
                range(len(bottom)), list(group["components"]), rotation=30, ha="right", rotation_mode="anchor"
            )
            axis.set(ylabel="in times of the bare step")
            axis.set_title(name.replace(" dropout", "\ndropout"), fontsize=9)
            axis.grid(axis="x", visible=False)


def decode(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The time of each row over the bare T5's, a panel for each batch size."""
    batches = results["batches"]
    rows = list(dict.fromkeys(row for found in batches.values() for row in found if row != "bare"))
    with panels(len(batches), path, where, height=1.6 + 0.3 * len(rows), sharey=True) as axes:
        for axis, (batch, found) in zip(axes, batches.items()):
            for i, row in enumerate(rows):
                if row in found:
                    kind = next(kind for kind, starts in OF_DECODING.items() if row.startswith(starts))
                    ratio, (low, high) = found[row]["ratio"], found[row]["quartiles"]
                    axis.errorbar(ratio, i, xerr=[[ratio - low], [high - ratio]], fmt="o", markersize=4.5,
                                  color=f"C{list(OF_DECODING).index(kind)}", label=kind)  # fmt: skip
                    axis.annotate(
                        f"{ratio:.3g}", (ratio, i), (0, 6), textcoords="offset points", fontsize=7, ha="center"
                    )
            axis.axvline(1, color="0.4", linewidth=1)
            axis.set(title=batch, xlabel="time per token over the bare T5's")
            plain_logarithmic(axis.xaxis)
        axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
        axes[0].set_ylim(len(rows) - 0.5, -0.8)


#: By the start of a result's file name.
PLOTS = {
    "adapter": adapter,
    "training": training,
    "gpu-report": gpu_report,
    "real-text": comparison,
    "compare": comparison,
    "options": options,
    "rates": rates,
    "many": many,
    "fewshot": fewshot,
    "step": step,
    "decode": decode,
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
