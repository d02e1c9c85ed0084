"""``hyperformer-fast tasks``: list the tasks of a saved run, write one to a file, and make a run with others of it.

A run itself is never changed, because its checkpoints have its tasks as they are: what changes goes to another folder,
which is a run that can be evaluated, exported and used for predictions. Heavy modules are imported when a command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .model import HyperFormerModel

Add = Callable[..., argparse.ArgumentParser]


def add_options(parser: argparse.ArgumentParser, common: argparse.ArgumentParser, base: Callable[..., None]) -> None:
    """Add the actions and their options. ``base`` adds the option that says where the T5 is."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, short: str, *arguments: tuple[str, str]) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=short, description=short, parents=[common], allow_abbrev=False)
        made.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
        for argument, words in arguments:
            made.add_argument(argument, metavar=argument.upper(), help=words)
        base(made)
        return made

    action("list", "the run's tasks, with the bytes of what belongs to each alone")
    export = action("export", "write one task to a file", ("task", "the task"), ("file", "the file to write"))
    export.add_argument("--overwrite", action="store_true", help="replace the file if there is one")
    add = action("import", "make a run that has the task of a file, too", ("file", "a file that `export` wrote"))
    add.add_argument("--name", help="the task's name there (default: the one in the file)")
    add.add_argument(
        "--like",
        metavar="TASK",
        help="the run's task whose columns and texts the new one has (default: what is known under the new name)",
    )
    remove = action("remove", "make a run that lacks a task", ("task", "the task"))
    rename = action(
        "rename", "make a run in which a task has another name", ("task", "the task"), ("new", "its new name")
    )
    for each in (add, remove, rename):
        each.add_argument("--output", required=True, metavar="DIR", help="folder of the new run")
        each.add_argument("--overwrite", action="store_true", help="replace a run in that folder")


def run(options: argparse.Namespace, base: str | None) -> None:
    """Run the action that ``options`` name, with the T5 at ``base`` (None: where it was)."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if options.action in ("list", "export"):
        model = _loaded(options.run_dir, base, console)[0]
        if options.action == "list":
            _list(model, console)
        else:
            model.export_task(options.task, options.file, overwrite=options.overwrite)
        return
    _write_changed(options, base, console)


def _loaded(folder: str, base: str | None, console: Console) -> tuple[HyperFormerModel, dict[str, Any]]:
    """The model of a run, and the content of its ``run.json``."""
    from .training.evaluate import load_model
    from .training.folder import read_run

    arguments, _, content = read_run(folder)
    return load_model(folder, arguments, base, console)[0], content


def _list(model: HyperFormerModel, console: Console) -> None:
    from .task_changes import own_tensors

    names = model.hyperformer_config.tasks
    sizes = [f"{sum(each.nbytes for each in own_tensors(model, name).values()):,}" for name in names]
    for name, size in zip(names, sizes):
        console.print(
            f"{name:<{max(map(len, names))}}  {size:>{max(map(len, sizes))}} bytes", markup=False, highlight=False
        )
    model.prepare(names[0])
    each = model.memory_footprint().prepared_per_task
    console.print(f"and {each:,} bytes each while its weights are kept for inference", highlight=False)


def _write_changed(options: argparse.Namespace, base: str | None, console: Console) -> None:
    from .atomic import write_directory
    from .export.folder import check_replaceable
    from .training.folder import EVALUATION_NAME, OF_THE_MODEL, RUN_NAME, RunError, write_json

    output = Path(options.output)
    if output.resolve() == Path(options.run_dir).resolve():
        raise RunError(f"{output} is the run itself, which stays as it is: give another folder as --output")
    check_replaceable(output, RUN_NAME, (*OF_THE_MODEL, EVALUATION_NAME))  # never a run that was trained there
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise RunError(f"there is a run in {output}: give another folder, or --overwrite to replace it")
    model, content = _loaded(options.run_dir, base, console)
    said = _CHANGES[options.action](model, content, options)
    with write_directory(output) as partial:
        model.save_pretrained(partial)
        write_json(partial / RUN_NAME, content)
    console.print(f"{said}: {len(model.hyperformer_config.tasks)} tasks in {output}", markup=False, highlight=False)


def _import(model: HyperFormerModel, content: dict[str, Any], options: argparse.Namespace) -> str:
    from .data.registry import find_task
    from .training.folder import RunError

    name = model.import_task(options.file, options.name)
    specs = {**content["tasks"], **content.get("kept_tasks", {})}
    if options.like is not None:
        if options.like not in specs:
            raise RunError(f"unknown task {options.like!r}; this run has {', '.join(specs)}")
        fields = specs[options.like]
    else:
        known = find_task(name, content["arguments"].get("text_style", "default"))
        if known is None:
            raise RunError(
                f"no task is known as {name!r}, so that its rows could not be read: say with --like which task of the "
                f"run has such rows ({', '.join(specs)})"
            )
        fields = known.to_dict()
    content.setdefault("kept_tasks", {})[name] = {**fields, "name": name}
    return f"imported {name}"


def _remove(model: HyperFormerModel, content: dict[str, Any], options: argparse.Namespace) -> str:
    model.remove_task(options.task)
    _taken(content, options.task)
    return f"removed {options.task}"


def _rename(model: HyperFormerModel, content: dict[str, Any], options: argparse.Namespace) -> str:
    model.rename_task(options.task, options.new)
    fields = _taken(content, options.task)
    # Its data is under the old name, so that it can be predicted, but no more be evaluated as a task of the run.
    content.setdefault("kept_tasks", {})[options.new] = {**fields, "name": options.new}
    return f"renamed {options.task} to {options.new}"


def _taken(content: dict[str, Any], task: str) -> dict[str, Any]:
    """Take a task out of the content of a ``run.json``, and return its specification."""
    found: dict[str, Any] = {}
    for part in ("kept_tasks", "tasks"):
        found = content.get(part, {}).pop(task, found)
    content["data"].pop(task, None)
    for field in ("tasks", "eval_tasks"):
        names = content["arguments"].get(field)
        if names and task in names:
            content["arguments"][field] = [name for name in names if name != task] or None
    return found


_CHANGES = {"import": _import, "remove": _remove, "rename": _rename}
