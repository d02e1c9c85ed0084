"""The plots of studies: the methods side by side, over the learning rate, on many tasks, and on a new task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import OF_A_STACK, POINTS, budget_in_words, place_in_words, title_of, transfer_in_words
from drawing import figure_of, panels, plain_logarithmic

#: Up to how many tasks their names stand upright below a panel.
UPRIGHT = 10
#: Cells of a lower relative luminance have white text, which then has the higher contrast.
DARK = 0.18
#: Methods that share no weights between tasks: their figures are no measure for those of generated adapters.
ALONE = ("adapters", "single_task")


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def methods_in_words(labels: Sequence[str]) -> str:
    """The methods of a study, whatever their recipes: their names, or that they are all."""
    from configurations import METHODS  # what draws other results needs no `datasets`

    methods = list(dict.fromkeys(label.partition(" (")[0] for label in labels))
    return "all methods" if set(METHODS) <= set(methods) else listed([title_of(method) for method in methods])


def title(what: str, results: Mapping[str, Any], with_builtin: bool = False) -> str:
    """What a plot shows, of which tasks and T5, which rows, how many seeds and steps."""
    place = place_in_words(results["settings"], with_builtin)
    return f"{what[0].upper()}{what[1:]}: {place}\n{budget_in_words(results)}"


def color_of(label: str) -> str:
    """One color for each recipe, and one for methods that have none."""
    return "C1" if label.endswith("(authors)") else "C0" if label.endswith(")") else "0.45"


def limits(values: Sequence[float], majority: float) -> tuple[float, float]:
    """An axis that has room for ``values``, and for the majority class if that is no further off than they are wide."""
    low, high = min(values), max(values)
    room = max(high - low, 1.0)
    if low - room <= majority < low:
        low = majority
    room = 0.07 * max(high - low, 1.0)
    return low - room, high + room


def with_deviations(values: Sequence[Mapping[str, Any]]) -> list[float]:
    """The ends of the error bars of means, and the scores of seeds where they are known."""
    bars = [value["mean"] + sign * (value["deviation"] or 0.0) for value in values for sign in (-1, 1)]
    return bars + [score for value in values for score in value.get("scores", ())]


def options(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The same as of methods for the recipe with one thing changed."""
    comparison(results, where, path, "options of the recipe")


def comparison(results: dict, where: Mapping[str, str], path: Path, what: str | None = None) -> None:
    """The average of each method with its deviation over seeds, and the score of each method on each task."""
    methods, tasks = results["methods"], list(results["majority"]["tasks"])
    size = 5.7 + 0.75 * min(len(tasks), UPRIGHT), 2.7 + 0.3 * len(methods)
    with figure_of(path, where, size, title(what or methods_in_words(list(methods)), results)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 0.35 + 0.22 * min(len(tasks), UPRIGHT)))
        _averages(left, results, of_recipe=what is None)
        _scores(figure, right, results, tasks)
        left.set_ylim(len(methods) + 0.5, -0.5)


def _averages(axis, results: Mapping[str, Any], of_recipe: bool = True) -> None:
    """The averages of methods, in the colors of their recipes, or of whatever has one recipe for all."""
    methods, most = results["methods"], results["majority"]["average_metrics"]
    for place, (label, method) in enumerate(methods.items()):
        average, recipe = method["average_metrics"], label.partition("(")[2].rstrip(")")
        words, color = f"recipe {recipe}" if recipe else "no recipe", color_of(label)
        if not of_recipe:
            words, color = "recipe default, with one thing changed", "C0"
        axis.errorbar(
            average["mean"], place, xerr=average["deviation"], fmt="o", capsize=3, color=color,
            label=words,
        )  # fmt: skip
        scores = average.get("scores", ()) if average["deviation"] is not None else ()
        if scores:
            axis.plot(scores, [place] * len(scores), "|", color="black", markersize=7, label="each seed")
        axis.annotate(
            f"{average['mean']:.1f}", (average["mean"], place), (0, 5), textcoords="offset points", fontsize=7.5,
            ha="center",
        )  # fmt: skip
    low, high = limits(with_deviations([method["average_metrics"] for method in methods.values()]), most)
    axis.set_xlim(low, high)
    if low <= most:
        axis.axvline(most, color="black", linestyle=":", label="majority class")
    words, place = (f" {most:.1f}", most) if low <= most else (f"  {most:.1f}: left of this axis", low)
    axis.text(place, len(methods), words, va="center", fontsize=8)
    axis.set_yticks(range(len(methods) + 1), [*map(title_of, methods), "majority class"])
    axis.set(xlabel="average of all metrics, percent")


