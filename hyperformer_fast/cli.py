"""The ``hyperformer-fast`` command.

Heavy modules are imported by the subcommand that needs them, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .extras import MissingPackage, require

USAGE, FAILURE, INTERRUPTED = 2, 1, 130

#: Options of ``train`` that set a field of RunConfig, which has their defaults; each has its metavar and help text.
_TEXT = {
    "model": ("PATH_OR_NAME", "folder or Hub name of the T5 (default: the embedded tiny T5)"),
    "data-dir": ("DIR", "folder of <task>/{train,validation,test}.jsonl, or hub:glue (default: the built-in tasks)"),
    "output-dir": ("DIR", "run folder (default: hyperformer-output)"),
    "schedule": ("NAME", "learning rate schedule: linear, cosine or constant"),
}
_WHOLE = {
    "steps": "number of optimizer steps",
    "batch-size": "examples per micro-batch and process",
    "gradient-accumulation": "micro-batches per optimizer step",
    "warmup-steps": "optimizer steps over which the learning rate warms up",
    "max-source-length": "longest source, in tokens; longer ones are truncated",
    "max-train-rows": "use at most N training rows of each task",
    "max-eval-rows": "evaluate on at most N rows of each task",
    "eval-batch-size": "batch size of every evaluation",
    "eval-steps": "evaluate on validation every N optimizer steps (0: never)",
    "eval-rows": "validation rows of each task in these evaluations",
    "logging-steps": "log the training loss every N optimizer steps",
    "save-steps": "save a checkpoint every N optimizer steps (0: never)",
    "save-total-limit": "keep only the newest N checkpoints",
    "seed": "random seed of the new parameters, the task sampling and dropout",
}
_NUMBERS = {
    "learning-rate": "AdamW's peak learning rate",
    "weight-decay": "AdamW's weight decay",
    "label-smoothing": "label smoothing of the cross-entropy",
    "temperature": "a task of n rows is sampled with probability proportional to n^(1/X)",
}
_SWITCHES = {
    "keep-best": "keep the weights of the best evaluation instead of the last ones",
    "gradient-checkpointing": "recompute activations in the backward pass: less memory, more time",
    "bf16": "train under autocast in bfloat16",
}


class _Names(argparse.Action):
    """Accepts both ``--tasks a b --tasks c`` and ``--tasks a,b,c``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        names = [name.strip() for value in values or () for name in value.split(",")]
        if not all(names):
            parser.error(f"{option_string}: an empty name in {' '.join(values or ())!r}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *names])


def _setting(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``. A value that is not JSON is taken as text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperformer-fast",
        description="Fine-tune one frozen T5 on many tasks with HyperFormer.",
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    # SUPPRESS: otherwise a subcommand's default would overwrite the option given before the subcommand.
    for each in (parser, common):
        each.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, short: str, longer: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=short, description=longer or short, parents=[common], allow_abbrev=False)

    longer = "Without arguments, trains the embedded tiny T5 on the built-in tasks."
    _train_options(command("train", "train, evaluate, report", longer))
    evaluate = command("evaluate", "evaluate a saved run")
    evaluate.add_argument("run_dir", metavar="RUN_DIR")
    evaluate.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="split to evaluate (default: test if there is one, else validation)",
    )
    evaluate.add_argument(
        "--tasks", nargs="+", action=_Names, metavar="TASK", help="tasks to evaluate (default: all of the run's)"
    )
    evaluate.add_argument("--model", metavar="PATH_OR_NAME", help="where the run's T5 is now")
    evaluate.add_argument("--data-dir", metavar="DIR", help="where the run's data is now")

    predict = command(
        "predict",
        "label new rows with a saved run",
        "Writes each row with two more columns, 'prediction' and the generated 'text'. If the rows already have such a "
        "column, it is kept, and the new one is named 'hyperformer_prediction' or 'hyperformer_text'.",
    )
    predict.add_argument("run_dir", metavar="RUN_DIR")
    predict.add_argument("--task", required=True, help="one of the run's tasks")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="FILE.jsonl", help="rows with the task's columns")
    source.add_argument("--text", nargs="+", metavar="TEXT", help="a single row, as the text of each column in order")
    predict.add_argument("--output", metavar="FILE.jsonl", help="default: standard output")
    predict.add_argument("--model", metavar="PATH_OR_NAME", help="where the run's T5 is now")

    command("params", "parameter counts of each variant on T5-small and T5-base")
    tune = command("tune", "find the fastest Triton tiles on this GPU", "Writes a table of tiles that later runs read.")
    tune.add_argument("--d", type=int, nargs="+", default=[768], metavar="N", help="widths of the T5 (default: 768)")
    tune.add_argument("--b", type=int, nargs="+", default=[24], metavar="N", help="bottlenecks (default: 24)")
    tune.add_argument("--dtypes", nargs="+", default=["bf16"], choices=("bf16", "fp16", "fp32"), help="default: bf16")
    tune.add_argument("--pre-norm", action="store_true", help="tune for adapters with a layer norm before them")
    tune.add_argument(
        "--rows", type=int, default=16384, metavar="N", help="number of rows to time with (default: 16384)"
    )
    tune.add_argument(
        "--out", metavar="FILE.json", help="where to write the table (default: the file that later runs read)"
    )
    doctor = command("doctor", "show versions, the built libraries and what each backend serves")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--no-check", action="store_true", help="do not compare the backends with the reference")
    return parser


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "config", nargs="?", metavar="CONFIG.json", help="a run's configuration; the options below override it"
    )
    for name, (metavar, text) in _TEXT.items():
        train.add_argument(f"--{name}", metavar=metavar, help=text)
    train.add_argument(
        "--tasks", nargs="+", action=_Names, metavar="TASK", help="tasks to train (default: all tasks in the data)"
    )
    for options, kind in ((_WHOLE, int), (_NUMBERS, float)):
        for name, text in options.items():
            train.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    for name, text in _SWITCHES.items():
        train.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    train.add_argument("--variant", help="one of hyperformer++, hyperformer-shared and hyperformer")
    train.add_argument(
        "--reduction-factor", type=int, metavar="N", help="the adapters' bottleneck is the T5's width // N"
    )
    train.add_argument(
        "--hyperformer",
        nargs="+",
        type=_setting,
        action="extend",
        metavar="KEY=VALUE",
        help="other fields of HyperFormerConfig",
    )
    train.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    train.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")


