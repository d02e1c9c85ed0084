"""The command's flags: names of tasks, those of ``fewshot``, the help, and what is said of a wrong one."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hyperformer_fast
from hyperformer_fast.cli import main
from hyperformer_fast.training import arguments as arguments_module
from hyperformer_fast.training import fewshot
from hyperformer_fast.training.arguments import KNOWN_FIELDS
from hyperformer_fast.training.parser import parse_flags

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--leraning_rate", "1"], "unknown flag --leraning_rate; did you mean 'learning_rate'"),
        (["--max-step=1"], "unknown flag --max-step=1; did you mean 'max_steps'"),
        (["--max_steps", "x"], "argument --max_steps/--max-steps: invalid int value: 'x'"),
        (["--learning_rate"], "argument --learning_rate/--learning-rate: expected one argument"),
        (["--bf16", "perhaps"], "argument --bf16: Truthy value expected: got perhaps"),
        (["--lr_scheduler_type", "step"], "argument --lr_scheduler_type/--lr-scheduler-type: invalid choice: 'step'"),
        (["--tasks"], "argument --tasks: expected at least one argument"),
        (["--tasks", "a,,b"], "argument --tasks: an empty name in 'a,,b'"),
        (["a.json", "b.json"], "unexpected argument 'b.json'"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["missing.json"], "cannot read missing.json"),
    ],
)
def test_a_wrong_flag_is_named(capsys, argv, message):
    assert main(["train", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and "usage:" not in err and "Traceback" not in err


def test_names_come_one_by_one_or_with_commas():
    for given in (["--tasks", "a", "b", "c"], ["--tasks", "a,b", "c"], ["--tasks", "a", "--tasks", "b,c"]):
        assert parse_flags(given) == (None, {"tasks": ["a", "b", "c"]})
    assert parse_flags(["x.json", "--tasks", "a", "b", "--max-steps", "3"]) == (
        "x.json",
        {"tasks": ["a", "b"], "max_steps": 3},
    )


def test_fewshot_has_flags_of_its_own_and_those_of_train(monkeypatch, capsys):
    called, real = [], fewshot.fewshot_run
    monkeypatch.setattr(fewshot, "fewshot_run", lambda *given, **named: called.append((given, named)))
    flags = "fewshot a b --task scitail --samples 4 8 --train embedding --max-steps 9 --steps-are-not-this"
    assert main(flags.split()) == 2
    assert "unknown flag --steps-are-not-this" in capsys.readouterr().err and not called
    flags = "fewshot a b --task scitail --samples 4 8 --train embedding --max-steps 9 --learning_rate 1e-3"
    assert main(flags.split()) == 0
    own = {"samples": [4, 8], "seeds": 5, "init_from": "auto", "train": "embedding", "data_dir": None}
    own |= {"task_file": None, "output_dir": "fewshot-output", "model": None}
    assert called == [((["a", "b"], "scitail"), {**own, "max_steps": 9, "learning_rate": 1e-3})]
    inspect.signature(real).bind(*called[0][0], **called[0][1])
    with pytest.raises(SystemExit):
        main("evaluate a --max_steps 1".split())


def test_help_shows_what_most_need_and_help_all_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit:
            main(["train", flag])
        assert not exit.value.code
        texts[flag] = capsys.readouterr().out
    shown = {
        flag: {line.split()[0] for line in text.splitlines() if line.startswith("  -")} for flag, text in texts.items()
    }
    assert len(shown["--help"]) < 100 and shown["--help"] < shown["--help-all"]
    assert {f"--{name}" for name in KNOWN_FIELDS} <= shown["--help-all"]
    ours = {f.name for kind in list(arguments_module._GROUPS.values())[:3] for f in dataclasses.fields(kind)}
    assert {f"--{name}" for name in ours | {"temperature", "max_steps", "fsdp"}} <= shown["--help"]
    assert argparse.SUPPRESS not in texts["--help-all"] and "(default: 0.0003)" in texts["--help"]


def test_the_module_is_the_command_and_help_is_instant():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*argv):
        return subprocess.run(
            [sys.executable, *argv], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert run("-m", "hyperformer_fast", "--version") == f"hyperformer-fast {hyperformer_fast.__version__}\n"
    script = "import sys; from hyperformer_fast.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not heavy, heavy"
    out = run("-c", script)
    for command in ("train", "evaluate", "predict", "fewshot", "params", "tune", "doctor"):
        assert command in out
