"""Summaries of runs over their seeds, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

AVERAGES = ("average_metrics", "average_tasks")
#: Figures of a run's diagnostics that are kept of each stack, with what they are; those of the whole model; and the one
#: of each task.
OF_A_STACK = {
    "weight_variation": "variance of adapters\nover tasks, of mean square",
    "weight_cosine_mean": "mean cosine of\ntwo tasks' adapters",
}
OF_THE_MODEL = ("task_embedding_cosine_mean", "collapsed_pairs", "gradient_cosine_mean", "gradient_conflicts")
OF_A_TASK = "gradient_norm"
#: How many tasks have a mean score above the majority class's by more than its deviation, where several seeds have one.
ABOVE = "tasks above the majority by more than their deviation"
#: How many points below the best average a learning rate still counts as good.
POINTS = 3.0


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation of a sample."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def beyond(value: Mapping[str, float | None], least: float) -> bool:
    """Whether a mean is above ``least`` by more than its deviation, and than the mean of equal numbers is rounded."""
    return (value["mean"] or 0.0) - (value["deviation"] or 0.0) > least + 1e-9


def with_scores(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation of a sample, and the score of each seed, so that none below the others is hidden."""
    return {**spread(values), "scores": list(values)}


def shown(value: Mapping[str, float | None], digits: int = 1) -> str:
    deviation = "" if value["deviation"] is None else f" ± {value['deviation']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{deviation}"


def title_of(label: str) -> str:
    """A method, or a method with a recipe in brackets, in words."""
    from hyperformer_fast.training.report import TITLES  # what draws other results needs no `datasets`

    method, bracket, rest = label.partition(" (")
    return (TITLES | {"single_task": "adapters, a run each"}).get(method, method) + bracket + rest