def _scores(figure, axis, results: Mapping[str, Any], tasks: Sequence[str]) -> None:
    most = results["majority"]["tasks"]
    of_majority = [most[task]["score"] for task in tasks]
    rows = [[method["tasks"][task]["score"]["mean"] for task in tasks] for method in results["methods"].values()]
    rows.append(of_majority)
    above = [[score - base for score, base in zip(row, of_majority)] for row in rows]
    bound = max(abs(value) for row in above for value in row) or 1.0
    image = axis.imshow(above, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound)
    for y, row in enumerate(rows):
        for x, score in enumerate(row):
            red, green, blue = (part**2.2 for part in image.to_rgba(above[y][x])[:3])
            color = "white" if 0.21 * red + 0.72 * green + 0.07 * blue < DARK else "black"
            axis.text(x, y, f"{score:.1f}", ha="center", va="center", fontsize=8, color=color)
    names = ["\n".join([task, *(name for name in most[task] if name != "score")]) for task in tasks]
    if len(tasks) > UPRIGHT:
        names = [name.replace("\n", ", ") for name in names]
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(tasks) > UPRIGHT else {}
    axis.set_xticks(range(len(tasks)), names, fontsize=7.5, **turned)
    axis.tick_params(left=False, labelleft=False)
    axis.set_title("score of each task: the mean of its metrics, percent", fontsize=9)
    axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label("points above the majority class", fontsize=8)


