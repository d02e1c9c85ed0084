"""Studies of the methods and of the recipe, on the built-in tasks with the embedded T5, or on real text.

    python benchmarks/study.py rates    [--rates 3e-4 ... 3e-2] [--methods hyperformer++ adapters:default]
    python benchmarks/study.py compare  [--chosen RATES.json] [--methods ...]
    python benchmarks/study.py transfer [--to TASK ...] [--samples 4 16 32 100]
    python benchmarks/study.py options  [--options NAME ...]
    python benchmarks/study.py many     --t5 FOLDER --data FOLDER

`--t5 FOLDER --data FOLDER [--tasks ...]` is real text. Every run is a `hyperformer-fast train` of its own, in a process
with one thread. What is finished is kept in --work, so that the same command goes on where it was stopped, and studies
share the runs that they have in common. `rates` and `options` (of the recipe, one changed at a time) look at validation
rows alone, and `compare --chosen` takes the rates that `rates` found, and the default for a method that it did not
sweep; `compare`, `many` and `transfer` report test rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import (
    budget_in_words,
    compared,
    comparison_table,
    diagnosed,
    markdown,
    methods_table,
    place_in_words,
    sweep_table,
    swept,
    transfer_in_words,
)
from configurations import (
    BUILTIN_TRANSFER,
    METHODS,
    OPTIONS,
    TEXT_SIZES,
    TEXT_TASKS,
    TEXT_TRANSFER,
    Line,
    configuration,
    contents_of,
    lines,
    named,
    option_fields,
    recipe_fields,
    text_options,
    text_rate,
    with_builtin,
)
from plots import draw
from rich.console import Console
from rich.table import Table
from runs import Diverged, beside, command, in_parallel, on_validation, train, where_runs_ran
from timing import RESULTS, write

from hyperformer_fast.data import available_tasks
from hyperformer_fast.data.builtin import BUILTIN_SPECS, BUILTIN_TASKS
from hyperformer_fast.recipes import RECIPES
from hyperformer_fast.training import fewshot_report
from hyperformer_fast.training.presets import PRESETS, with_preset

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
QUICK = {"steps": 4, "rates": [1e-3, 3e-3], "batch": 4, "seeds": 1, "eval_rows": 8, "fewshot_steps": 2, "samples": [4]}


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rates = commands.add_parser("rates", help="sweep the learning rate: averages on validation rows")
    compare = commands.add_parser("compare", help="all methods side by side, on test rows")
    options = commands.add_parser("options", help="the default recipe with one thing changed, on validation rows")
    many = commands.add_parser("many", help="the built-in tasks and all of --data in one run")
    transfer = commands.add_parser("transfer", help="few-shot transfer to tasks that were not trained")
    for each in (rates, compare, options, many, transfer):
        _shared_options(each)
    # `evaluate` and `fewshot` take one run, not a folder of runs of single tasks
    together = [method for method in METHODS if method != "single_task"]
    two = ["adapters", "hyperformer++"]
    for each, methods, default, seeds in (
        (rates, together, ["hyperformer++"], 3),
        (compare, METHODS, METHODS, 3),
        (many, METHODS, two, 3),
        (transfer, together, two, 5),
    ):
        words = f"METHOD or METHOD:RECIPE (default: {' '.join(default)})"
        each.add_argument("--methods", nargs="+", type=_one_of(methods), default=default, help=words)
        each.add_argument("--seeds", type=int, default=seeds, help=f"runs of each (default: {seeds})")
    words = f"default: {' '.join(f'{rate:g}' for rate in RATES)}"
    rates.add_argument("--rates", type=float, nargs="+", default=RATES, help=words)
    in_words = ", ".join(f"{line.label} {text_rate(line):g}" for line in lines(METHODS, RECIPES))
    options.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="default: all")
    options.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    options.set_defaults(methods=["hyperformer++:default"])
    for each in (compare, options, many, transfer):
        each.add_argument(
            "--learning-rate", nargs="+", type=_rate, default=[], metavar="METHOD[:RECIPE]=X",
            help=f"default: the preset's on the built-in tasks; on real text {in_words}",
        )  # fmt: skip
        words = "a result of `rates`, whose best learning rates are taken for the methods that it has"
        each.add_argument("--chosen", type=Path, help=words)
    transfer.add_argument("--to", nargs="+", help=f"the new tasks (default: {BUILTIN_TRANSFER} or {TEXT_TRANSFER})")
    transfer.add_argument("--samples", type=int, nargs="+", default=[4, 16, 32, 100], help="rows of the new task")
    transfer.add_argument("--fewshot-steps", type=int, default=200, help="steps of each transfer (default: 200)")
    return _settled(parser.parse_args(arguments), parser)


def _one_of(methods: Sequence[str]) -> Callable[[str], str]:
    """What checks a method, with or without a recipe, for argparse."""

    def method(name: str) -> str:
        of, colon, recipe = name.partition(":")
        if of not in methods or (colon and (recipe not in RECIPES or of == "finetuning")):
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(methods)}, and may end in a recipe ({', '.join(RECIPES)}) behind a colon, "
                f"got {name!r}"
            )
        return name

    return method


def _rate(text: str) -> tuple[str, float]:
    """What reads METHOD[:RECIPE]=X for argparse."""
    name, _, rate = text.partition("=")
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be METHOD=X or METHOD:RECIPE=X with a number X above 0, got {text!r}")
    return _one_of(METHODS)(name), value


def _shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--on", choices=("builtin", "text"), help="builtin needs nothing; text is what --t5 implies")
    parser.add_argument("--t5", help="folder of a T5 with its tokenizer")
    parser.add_argument("--data", help="folder with a folder of files for each task")
    parser.add_argument("--tasks", nargs="+", help=f"default: all built-in ones, or {' '.join(TEXT_TASKS)}")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help=f"default: {' '.join(RECIPES)}"
    )
    parser.add_argument("--work", type=Path, default=Path("study-runs"), help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results are written")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="ARGUMENT=X", help="further arguments of every run, as JSON or text"
    )
    parser.add_argument("--name", default="", help="what the results' names end in, where --set makes another study")
    parser.add_argument("--quick", action="store_true", help="two tasks and four steps, only to see that it runs")
    text_options(parser, steps=None, batch=None)


def _settled(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Options with what they leave open: text and the built-in tasks have other defaults."""
    if (options.t5 is None) != (options.data is None):
        parser.error("--t5 and --data belong together")
    if (options.on == "text" or options.command == "many") and options.t5 is None:
        parser.error("real text needs --t5 and --data")
    if options.on == "builtin" and options.t5 is not None:
        parser.error("--on builtin takes neither --t5 nor --data")
    on_text, preset = options.t5 is not None, PRESETS["demo"]
    if options.steps is None:
        options.steps = 1500 if on_text else preset["max_steps"]
    if options.batch is None:
        options.batch = 16 if on_text else preset.get("per_device_train_batch_size", 32)
    for name, default in TEXT_SIZES.items():
        if not on_text and getattr(options, name) != default:
            parser.error(f"--{name} is for real text; on the built-in tasks give the argument of a run with --set")
    if options.command == "many":
        options.data = str(with_builtin(options.work, Path(options.data)))
    there = available_tasks(options.data) if on_text else list(BUILTIN_SPECS)
    of_place = there if options.command == "many" else TEXT_TASKS if on_text else BUILTIN_TASKS
    options.tasks = list(options.tasks or of_place)
    if options.command == "transfer":
        options.to = list(options.to or (TEXT_TRANSFER if on_text else BUILTIN_TRANSFER))
        options.tasks = [task for task in options.tasks if task not in options.to]
    if options.quick:
        options.tasks = options.tasks[:2]
        vars(options).update({name: value for name, value in QUICK.items() if hasattr(options, name)})
    if unknown := {*options.tasks, *getattr(options, "to", ())} - set(there):
        parser.error(f"unknown task {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    options.set = {name: _value(text) for name, _, text in (each.partition("=") for each in options.set)}
    options.name_end, options.name = options.name, Path(options.t5).name if on_text else "builtin"
    options.lines = lines(options.methods, options.recipes)
    options.contents = contents_of(options, [*options.tasks, *getattr(options, "to", ())])
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _methods_of(path: Path) -> Mapping[str, Any]:
    """The methods in a result of `rates`."""
    try:
        methods = json.loads(path.read_text())["results"]["methods"]
        if all("best" in method["within"] for method in methods.values()):
            return methods
    except OSError as error:
        raise SystemExit(f"--chosen {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise SystemExit(f"--chosen {path} is not a result of `rates`: give the JSON file that `study.py rates` wrote")


def rates_of(options: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each line, by its label: as an option says, as `rates` found it, or the default.

    What a sweep lacks takes its default, which is printed. A sweep that has none of the lines is refused.
    """
    given = dict(options.learning_rate)
    chosen = {} if options.chosen is None else _methods_of(options.chosen)
    found, lacking, taken = {}, {}, False
    for line in options.lines:
        # tasks that are trained one by one train the same adapters
        like = Line("adapters", line.recipe) if line.method == "single_task" else line
        own = [f"{each.method}:{each.recipe}" for each in (line, like)] + [line.method, like.method]
        name = next((name for name in own if name in given), None)
        if name is not None:
            rate = given[name]
        elif like.label in chosen:
            rate, taken = chosen[like.label]["within"]["best"], True
        else:
            rate = lacking[line.label] = _default_rate(options, like)
        found[line.label] = rate
    if options.chosen is not None and lacking:
        names = ", ".join(lacking)
        if not taken:
            raise SystemExit(f"{options.chosen} has no rate of {names}: it would not be used; leave --chosen out")
        defaults = ", ".join(f"{label}: {rate:g}" for label, rate in lacking.items())
        print(f"{options.chosen} lacks some methods, which take their default learning rates ({defaults})")
    return found


def _default_rate(options: argparse.Namespace, line: Line) -> float:
    if options.t5 is None:
        return with_preset({"preset": "demo", **line.fields})["learning_rate"]
    return text_rate(line)


def run_of(options: argparse.Namespace, line: Line, rate: float, seed: int) -> tuple[Path, dict[str, Any]]:
    """The folder and the arguments of one run."""
    config = configuration(options, line, options.tasks, rate, seed)
    return named(options.work, line, rate, seed, config, options.contents), config


def outcome(folder: Path, config: Mapping[str, Any], validation: bool = False) -> dict[str, Any] | None:
    """What a run found on its test rows, or on its validation rows; None if it diverged."""
    try:
        metrics = train(folder, config)
    except Diverged:
        return None
    return on_validation(folder) if validation else metrics


def said(key: tuple[Any, ...], result: Mapping[str, Any] | None) -> str:
    end = "diverged" if result is None else f"{result['average_metrics']:.1f} on average"
    return f"{', '.join(map(str, key))}: {end}"


def rates(options: argparse.Namespace) -> None:
    calls = {}
    for seed in range(options.seeds):
        for rate in options.rates:
            for line in options.lines:
                run = run_of(options, line, rate, seed)
                calls[line.label, rate, seed] = lambda run=run: outcome(*run, validation=True)
    results = swept(in_parallel("rates", calls, options.jobs, said), [line.label for line in options.lines])
    results["settings"] = settings(options)
    finish(f"rates-{options.name}", options, results, sweep_table(results, caption(options, results)))


def trained(options: argparse.Namespace, rates: Mapping[str, float]) -> dict[tuple[str, int], dict[str, Any] | None]:
    """What every line found with every seed."""
    calls = {}
    for seed in range(options.seeds):
        for line in options.lines:
            run = run_of(options, line, rates[line.label], seed)
            calls[line.label, seed] = lambda run=run: outcome(*run)
    return in_parallel(options.command, calls, options.jobs, said)


def compare(options: argparse.Namespace) -> None:
    rates = rates_of(options)
    results = compared(trained(options, rates), list(rates))
    results["settings"] = settings(options, rates)
    finish(f"compare-{options.name}", options, results, methods_table(results, caption(options, results)))


def options(options: argparse.Namespace) -> None:
    rates, (line,) = rates_of(options), options.lines
    options.set = {"mixed_batches": True, **options.set}
    calls = {}
    for seed in range(options.seeds):
        for name in options.options:
            fields = option_fields(name, options.steps)
            rate = fields.pop("learning_rate", rates[line.label])
            of_run = argparse.Namespace(**{**vars(options), "set": {**options.set, **fields}})
            run = run_of(of_run, line, rate, seed)
            calls[name, seed] = lambda run=run: outcome(*run, validation=True)
    results = compared(in_parallel("options", calls, options.jobs, said), options.options)
    of_options = {name: option_fields(name, options.steps) for name in options.options}
    results["settings"] = {**settings(options, rates), "options": of_options}
    finish(f"options-{options.name}", options, results, methods_table(results, caption(options, results)))


def many(options: argparse.Namespace) -> None:
    rates = rates_of(options)
    results = compared(trained(options, rates), list(rates))
    results["settings"] = settings(options, rates)
    results["diagnostics"] = {}
    for line in options.lines:
        history = run_of(options, line, rates[line.label], 0)[0] / "history.json"  # none where it diverged
        results["diagnostics"][line.label] = diagnosed(json.loads(history.read_text()) if history.exists() else [])
    finish(f"many-{options.name}", options, results, comparison_table(results, caption(options, results)))


def transfer(options: argparse.Namespace) -> None:
    rates = rates_of(options)
    runs = {line.label: run_of(options, line, rates[line.label], 0) for line in options.lines}
    calls = {(label,): (lambda run=run: outcome(*run)) for label, run in runs.items()}
    for (label,), result in in_parallel("training", calls, options.jobs, said).items():
        if result is None:
            raise SystemExit(f"{label} diverged at learning rate {rates[label]:g}: give a lower one")
    cells = {
        (task, label): (lambda task=task, folder=folder: transferred(options, folder, task))
        for task in options.to
        for label, (folder, _) in runs.items()
    }
    found = in_parallel("transfer", cells, options.jobs, lambda key, _: f"{key[1]} to {key[0]}: done")
    for task in options.to:
        first = found[task, options.lines[0].label]
        methods = {label: next(iter(found[task, label]["methods"].values())) for label in runs}
        for method in methods.values():
            del method["run"]  # a path of this machine
        results = {**first, "methods": methods, "settings": settings(options, rates)}
        table = fewshot_report.table(results, ": ".join(transfer_in_words(results)))
        finish(f"fewshot-{task}-{options.name}", options, results, table)


def transferred(options: argparse.Namespace, run: Path, task: str) -> dict[str, Any]:
    """Transfer a run to one task in a process of its own; return the content of its fewshot.json."""
    folder = run.with_name(f"{run.name}-to-{task}-{options.fewshot_steps}")
    grid = ["--samples", *map(str, options.samples), "--seeds", str(options.seeds)]
    grid += ["--max_steps", str(options.fewshot_steps)]
    if options.eval_rows is not None:
        grid += ["--max_predict_samples", str(options.eval_rows)]
    if options.data is not None:
        grid += ["--split_validation_test", "true"]
    arguments, found = beside(folder, ".json"), folder / "fewshot.json"
    if not found.exists() or not arguments.exists() or json.loads(arguments.read_text()) != grid:
        found.unlink(missing_ok=True)
        command("fewshot", run, "--task", task, *grid, "--output_dir", folder, log=beside(folder, ".log"))
        arguments.write_text(json.dumps(grid))
    return json.loads(found.read_text())


def settings(options: argparse.Namespace, rates: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the results depend on, without the paths of this machine."""
    config = configuration(options, Line("finetuning"), options.tasks, 0.0, 0)
    own = {"model_name_or_path", "data_dir", "tasks", "variant", "learning_rate", "seed"}
    names = {"steps", "batch", "eval_rows", "seeds"} | ({"samples", "fewshot_steps"} & vars(options).keys())
    return {
        "t5": "embedded" if options.t5 is None else options.name,
        "tasks": options.tasks,
        **({} if rates is None else {"learning_rates": dict(rates)}),
        **{name: getattr(options, name) for name in sorted(names)},
        "recipes": {line.recipe: recipe_fields(line.recipe) for line in options.lines if line.recipe is not None},
        "set": {name: value for name, value in options.set.items() if name != "mixed_batches"},
        "arguments": {name: value for name, value in config.items() if name not in own},
    }


def caption(options: argparse.Namespace, results: Mapping[str, Any]) -> str:
    """What a table shows: the study, its tasks and T5, which rows, how many seeds and steps."""
    place = place_in_words(results["settings"], options.command == "many")
    return f"{options.command} on {place}: {budget_in_words(results)}"


def finish(name: str, options: argparse.Namespace, results: Mapping[str, Any], table: Table) -> None:
    """Print a table, and write the results, the table as a page shows it, and the plot."""
    console = Console()
    console.width = max(console.width, 180)  # rich truncates the numbers of a narrower table
    console.print(table)
    path = write(f"{name}-{options.name_end}" if options.name_end else name, where_runs_ran(), results, options.output)
    path.with_suffix(".md").write_text(markdown(table))
    draw(path)


def main() -> None:
    given = options_of()
    studies = {"rates": rates, "compare": compare, "options": options, "many": many, "transfer": transfer}
    studies[given.command](given)


if __name__ == "__main__":
    main()
