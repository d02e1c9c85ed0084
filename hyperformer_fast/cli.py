"""The ``hyperformer-fast`` command.

Heavy modules are imported by the subcommand that needs them, so that --help is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import __version__, task_commands
from .extras import MissingPackage, require
from .name_lists import Names

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


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
    parser.add_argument("--version", action="version", version=f"hyperformer-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, short: str, longer: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=short, description=longer or short, parents=[common], allow_abbrev=False)

    # Its flags, which are dataclasses, and those that fewshot takes from it are parsed by training/parser.py.
    command("train", "train, evaluate, report")
    _evaluate_options(command("evaluate", "evaluate a saved run"))
    _predict_options(
        command(
            "predict",
            "label new rows with a saved run",
            "Writes each row with two more columns, 'prediction' and the generated 'prediction_text'. If the rows "
            "already have such a column, it is kept, and the new one's name begins with 'hyperformer_'. The output "
            "grows as OUTPUT.partial; if the command is interrupted, the same command goes on there.",
        )
    )
    _fewshot_options(
        command(
            "fewshot",
            "transfer trained runs to a new task with few examples",
            "Trains each run further on a few examples of a task that it has not seen, for each number of examples and "
            "several seeds, and reports mean and deviation in a table and a plot. Flags of `train`, such as "
            "--max_steps and --learning_rate, override the run's own.",
        )
    )
    _export_options(
        command(
            "export",
            "write a saved run as graphs that run without this library",
            "Writes an encoder and one decoding step, with the weights of all tasks inside and the task of each sample "
            "as an input, the tokenizer, and export.json, which describes them (docs/export.md).",
        )
    )
    task_commands.add_options(
        command("tasks", "list, export, import, remove and rename the tasks of a saved run"), common, _base_option
    )
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


def _evaluate_options(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    evaluate.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="split to evaluate (default: test if there is one, else validation)",
    )
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        action=Names,
        metavar="TASK",
        help="tasks to evaluate (default: the run's eval_tasks, else all)",
    )
    _base_option(evaluate)
    evaluate.add_argument("--data_dir", "--data-dir", metavar="DIR", help="where the run's data is now")


def _predict_options(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    predict.add_argument(
        "--task", help="the rows' task (default: the run's only one, or as the rows' column 'task' says)"
    )
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", metavar="FILE", help="rows with the tasks' columns: .jsonl, .json, .csv, .tsv or .parquet"
    )
    source.add_argument("--text", nargs="+", metavar="TEXT", help="a single row, as the text of each column in order")
    predict.add_argument(
        "--output",
        metavar="FILE",
        help="a .jsonl, .json, .csv, .tsv or .parquet file (default: JSON lines to standard output)",
    )
    predict.add_argument(
        "--batch_size", "--batch-size", type=int, metavar="N",
        help="rows in a batch (default: the run's per_device_eval_batch_size)",
    )  # fmt: skip
    _base_option(predict)


def _fewshot_options(fewshot: argparse.ArgumentParser) -> None:
    fewshot.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folders of trained runs to compare")
    fewshot.add_argument("--task", required=True, help="the new task")
    fewshot.add_argument(
        "--samples", type=int, nargs="+", default=[4, 16, 32, 100], metavar="N",
        help="numbers of training examples (default: 4 16 32 100)",
    )  # fmt: skip
    fewshot.add_argument("--seeds", type=int, default=5, metavar="N", help="runs for each of them (default: 5)")
    fewshot.add_argument(
        "--init_from", "--init-from", default="auto", metavar="auto|TASK",
        help="the trained task whose embedding the new one starts from; auto: the one that the paper takes for a task "
        "of this kind, else the one with the lowest loss on the examples (default: auto)",
    )  # fmt: skip
    fewshot.add_argument(
        "--train", choices=("all", "embedding"), default="all",
        help="train all that the run trained, or the new task's embedding alone (default: all)",
    )  # fmt: skip
    fewshot.add_argument("--data_dir", "--data-dir", metavar="DIR", help="folder with the new task's data")
    fewshot.add_argument("--task_file", "--task-file", metavar="FILE", help="YAML or JSON file with the task's entry")
    fewshot.add_argument(
        "--output_dir", "--output-dir", default="fewshot-output", metavar="DIR",
        help="where the table and the plot are written (default: fewshot-output)",
    )  # fmt: skip
    _base_option(fewshot)


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    export.add_argument(
        "--format", choices=("torch", "onnx", "aoti"), required=True,
        help="torch: torch.export; onnx: for onnxruntime; aoti: compiled by AOTInductor for this CPU",
    )  # fmt: skip
    export.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    export.add_argument(
        "--tasks", nargs="+", action=Names, metavar="TASK",
        help="tasks to export, in the order of their indices in the graphs (default: all of the run's)",
    )  # fmt: skip
    _base_option(export)


def _base_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model_name_or_path", "--model-name-or-path", metavar="PATH_OR_NAME", help="where the run's T5 is now"
    )
    command.add_argument("--model", dest="old_model", help=argparse.SUPPRESS)


def _base(options: argparse.Namespace) -> str | None:
    """Return where the T5 is now, also by the flag's older name."""
    if options.old_model is not None:
        warnings.warn("arguments have new names: model is now model_name_or_path", DeprecationWarning, stacklevel=2)
    where: str | None = options.model_name_or_path or options.old_model
    return where


