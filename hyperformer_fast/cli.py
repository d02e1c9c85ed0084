"""The ``hyperformer-fast`` command.

Heavy modules are imported by the subcommand that needs them, so that --help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .extras import MissingPackage, require

USAGE, FAILURE, INTERRUPTED = 2, 1, 130

#: Options of ``train`` that are fields of a run, with their help; the defaults are RunConfig's.
_TEXT = {
    "model": ("PATH_OR_NAME", "a T5 (default: the embedded tiny one)"),
    "data-dir": ("DIR", "<task>/{train,validation,test}.jsonl, or hub:glue (default: the built-in tasks)"),
    "output-dir": ("DIR", "folder of the run (default: hyperformer-output)"),
    "schedule": ("NAME", "of the learning rate: linear, cosine or constant"),
}
_WHOLE = {
    "steps": "optimizer steps",
    "batch-size": "examples of a micro-batch on one process",
    "gradient-accumulation": "micro-batches of an optimizer step",
    "warmup-steps": "of the learning rate",
    "max-source-length": "tokens; longer sources are cut",
    "max-train-rows": "rows of each task at the most",
    "max-eval-rows": "rows of each task at the most",
    "eval-batch-size": "of every evaluation",
    "eval-steps": "between two evaluations on validation (0: none)",
    "eval-rows": "of each task in those evaluations",
    "logging-steps": "between two points of the loss curve",
    "save-steps": "between two checkpoints (0: none)",
    "save-total-limit": "checkpoints that are kept",
    "seed": "of new parameters, sampling and dropout",
}
_NUMBERS = {
    "learning-rate": "peak of AdamW's",
    "weight-decay": "of AdamW",
    "label-smoothing": "of the cross-entropy",
    "temperature": "tasks are drawn with p ~ n^(1/temperature)",
}
_SWITCHES = {
    "keep-best": "keep the weights of the best evaluation, not the last",
    "gradient-checkpointing": "less memory, more time",
    "bf16": "autocast to bfloat16",
}


class _Names(argparse.Action):
    """``--tasks a b --tasks c`` and ``--tasks a,b,c`` alike."""

    def __call__(self, parser, namespace, values, option_string=None):
        names = [name.strip() for value in values for name in value.split(",")]
        if not all(names):
            parser.error(f"{option_string}: an empty name in {' '.join(values)!r}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *names])


def _setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value is JSON, or text where it is none."""
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
    # SUPPRESS: a subcommand's default would undo the option before it
    for each in (parser, common):
        each.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, short: str, longer: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=short, description=longer or short, parents=[common], allow_abbrev=False)

    _train_options(
        command("train", "train, evaluate, report", "Without arguments: the embedded tiny T5 on the built-in tasks.")
    )
    evaluate = command("evaluate", "evaluate a saved run")
    evaluate.add_argument("run_dir", metavar="RUN_DIR")
    evaluate.add_argument(
        "--split", choices=("train", "validation", "test"), help="default: test, or validation where there is none"
    )
    evaluate.add_argument("--tasks", nargs="+", action=_Names, metavar="TASK", help="of the run's (default: all)")
    evaluate.add_argument("--model", metavar="PATH_OR_NAME", help="where the run's T5 is now")
    evaluate.add_argument("--data-dir", metavar="DIR", help="where the run's data is now")

    predict = command(
        "predict",
        "label new rows with a saved run",
        "Writes each row with two more columns, 'prediction' and the generated 'text'. Where the rows have columns of "
        "these names, theirs stay and ours are 'hyperformer_prediction' and 'hyperformer_text'.",
    )
    predict.add_argument("run_dir", metavar="RUN_DIR")
    predict.add_argument("--task", required=True, help="one of the run's")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="FILE.jsonl", help="rows with the task's columns")
    source.add_argument("--text", nargs="+", metavar="TEXT", help="one row: the text of each column, in order")
    predict.add_argument("--output", metavar="FILE.jsonl", help="default: standard output")
    predict.add_argument("--model", metavar="PATH_OR_NAME", help="where the run's T5 is now")

    command("params", "what each variant trains on T5-small and T5-base")
    tune = command(
        "tune", "find the fastest tiles of the Triton kernels on this GPU", "Writes a table that later runs read."
    )
    tune.add_argument("--d", type=int, nargs="+", default=[768], metavar="N", help="widths of the T5 (default: 768)")
    tune.add_argument("--b", type=int, nargs="+", default=[24], metavar="N", help="bottlenecks (default: 24)")
    tune.add_argument("--dtypes", nargs="+", default=["bf16"], choices=("bf16", "fp16", "fp32"), help="default: bf16")
    tune.add_argument("--pre-norm", action="store_true", help="adapters with a norm before them")
    tune.add_argument("--rows", type=int, default=16384, metavar="N", help="to time with (default: 16384)")
    tune.add_argument("--out", metavar="FILE.json", help="default: the table that runs read")
    doctor = command("doctor", "versions, what was built, which backend serves what")
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.add_argument("--no-check", action="store_true", help="do not run the backends against the reference")
    return parser


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "config", nargs="?", metavar="CONFIG.json", help="a run's configuration; the options below override it"
    )
    for name, (metavar, text) in _TEXT.items():
        train.add_argument(f"--{name}", metavar=metavar, help=text)
    train.add_argument("--tasks", nargs="+", action=_Names, metavar="TASK", help="one or more (default: all there are)")
    for options, kind in ((_WHOLE, int), (_NUMBERS, float)):
        for name, text in options.items():
            train.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    for name, text in _SWITCHES.items():
        train.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    train.add_argument("--variant", help="hyperformer++, hyperformer-shared or hyperformer")
    train.add_argument("--reduction-factor", type=int, metavar="N", help="bottleneck = width // N")
    train.add_argument(
        "--hyperformer",
        nargs="+",
        type=_setting,
        action="extend",
        metavar="KEY=VALUE",
        help="other fields of HyperFormerConfig",
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
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
        # what is not said anew is as it was; what is said must agree, which train_run checks
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

    from .checkpoint import write_file
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
    with write_file(options.output) as partial:
        Path(partial).write_text(text, encoding=encoding)
    say(console, f"{len(labelled)} rows in {options.output}")


def _line(row: Any, encoding: str) -> str:
    """One line of JSON; its text as it is where the encoding has it, and else escaped."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def _quiet() -> None:
    """transformers' own bars and warnings would stand between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _params(options: argparse.Namespace) -> None:
    require("the table of parameters", "rich")
    from rich.console import Console

    from .parameters import table

    console = Console()
    # below this width the numbers are cut
    console.width = max(console.width, 116)
    console.print(table())


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor([f"--{name}" for name in ("json", "no-check") if getattr(options, name.replace("-", "_"))])


def _tune(options: argparse.Namespace) -> None:
    from .tuning import main as tune

    out = Path(options.out) if options.out else None
    tune(options.d, options.b, options.dtypes, options.pre_norm, options.rows, out)


_COMMANDS = {
    "train": _train, "evaluate": _evaluate, "predict": _predict, "params": _params, "doctor": _doctor, "tune": _tune,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0, 1 for an error (said in one message), 2 for wrong usage, 130 for Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options) or 0
    except KeyboardInterrupt as error:
        print(f"\nhyperformer-fast: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output went away, as `head` does
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
    """The message alone where it was written for users, else also its class and how to find its cause."""
    if _is_users(error):
        return str(error) or "out of memory"
    return f"{type(error).__name__}: {error} (unexpected; --debug shows where it comes from)"


def _is_users(error: Exception) -> bool:
    """Whether the settings, the data or the machine are at fault, not the program.

    That is so of the classes of errors that this package documents, of files and of memory. A plain ValueError is one
    where this package raised it, as it does for wrong values; one from inside another library is not.
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