def as_majority(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's metrics.json would be, had it learned nothing: a run that diverged counts like this."""
    tasks = {name: {**task, "metrics": task["majority"]} for name, task in run["tasks"].items()}
    return {**run, **{name: run[f"majority_{name}"] for name in AVERAGES}, "tasks": tasks}


def compared(found: Mapping[tuple[str, int], Mapping[str, Any] | None], methods: Sequence[str]) -> dict[str, Any]:
    """Summarise runs over their seeds: every metric of every task, both averages, and the parameters.

    Args:
        found: the content of metrics.json by method and seed; None for a run that diverged.
        methods: the methods, in the order of the table.
    """
    first = next((run for run in found.values() if run is not None), None)
    if first is None:
        raise SystemExit("all runs diverged: lower the learning rate")
    of_majority = {
        **{name: first[f"majority_{name}"] for name in AVERAGES},
        "tasks": {name: task["majority"] for name, task in first["tasks"].items()},
    }
    rows = {name: {key: task.get(key) for key in ("split", "rows")} for name, task in first["tasks"].items()}
    results: dict[str, Any] = {"majority": of_majority, "evaluated": rows, "methods": {}}
    for method in methods:
        of_method = [run for (of, _), run in sorted(found.items(), key=lambda item: item[0]) if of == method]
        trained = [run for run in of_method if run is not None]
        runs = [as_majority(first) if run is None else run for run in of_method]
        tasks = {
            name: {metric: spread([run["tasks"][name]["metrics"][metric] for run in runs]) for metric in metrics}
            for name, metrics in of_majority["tasks"].items()
        }
        results["methods"][method] = {
            **{name: with_scores([run[name] for run in runs]) for name in AVERAGES},
            "above_majority": sum(
                beyond(tasks[name]["score"], most["score"]) for name, most in of_majority["tasks"].items()
            ),
            "loss": _loss_of(of_method),
            "diverged": len(of_method) - len(trained),
            "trained_parameters": trained[0].get("trained_parameters") if trained else None,
            "percent_per_task": trained[0].get("percent_per_task") if trained else None,
            "train_seconds": [run["train_seconds"] for run in trained if "train_seconds" in run],
            "tasks": tasks,
        }
    return results


def mean_loss(run: Mapping[str, Any]) -> float | None:
    """The mean of a run's tasks' cross-entropies; None where it was evaluated without them.

    It asks for no text. Where a T5 is unsure, the text that it writes can be one for all rows, and a correlation zero,
    though the probabilities of all texts follow the rows.
    """
    losses = [task.get("loss") for task in run["tasks"].values()]
    return None if None in losses else statistics.fmean(losses)


def _loss_of(runs: Sequence[Mapping[str, Any] | None]) -> dict[str, float | None] | None:
    """Mean and standard deviation of the runs' losses; None where one diverged or has none."""
    losses = [None if run is None else mean_loss(run) for run in runs]
    return None if None in losses else spread(losses)


def diagnosed(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run's diagnostics that are kept, by name: pairs of step and figure. None without diagnostics.

    Args:
        history: the content of history.json.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            start, _, name = name.partition("/")
            of, _, figure = name.partition("/")
            if start == "diagnostics" and (name in OF_THE_MODEL or figure in OF_A_STACK or of == OF_A_TASK):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves


def splits_in_words(evaluated: Mapping[str, Mapping[str, Any]]) -> str:
    """Which rows were evaluated: test, validation, or which of them for which task."""
    splits = {task["split"] for task in evaluated.values()}
    if len(splits) == 1:
        return f"{splits.pop() or 'evaluated'} rows"
    of = {split: [name for name, task in evaluated.items() if task["split"] == split] for split in sorted(splits)}
    return ", ".join(f"{split} rows of {', '.join(names)}" for split, names in of.items())


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def over_in_words(number: int, what: str) -> str:
    """What the scores of a table are of: one run, or several."""
    return counted(number, what) if number == 1 else f"mean and deviation of {counted(number, what)}"


def place_in_words(settings: Mapping[str, Any], with_builtin: bool = False) -> str:
    """How many tasks of what kind a study has, and its T5.

    Args:
        settings: the study's.
        with_builtin: whether tasks of a folder were joined by the built-in ones; otherwise a folder may have others of
            their names.
    """
    from hyperformer_fast.data.builtin import BUILTIN_SPECS  # what draws other results needs no `datasets`

    tasks = settings["tasks"]
    if settings["t5"] == "embedded":
        return f"{counted(len(tasks), 'built-in task')}, embedded T5"
    builtin = [task for task in tasks if with_builtin and task in BUILTIN_SPECS]
    kinds = [counted(len(builtin), "built-in task")] if builtin else []
    if others := len(tasks) - len(builtin):
        kinds.append(f"{counted(others, 'task')} of real text")
    return f"{' and '.join(kinds)}, {settings['t5']}"


def budget_in_words(results: Mapping[str, Any]) -> str:
    """The rows that a study reports, its seeds and the length of its runs."""
    settings = results["settings"]
    rows = splits_in_words(results["evaluated"]) if "evaluated" in results else "validation rows"
    steps = f"{settings['steps']} steps of {settings['batch']} rows"
    others = "".join(f", {name} {value}" for name, value in settings.get("set", {}).items())
    return f"{rows}, percent, {over_in_words(settings['seeds'], 'seed')}, {steps}{others}"


def transfer_in_words(results: Mapping[str, Any]) -> tuple[str, str]:
    """From what tasks to which one a study transfers, and what its scores are of.

    Each of its seeds is another draw of the rows; the runs that are transferred have one.
    """
    settings, draws = results["settings"], over_in_words(results["seeds"], "draw")
    (split,) = {cell["split"] for method in results["methods"].values() for cell in method["cells"].values()}
    runs = f"one base run of {settings['steps']} steps, {results['training']['max_steps']} steps of each transfer"
    return (
        f"Transfer to {results['task']} from {place_in_words(settings)}",
        f"{split} rows, percent, {draws} of the training rows, {runs}",
    )


def comparison_table(results: Mapping[str, Any], title: str) -> Table:
    """A row for each metric and average, a column for the majority class and each method."""
    table = Table("task", "metric", title=Text(title))
    for heading in ("majority class", *map(title_of, results["methods"])):
        table.add_column(Text(heading), justify="right")
    methods, most = results["methods"].values(), results["majority"]
    for name, metrics in most["tasks"].items():
        for metric, value in metrics.items():
            if metric != "score":
                table.add_row(Text(name), metric, f"{value:.1f}", *(shown(m["tasks"][name][metric]) for m in methods))
    table.add_section()
    for average in AVERAGES:
        table.add_row("average", average.removeprefix("average_"), f"{most[average]:.1f}",
                      *(shown(m[average]) for m in methods))  # fmt: skip
    table.add_row(ABOVE, "", "", *(f"{m['above_majority']}" for m in methods))
    if any(m["diverged"] for m in methods):
        table.add_row("runs that diverged", "(count as majority)", "", *(f"{m['diverged']}" for m in methods))
    table.add_section()
    table.add_row("trained", "parameters", "", *(_or_none(m["trained_parameters"], "{:,}") for m in methods))
    table.add_row("", "of the T5, per task", "", *(_or_none(m["percent_per_task"], "{:.2f} %") for m in methods))
    return table


def methods_table(results: Mapping[str, Any], title: str) -> Table:
    """A row for the majority class and each method, a column for each task's score (the mean of its metrics), and one
    for the loss if any method has it."""
    most, methods = results["majority"], results["methods"]
    table = Table("method", title=Text(title))
    for name, metrics in most["tasks"].items():
        kinds = [metric for metric in metrics if metric != "score"]
        table.add_column(Text(f"{name}, {' / '.join(kinds)}"), justify="right")
    with_loss = any(method.get("loss") for method in methods.values())
    headings = ("average of metrics", "average of tasks", *["loss"] * with_loss, ABOVE)
    for heading in (*headings, "trained per task"):
        table.add_column(heading, justify="right")
    scores = (f"{metrics['score']:.1f}" for metrics in most["tasks"].values())
    table.add_row("majority class", *scores, *(f"{most[name]:.1f}" for name in AVERAGES), *[""] * (2 + with_loss))
    table.add_section()
    for label, method in methods.items():
        diverged = f" ({method['diverged']} diverged: as majority)" if method["diverged"] else ""
        table.add_row(
            Text(title_of(label) + diverged),
            *(shown(task["score"]) for task in method["tasks"].values()),
            *(shown(method[name]) for name in AVERAGES),
            *([_shown_loss(method)] if with_loss else []),
            f"{method['above_majority']} of {len(method['tasks'])}",
            _or_none(method["percent_per_task"], "{:.2f} %"),
        )
    return table


def markdown(table: Table) -> str:
    """A table as a page can show it."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = zip(*columns, strict=True)
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rules, *rows)) + f"\n{table.title}\n"


def _or_none(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def within(averages: Mapping[float, float], points: float = POINTS) -> dict[str, float]:
    """The range of learning rates around the best whose average stays within ``points`` of the best one's.

    It ends at the last rate that was tried before the first that is worse, so that it is rather too narrow.

    Args:
        averages: the average by learning rate.
        points: how much worse an average may be.
    """
    rates = sorted(averages)
    best = max(rates, key=lambda rate: averages[rate])
    good = [averages[rate] >= averages[best] - points for rate in rates]
    low = high = rates.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(rates) - 1 and good[high + 1]:
        high += 1
    return {
        "points": points,
        "best": best,
        "low": rates[low],
        "high": rates[high],
        "factor": rates[high] / rates[low],
    }


def swept(found: Mapping[tuple[str, float, int], Mapping[str, Any] | None], labels: Sequence[str]) -> dict[str, Any]:
    """Summarise a sweep of learning rates: for each method the averages over seeds by rate, and the range that is good.

    Args:
        found: the results by method, rate and seed; None for a run that diverged.
        labels: the methods, in the order of the table.
    """
    first = next((run for run in found.values() if run is not None), None)
    if first is None:
        raise SystemExit("all runs diverged: sweep lower learning rates")
    rows = {name: {key: task[key] for key in ("split", "rows")} for name, task in first["tasks"].items()}
    most = first["majority_average_metrics"]
    results: dict[str, Any] = {"majority": {"average_metrics": most}, "evaluated": rows, "methods": {}}
    for label in labels:
        rates = sorted({rate for of, rate, _ in found if of == label})
        by_rate = []
        for rate in rates:
            runs = [found[key] for key in sorted(found) if key[:2] == (label, rate)]
            scores = [most if run is None else run["average_metrics"] for run in runs]
            by_rate.append(
                {
                    "rate": rate,
                    **with_scores(scores),
                    "diverged": runs.count(None),
                    "loss": _loss_of(runs),
                    "tasks": {name: _mean_score(runs, name, first) for name in first["tasks"]},
                }
            )
        averages = {each["rate"]: each["mean"] for each in by_rate}
        results["methods"][label] = {"rates": by_rate, "within": within(averages)}
    return results


def _mean_score(runs: Sequence[Mapping[str, Any] | None], task: str, first: Mapping[str, Any]) -> float:
    """The mean score of a task; a run that diverged has the majority class's."""
    of_runs = [first["tasks"][task]["majority"] if run is None else run["tasks"][task]["metrics"] for run in runs]
    return statistics.fmean(scores["score"] for scores in of_runs)


def sweep_table(results: Mapping[str, Any], title: str) -> Table:
    """A row for each learning rate, and for each method a column of its averages and, if known, one of its losses."""
    table = Table(title=Text(title))
    table.add_column("learning rate", justify="right")
    methods = results["methods"]
    with_loss = any(each.get("loss") for method in methods.values() for each in method["rates"])
    for label in methods:
        table.add_column(Text(title_of(label)), justify="right")
        if with_loss:
            table.add_column("loss", justify="right")
    by_rate = {label: {each["rate"]: each for each in method["rates"]} for label, method in methods.items()}
    for rate in sorted({rate for each in by_rate.values() for rate in each}):
        cells = [by_rate[label].get(rate) for label in methods]
        table.add_row(f"{rate:g}", *(text for cell in cells for text in _of_rate(cell, with_loss)))
    table.add_section()
    most = f"{results['majority']['average_metrics']:.1f}"
    ranges = [method["within"] for method in methods.values()]
    near = [f"{each['low']:g} to {each['high']:g}, a factor of {each['factor']:.3g}" for each in ranges]
    for heading, texts in (
        ("majority class", [most] * len(ranges)),
        ("best rate", [f"{each['best']:g}" for each in ranges]),
        (f"within {POINTS:g} points of it", near),
    ):
        table.add_row(heading, *(cell for text in texts for cell in ([text, ""] if with_loss else [text])))
    return table


def _of_rate(cell: Mapping[str, Any] | None, with_loss: bool) -> list[str]:
    """What a table shows of a method at one rate."""
    if cell is None:
        return ["", ""] if with_loss else [""]
    return [shown(cell) + _diverged(cell), *([_shown_loss(cell)] if with_loss else [])]


def _shown_loss(found: Mapping[str, Any]) -> str:
    loss = found.get("loss")
    return "" if loss is None else shown(loss, 3)


def _diverged(cell: Mapping[str, Any]) -> str:
    return f" ({cell['diverged']} diverged)" if cell["diverged"] else ""