def rates(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The average of each method over the learning rate, and closer where it is near the best one."""
    methods, most = results["methods"], results["majority"]["average_metrics"]
    tried = [each for method in methods.values() for each in method["rates"]]
    low, high = limits(with_deviations(tried), most)
    best = max(each["mean"] for each in tried)
    near = best - POINTS - 1
    views = [(low, high), (near, high)] if near > low + 0.3 * (high - low) else [(low, high)]
    heading = title(f"learning rates of {methods_in_words(list(methods))}", results)
    with panels(len(views), path, where, 5.0, heading) as axes:
        for axis, view in zip(axes, views):
            for i, (label, method) in enumerate(methods.items()):
                _over_rates(axis, i - (len(methods) - 1) / 2, f"C{i}", label, method)
            label = f"majority class: {most:.1f}" + (", below these axes" if most < low else "")
            axis.plot([], [], ":", color="black", label=label)
            if view[0] <= most:
                axis.axhline(most, color="black", linestyle=":")
            axis.set(xlabel="learning rate", ylabel="average of all metrics, percent", ylim=view)
            plain_logarithmic(axis.xaxis, sorted({each["rate"] for each in tried}))
        words = f"hollow: more than {POINTS:g} points below its best"
        axes[0].plot([], [], "o", color="0.3", fillstyle="none", label=words)
        if len(views) > 1:
            axes[0].set_title("all averages", fontsize=10)
            axes[1].set_title(f"the best {POINTS + 1:g} points, enlarged", fontsize=10)


def _over_rates(axis, offset: float, color: str, label: str, method: Mapping[str, Any]) -> None:
    tried, near = method["rates"], method["within"]
    # Bars at the same place would hide each other.
    places, means = [each["rate"] * 1.03**offset for each in tried], [each["mean"] for each in tried]
    factor = f"within {near['points']:g} points of its best over a factor of {near['factor']:.3g} of rates"
    span = f"{title_of(label)}: {factor} ({near['low']:g} to {near['high']:g})"
    deviations, least = [each["deviation"] for each in tried], max(means) - near["points"]
    if None in deviations:
        axis.plot(places, means, color=color, label=span)
    else:
        axis.errorbar(places, means, yerr=deviations, capsize=3, color=color, label=span)
    for place, mean in zip(places, means):
        axis.plot(place, mean, "o", color=color, markersize=6, markerfacecolor=color if mean >= least else "white")


def many(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The score of each method on each of many tasks, and what the diagnostics of one seed logged while training."""
    curves, tasks = results["diagnostics"], list(results["majority"]["tasks"])
    logged = {name.rpartition("/")[2] for of_method in curves.values() for name in of_method}
    pairs = len(tasks) * (len(tasks) - 1) // 2
    figures = {**OF_A_STACK, "collapsed_pairs": f"pairs of tasks that have\ncollapsed, of {pairs}"}
    figures = {name: words for name, words in figures.items() if name in logged}
    size = 6.0 + 4.5 * bool(figures), 2.2 + 0.28 * len(tasks)
    with figure_of(path, where, size, title("many tasks", results, with_builtin=True)) as figure:
        grid = figure.add_gridspec(max(1, len(figures)), 1 + bool(figures), width_ratios=(1.3, 1)[: 1 + bool(figures)])
        _of_tasks(figure.add_subplot(grid[:, 0]), results, tasks)
        axis = None
        for i, (name, words) in enumerate(figures.items()):
            axis = figure.add_subplot(grid[i, 1], sharex=axis)
            left_out = _over_steps(axis, name, curves)
            axis.set_ylabel(words, fontsize=9)
            axis.set_title("\n".join(filter(None, ["" if i else "diagnostics of seed 0", left_out])), fontsize=9)
            axis.tick_params(labelbottom=i == len(figures) - 1)
        if axis is not None:
            axis.set(xlabel="optimizer step")


def _of_tasks(axis, results: Mapping[str, Any], tasks: Sequence[str]) -> None:
    most, methods = results["majority"], results["methods"]
    label = f"majority class: {most['average_metrics']:.1f} on average"
    low, high = ([place + side for place in range(len(tasks))] for side in (-0.42, 0.42))
    axis.vlines([most["tasks"][task]["score"] for task in tasks], low, high, color="black", linewidth=1.5, label=label)
    for i, (name, method) in enumerate(methods.items()):
        found = [method["tasks"][task]["score"] for task in tasks]
        places = [place + (i - (len(methods) - 1) / 2) * 0.5 / max(1, len(methods) - 1) for place in range(len(tasks))]
        deviations = [one["deviation"] for one in found]
        label = f"{title_of(name)}: {method['average_metrics']['mean']:.1f} on average"
        axis.errorbar(
            [one["mean"] for one in found], places, xerr=None if None in deviations else deviations, fmt="o",
            markersize=3.5, capsize=2, color=f"C{i}", label=label,
        )  # fmt: skip
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.set_ylim(len(tasks) - 0.4, -0.6)
    axis.set(xlabel="mean of the task's metrics, percent")


def _over_steps(axis, name: str, curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """Draw one figure of the diagnostics of each method, of both stacks where each has its own.

    Returns:
        which methods are left out, if any, and where they are.
    """
    keys = {"encoder": f"encoder/{name}", "decoder": f"decoder/{name}", "": name}
    drawn = {
        label: {stack: of_method[key] for stack, key in keys.items() if key in of_method}
        for label, of_method in curves.items()
    }
    values = {label: _values(stacks) for label, stacks in drawn.items()}
    others = [value for label in drawn if not label.startswith(ALONE) for value in values[label]]
    # Far from the others they would press their lines together.
    far = [
        label
        for label in drawn
        if label.startswith(ALONE) and others and values[label]
        and (max(values[label]) < min(others) or min(values[label]) > max(others))
    ]  # fmt: skip
    for i, label in enumerate(curves):
        for stack, points in drawn[label].items() if label not in far else ():
            # Of lines at one place, such as zero, the first is the widest.
            width = 1.5 if stack else 1.5 + 1.2 * (len(curves) - 1 - i)
            axis.plot(*zip(*points), "--" if stack == "decoder" else "-", color=f"C{i}", linewidth=width)
    if name in OF_A_STACK:
        for stack, style in (("encoder", "-"), ("decoder", "--")):
            axis.plot([], [], style, color="0.3", label=stack)  # for the legend alone
    elif max(others, default=0) > 10:
        axis.set_yscale("symlog", linthresh=1, linscale=0.4)
        axis.set_yticks([tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000) if tick < 2 * max(others)])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axis.set_ylim(bottom=-0.2 if name == "collapsed_pairs" else None)
    ends = [value for label in far for value in values[label]]
    names = listed([title_of(label) for label in far])
    return f"not drawn: {names}, {min(ends):.2f} to {max(ends):.2f}" if far else ""


def _values(stacks: Mapping[str, Sequence[tuple[int, float]]]) -> list[float]:
    return [value for points in stacks.values() for _, value in points]


def fewshot(results: dict, where: Mapping[str, str], path: Path) -> None:
    """The score on a new task over the number of its rows that are trained."""
    from hyperformer_fast.training.fewshot_report import draw_scores

    what, how = transfer_in_words(results)
    heading = "\n".join([what, how.replace(", one base", ",\none base")])
    with panels(1, path, where, 5.0, heading) as (axis,):
        draw_scores(axis, results)