def _train(options: argparse.Namespace) -> None:
    from .training import arguments

    named = [name.replace("-", "_") for group in (_TEXT, _WHOLE, _NUMBERS, _SWITCHES) for name in group] + ["tasks"]
    changes = {name: value for name in named if (value := getattr(options, name)) is not None}
    adapters = dict(options.hyperformer or ())
    adapters |= {n: v for n in ("variant", "reduction_factor") if (v := getattr(options, n)) is not None}
    if adapters:
        changes["hyperformer"] = adapters
    if options.resume and options.overwrite:
        raise arguments.RunConfigError("--resume and --overwrite exclude each other")
    given = arguments.merge(arguments.read_fields(options.config), changes) if options.config else changes
    if options.resume:
        from .training.folder import read_run

        folder = Path(given.get("output_dir", arguments.RunConfig.output_dir))
        # Options that are not given keep the run's values. train_run refuses those that differ from the run's.
        given = arguments.merge(read_run(folder)[0].to_dict(), {**given, "output_dir": str(folder)})
    run = arguments.RunConfig.from_dict(given)

    from .training import train_run

    _quiet()
    try:
        train_run(run, options.resume, options.overwrite)
    except KeyboardInterrupt:
        from .training.folder import newest_checkpoint

        newest, _ = newest_checkpoint(Path(run.output_dir))
        then = "nothing was saved yet" if newest is None else f"--resume goes on from {newest.name}"
        raise KeyboardInterrupt(f"interrupted; {then}") from None


