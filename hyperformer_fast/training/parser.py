"""The flags of ``hyperformer-fast train``: those of the dataclasses, and the older names of our first release."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import string_to_bool

from ..nearest import did_you_mean
from .arguments import (
    DATA_SEED_HELP,
    KNOWN_FIELDS,
    AdapterArguments,
    DataArguments,
    HyperFormerTrainingArguments,
    ModelArguments,
    RunArguments,
    checked_fields,
)
from .config_file import SUFFIXES, read_fields
from .field_checks import RunConfigError
from .help_text import HelpFormatter, shorten
from .settle import EMBEDDED, check_start, overridden
from .translate import today

_UNSET = object()

#: Flags of the first release whose names are gone, with what their values are.
_OLDER: dict[str, Any] = {
    "model": str,
    "steps": int,
    "batch-size": int,
    "gradient-accumulation": int,
    "schedule": str,
    "label-smoothing": float,
    "max-train-rows": int,
    "max-eval-rows": int,
    "eval-rows": int,
    "eval-batch-size": int,
    "keep-best": bool,
    "resume": bool,
    "overwrite": bool,
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RunConfigError(message)  # without the usage, which has more lines than a screen


def _setting(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``. A value that is not JSON is taken as text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def make_parser() -> HfArgumentParser:
    """Make the parser of ``train``'s flags."""
    groups: Any = [ModelArguments, DataArguments, AdapterArguments, HyperFormerTrainingArguments]
    parser = _Parser(
        groups,
        prog="hyperformer-fast train",
        usage="%(prog)s [CONFIG.json|CONFIG.yaml] [--FLAG VALUE ...]",
        description="Train, evaluate and report. Flags override the file. Without arguments, trains the embedded tiny "
        "T5 on the built-in tasks.",
        epilog="Every argument of transformers.Seq2SeqTrainingArguments is a flag, and every flag a field of the file. "
        "Switches have a form --no-FLAG too. --help-all lists them all.",
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
        # The Trainer has a data_seed too, which our sampler does not read.
        conflict_handler="resolve",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="JSON or YAML file with arguments")
    parser.add_argument("-h", "--help", action="store_true", help="show the arguments that most runs need, and exit")
    parser.add_argument("--help-all", "--help_all", action="store_true", help="show all arguments, and exit")
    for action in parser._actions:
        if action.dest == "data_seed":
            action.help, action.default = DATA_SEED_HELP, DataArguments.data_seed
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True  # of those that may be unset, too, the flag alone means true
        if action.nargs == 0 and action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS  # of every switch, see _spelt_out
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
    for name, kind in _OLDER.items():
        spelt = [f"--{name}"] if "-" not in name else [f"--{name}", f"--{name.replace('-', '_')}"]
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(*spelt, help=argparse.SUPPRESS, **how)
    parser.add_argument("--hyperformer", nargs="+", type=_setting, action=_Settings, help=argparse.SUPPRESS)
    return parser


class _Settings(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, {**(before if isinstance(before, dict) else {}), **dict(values)})