def _train(argv: Sequence[str]) -> None:
    from .training import RunArguments, train_run

    _quiet()
    with _own_warnings():
        run = RunArguments.from_args(argv)
    try:
        train_run(run)
    except KeyboardInterrupt:
        from .training.folder import newest_checkpoint

        newest, _ = newest_checkpoint(Path(str(run.training.output_dir)))
        then = (
            "nothing was saved yet" if newest is None else f"--resume_from_checkpoint true goes on from {newest.name}"
        )
        raise KeyboardInterrupt(f"interrupted; {then}") from None


def _evaluate(options: argparse.Namespace) -> None:
    from .training import evaluate_run

    _quiet()
    with _own_warnings():
        base = _base(options)
    evaluate_run(options.run_dir, options.split, options.tasks, base, options.data_dir)


def _predict(options: argparse.Namespace) -> None:
    from .training.predict import predict_file

    _quiet()
    with _own_warnings():
        base = _base(options)
    predict_file(
        options.run_dir, options.input, options.output, options.task, options.text, base, batch_size=options.batch_size
    )


def _fewshot(options: argparse.Namespace) -> None:
    from .training.arguments import RunConfigError
    from .training.fewshot import fewshot_run
    from .training.parser import parse_flags
    from .training.translate import today

    _quiet()
    with _own_warnings():
        try:
            _, training = parse_flags(options.rest, with_config=False)
        except RunConfigError as error:
            first = options.run_dirs[0]
            if os.path.exists(first):
                raise
            # argparse takes what follows a flag that it does not know for the first RUN_DIR.
            where = f"{first!r} is no folder of a run: give RUN_DIR before the flags of train"
            raise RunConfigError(f"{error} ({where})") from None
        training, base = today(training), _base(options)
    fewshot_run(
        options.run_dirs,
        options.task,
        samples=options.samples,
        seeds=options.seeds,
        init_from=options.init_from,
        train=options.train,
        data_dir=options.data_dir,
        task_file=options.task_file,
        output_dir=options.output_dir,
        model=base,
        **training,
    )


def _export(options: argparse.Namespace) -> None:
    from .export.run import export_run

    _quiet()
    with _own_warnings():
        base = _base(options)
    export_run(options.run_dir, options.format, options.output, options.tasks, base)


def _tasks(options: argparse.Namespace) -> None:
    _quiet()
    with _own_warnings():
        task_commands.run(options, _base(options))


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """Print this package's warnings as lines of the command, each once and on the first process only."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            _print_warnings(caught)


def _print_warnings(caught: Sequence[warnings.WarningMessage]) -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    for each in {str(each.message): each for each in caught}.values():
        if not each.filename.startswith(here):
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)
        elif os.environ.get("RANK", "0") == "0":
            print(f"hyperformer-fast: warning: {each.message}", file=sys.stderr)


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
    "evaluate": _evaluate, "predict": _predict, "fewshot": _fewshot, "params": _params, "tune": _tune,
    "doctor": _doctor, "export": _export, "tasks": _tasks,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    The exit code is 0 for success, 1 for an error (reported in one message), 2 for wrong usage and 130 for Ctrl-C.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    leading = next((place for place, token in enumerate(argv) if token != "--debug"), len(argv))
    debug = "--debug" in argv
    try:
        if argv[leading : leading + 1] == ["train"]:
            _train(argv[leading + 1 :])
            return 0
        parser = _parser()
        options, rest = parser.parse_known_args(argv)
        options.rest = rest
        if rest and options.command != "fewshot":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
        if debug:
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
    from .training.ranks import OtherProcessFailed
    from .training.trainer import TrainingDiverged

    documented = RunError, RunConfigError, DataError, UnknownTask, CheckpointError, TrainingDiverged, BackendError
    if isinstance(error, (MemoryError, OutOfMemoryError, OtherProcessFailed, *documented)):
        return True
    if isinstance(error, OSError):
        return bool(str(error))
    if isinstance(error, ImportError):
        return "install" in str(error)  # how transformers names the package that an argument needs
    return isinstance(error, ValueError) and _raised_here(error)


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == "hyperformer_fast"


if __name__ == "__main__":
    sys.exit(main())