def _evaluate(options: argparse.Namespace) -> None:
    from .training import evaluate_run

    _quiet()
    evaluate_run(options.run_dir, options.split, options.tasks, options.model, options.data_dir)


def _predict(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .atomic import write_file
    from .training.predict import predict_run, row_of_texts
    from .training.progress import say

    _quiet()
    console = Console(stderr=True)
    rows: Any = [row_of_texts(options.run_dir, options.task, options.text)] if options.text else options.input
    labelled = predict_run(options.run_dir, options.task, rows, options.model, console)
    encoding = "utf-8" if options.output else sys.stdout.encoding or "utf-8"
    text = "".join(_line(row, encoding) for row in labelled)
    if options.output is None:
        sys.stdout.write(text)
        return
    output = Path(options.output)
    if output.exists() and not (output.is_file() or output.is_dir()):
        # A device or a pipe, such as /dev/stdout, is written to, where a file would be replaced.
        output.write_text(text, encoding=encoding)
    else:
        with write_file(output) as partial:
            Path(partial).write_text(text, encoding=encoding)
    say(console, f"{len(labelled)} rows in {options.output}")


def _line(row: dict[str, Any], encoding: str) -> str:
    """One line of JSON, with escapes only if the encoding cannot represent its text."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def _quiet() -> None:
    """Silence transformers' progress bars and warnings, which would be printed between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _params(options: argparse.Namespace) -> None:
    require("the table of parameters", "rich")
    from rich.console import Console

    from .parameters import table

    console = Console()
    # rich truncates the numbers of a narrower table.
    console.width = max(console.width, 116)
    console.print(table())


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor([f"--{name}" for name in ("json", "no-check") if getattr(options, name.replace("-", "_"))])


def _tune(options: argparse.Namespace) -> None:
    from .tuning import main as tune

    out = Path(options.out) if options.out else None
    tune(options.d, options.b, options.dtypes, options.pre_norm, options.rows, out)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": _train, "evaluate": _evaluate, "predict": _predict, "params": _params, "doctor": _doctor, "tune": _tune,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    The exit code is 0 for success, 1 for an error (reported in one message), 2 for wrong usage and 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options) or 0
    except KeyboardInterrupt as error:
        print(f"\nhyperformer-fast: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`.
        sys.stderr.close()
        return FAILURE
    except MissingPackage as error:
        print(f"hyperformer-fast: error: {error}", file=sys.stderr)
        return FAILURE
    except Exception as error:
        if getattr(options, "debug", False):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"hyperformer-fast: error{'' if rank == '0' else f' (rank {rank})'}: {_message(error)}", file=sys.stderr)
        return USAGE if _is_usage(error) else FAILURE


def _is_usage(error: Exception) -> bool:
    from .data import UnknownTask
    from .training.arguments import RunConfigError

    return isinstance(error, (RunConfigError, UnknownTask))


def _message(error: Exception) -> str:
    """Return the message alone if it was written for users; otherwise add its class and how to find its cause."""
    if _is_users(error):
        return str(error) or "out of memory"
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where it comes from)"


def _is_users(error: Exception) -> bool:
    """Return whether the settings, the data or the machine are at fault, and not the program.

    They are for the error classes that this package documents, for file errors and for lack of memory. A plain
    ValueError counts only if this package raised it, which it does for wrong values; one raised inside another library
    does not.
    """
    from torch import OutOfMemoryError

    from .backends.base import BackendError
    from .checkpoint import CheckpointError
    from .data import DataError, UnknownTask
    from .training.arguments import RunConfigError
    from .training.folder import RunError
    from .training.trainer import TrainingDiverged

    documented = RunError, RunConfigError, DataError, UnknownTask, CheckpointError, TrainingDiverged, BackendError
    if isinstance(error, (MemoryError, OutOfMemoryError, *documented)):
        return True
    if isinstance(error, OSError):
        return bool(str(error))
    return isinstance(error, ValueError) and _raised_here(error)


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "hyperformer_fast"


if __name__ == "__main__":
    sys.exit(main())
