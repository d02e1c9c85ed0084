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

#: The entry of a ``run.json`` that only runs have that this command made: the folder of the run that they were made of.
MADE_OF = "made_of"


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
    export.add_argument("--overwrite", action="store_true", help="replace the file if it is one of a task")
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
        each.add_argument("--overwrite", action="store_true", help="replace a run that this command made there")


def run(options: argparse.Namespace, base: str | None) -> None:
    """Run the action that ``options`` name, with the T5 at ``base`` (None: where it was)."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if options.action in ("list", "export"):
        model = _loaded(options.run_dir, base, console)[0]
        if options.action == "list":
            _list(model, console)
        else:
            if options.overwrite:
                _check_file(Path(options.file))
            model.export_task(options.task, options.file, overwrite=options.overwrite)
        return
    _write_changed(options, base, console)


def _loaded(folder: str, base: str | None, console: Console) -> tuple[HyperFormerModel, dict[str, Any]]:
    """The model of a run, and the content of its ``run.json``."""
    from .training.evaluate import load_model
    from .training.folder import read_run

    arguments, _, content = read_run(folder)
    return load_model(folder, arguments, base, console)[0], content


def _check_file(file: Path) -> None:
    """Raise RunError if the file to replace holds no task, but the weights of a run, say."""
    from .checkpoint import CheckpointError
    from .task_files import read_task_file
    from .training.folder import RunError

    if not file.is_file():
        return
    try:
        read_task_file(file)
    except CheckpointError as error:
        raise RunError(f"{file} holds no task, and is not replaced: give another name ({error})") from None


def _list(model: HyperFormerModel, console: Console) -> None:
    from .task_changes import of_tasks, own_tensors

    names = model.hyperformer_config.tasks
    own = [own_tensors(model, name) if of_tasks(model) else {} for name in names]
    sizes = [f"{sum(each.nbytes for each in tensors.values()):,}" for tensors in own]
    for name, size in zip(names, sizes):
        console.print(
            f"{name:<{max(map(len, names))}}  {size:>{max(map(len, sizes))}} bytes", markup=False, highlight=False
        )
    model.prepare(names[0])
    each = model.memory_footprint().prepared_per_task
    console.print(f"and {each:,} bytes each while its weights are kept for inference", highlight=False)


def _write_changed(options: argparse.Namespace, base: str | None, console: Console) -> None:
    from .atomic import write_directory
    from .training.folder import RUN_NAME, write_json

    output, source = Path(options.output), Path(options.run_dir).resolve()
    _check_output(output, source, options.overwrite)
    model, content = _loaded(options.run_dir, base, console)
    said = _CHANGES[options.action](model, content, options)
    with write_directory(output) as partial:
        model.save_pretrained(partial)
        write_json(partial / RUN_NAME, {**content, MADE_OF: str(source)})
        _check_output(output, source, options.overwrite)  # again, for what came there meanwhile
    console.print(f"{said}: {len(model.hyperformer_config.tasks)} tasks in {output}", markup=False, highlight=False)


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise RunError or OSError unless a run may be written to ``output``, where everything is replaced."""
    from . import model_card
    from .export.folder import check_replaceable
    from .json_files import read_object
    from .training.folder import EVALUATION_NAME, OF_THE_MODEL, RUN_NAME, RunError

    place = output.resolve()
    if place == source:
        raise RunError(f"{output} is the run itself, which stays as it is: give another folder as --output")
    if source in place.parents:
        raise RunError(f"{output} lies in the run, which stays as it is: give a folder outside of it as --output")
    check_replaceable(output, RUN_NAME, (*OF_THE_MODEL, EVALUATION_NAME))
    if not (output / RUN_NAME).is_file():
        return
    if MADE_OF not in read_object(output / RUN_NAME):
        raise RunError(f"there is a run in {output} that was trained, which is never replaced: give another folder")
    if not overwrite:
        raise RunError(f"there is a run in {output}: give another folder, or --overwrite to replace it")
    card = output / model_card.NAME
    if card.is_file() and not model_card.is_ours(card.read_text(encoding="utf-8", errors="replace")):
        raise RunError(f"{card} was written by somebody else, and would be lost: move it away, or give another folder")


def _import(model: HyperFormerModel, content: dict[str, Any], options: argparse.Namespace) -> str:
    from .data.registry import find_task, with_prefix
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
        fields = (with_prefix(known) if content["arguments"].get("add_prefix") else known).to_dict()
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
    if fields:  # a task of weights that had no run.json has none
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