def parse_flags(argv: Sequence[str], with_config: bool = True) -> tuple[str | None, dict[str, Any]]:
    """Return (path of the configuration file or None, the fields that flags set).

    Args:
        argv: the command line behind the name of the command.
        with_config: whether it may have a configuration file.

    Raises:
        RunConfigError: a flag is unknown, or has a wrong value or none.
    """
    parser = make_parser()
    argv = _config_first(parser, [_spelt_out(parser, token) for token in _without_our_debug(argv)])
    # A value that is set beforehand keeps argparse from setting the default, so that what was given can be told.
    blank = argparse.Namespace(**{action.dest: _UNSET for action in parser._actions})
    found, unknown = parser.parse_known_args(argv, blank)
    if True in (found.help, found.help_all):
        if found.help_all is not True:
            shorten(parser, {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)} - {"data_seed"})
        parser.print_help()
        raise SystemExit(0)
    for token in unknown:
        if token.startswith("-"):
            name = token.lstrip("-").partition("=")[0]
            known = [*KNOWN_FIELDS, *(option.lstrip("-") for option in parser._option_string_actions)]
            raise RunConfigError(f"unknown flag {token}{did_you_mean(name.replace('-', '_'), known)}")
    if not with_config and found.config is not None:
        unknown = [str(found.config), *unknown]
    if unknown:
        raise RunConfigError(f"unexpected argument {unknown[0]!r}: values follow a flag, and there is one file")
    fields = {name: value for name, value in vars(found).items() if value is not _UNSET}
    config = fields.pop("config", None)
    for ours in ("help", "help_all"):
        fields.pop(ours, None)
    for name, value in fields.items():
        if name == "debug":
            fields[name] = " ".join(option.value for option in value)
        if name.endswith("_steps") and isinstance(value, float) and value.is_integer():
            fields[name] = int(value)  # transformers declares steps as numbers, because a fraction means a share
    return config, fields


def _without_our_debug(argv: Sequence[str]) -> list[str]:
    """Drop ``--debug`` where it is the command's switch for tracebacks and not the Trainer's, which has a value."""
    options = {option.value for option in DebugOption}
    return [token for token, after in zip(argv, [*argv[1:], ""]) if not (token == "--debug" and after not in options)]


def _spelt_out(parser: argparse.ArgumentParser, token: str) -> str:
    """Turn ``--no-NAME`` of a switch into ``--NAME=false`` where the parser does not know the first."""
    options = parser._option_string_actions
    if token.startswith(("--no-", "--no_")) and token not in options:
        name = f"--{token[5:]}"
        if name in options and options[name].nargs == "?":
            return f"{name}=false"
        if name in ("--keep-best", "--keep_best"):
            return "--load_best_model_at_end=false"
    return token


def _config_first(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Put a configuration file at the end first, where a flag before it would take it for one of its values."""
    if len(argv) < 2 or argv[-1].startswith("-") or not argv[-1].lower().endswith(SUFFIXES):
        return argv
    flag = next((token for token in reversed(argv[:-1]) if token.startswith("--")), None)
    action = parser._option_string_actions.get(flag) if flag else None
    takes_more = action is not None and (action.nargs in ("?", "+")) and argv[0].startswith("-")
    return [argv[-1], *argv[:-1]] if takes_more else argv


def arguments_of(argv: Sequence[str] | None = None) -> RunArguments:
    """Make the arguments of a run from a command line; see :meth:`RunArguments.from_args`."""
    config, flags = parse_flags(sys.argv[1:] if argv is None else argv)
    given: dict[str, Any] = {}
    if config is not None:
        try:
            given = checked_fields(read_fields(config))
        except RunConfigError as error:
            if str(config) in str(error):
                raise
            raise RunConfigError(f"{config}: {error}") from error
    given = overridden(given, today(flags))
    resume = given.get("resume_from_checkpoint")
    check_start(given)
    if resume and str(resume).lower() != "false":
        return _resumed(given)
    embedded = given.get("model_name_or_path") in (None, EMBEDDED)
    if config is None and embedded and given.get("init_from") is None and "preset" not in given:
        given["preset"] = "demo"
    return RunArguments.from_dict(given)


def _resumed(given: dict[str, Any]) -> RunArguments:
    """What is not given keeps the values of the run that is resumed. The run refuses what must not change."""
    from .folder import read_run

    resume = given["resume_from_checkpoint"]
    if "output_dir" not in given and str(resume).lower() != "true":
        given["output_dir"] = os.path.dirname(os.path.abspath(resume))
    folder = Path(str(given.get("output_dir", HyperFormerTrainingArguments.output_dir)))
    saved = read_run(folder)[0].to_dict()
    return RunArguments.from_dict(
        overridden(today(saved, whole=True, quiet=True), {**given, "output_dir": str(folder)})
    )
