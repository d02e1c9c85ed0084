"""The doctor: what it says, to people and to programs; and that it runs at the root, beside the folder ``kernels``."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperformer_fast import __version__, backends, doctor, native

ROOT = Path(__file__).resolve().parents[1]


def test_json(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["versions"]["hyperformer_fast"] == __version__
    assert torch.__version__.startswith(report["versions"]["torch"].split("+")[0])
    assert set(report["native"]) == {"cpu", "cuda", "autograd"}
    entries = {entry["name"]: entry for entry in report["backends"]}
    assert set(entries) == {"reference", "cpu", "triton", "cuda"}
    for name, entry in entries.items():
        assert entry["available"] or entry["reason"], name
        assert set(entry.get("check", {})) == (set(entry["serves"]) if entry["available"] else set()), name
    assert entries["reference"]["available"]
    assert entries["cpu"]["available"] == report["native"]["cpu"]["loaded"]


def test_for_people(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "transformers", "cpu library", "reference", "triton", "All live checks passed."):
        assert word in text


def test_no_check(monkeypatch):
    monkeypatch.setattr(backends, "live_check", lambda name: pytest.fail("checked"))
    assert doctor.diagnose(check=False)["ok"]


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_backend_fails(monkeypatch, capsys, error):
    monkeypatch.setattr(backends, "live_check", lambda name: {"fold": error})
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "A live check FAILED." in text and "fold is off by" in text.replace("\n", " ")


def test_a_crashing_backend_fails_and_is_reported(monkeypatch, capsys):
    def crash(name):
        raise ValueError("no such thing")

    monkeypatch.setattr(backends, "live_check", crash)
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and any("ValueError: no such thing" in line for line in report["problems"])


def test_missing_kernels_are_a_problem_but_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(native, "problem", lambda: "runs without its compiled kernels (no C++ compiler [found])")
    assert doctor.main([]) == 0
    assert "no C++ compiler [found]" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["1", ""], ids=["safe path", "root on sys.path"])
def test_runs_at_the_root_beside_the_folder_kernels(path):
    """`kernels` at the root could pass for Hugging Face's package of that name, which transformers looks for."""
    environment = {**os.environ, "PYTHONSAFEPATH": path, "OMP_NUM_THREADS": "1"}
    code = (
        "from transformers import T5Config, T5ForConditionalGeneration as T5; import runpy, sys;"
        "T5(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8));"
        "sys.argv[1:] = ['doctor', '--json']; runpy.run_module('hyperformer_fast', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]


def test_it_is_a_command_and_still_answers_to_its_earlier_call(monkeypatch, capsys):
    reports = []
    for argv in (["doctor", "--json", "--no-check"], ["--json", "--no-check"]):
        monkeypatch.setattr(sys, "argv", ["hyperformer_fast", *argv])
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("hyperformer_fast", run_name="__main__")
        assert exit.value.code == 0
        said = capsys.readouterr()
        reports.append(json.loads(said.out))
        assert ("add the word doctor" in said.err) == (argv[0] != "doctor")
    assert reports[0].keys() == reports[1].keys() and reports[0]["ok"]


def test_kernels_is_a_namespace():
    """An __init__.py at the root would shadow Hugging Face's package; the link makes it importable as ours."""
    assert not (ROOT / "kernels/__init__.py").exists()
    import hyperformer_fast.kernels as kernels

    assert [Path(p).resolve() for p in kernels.__path__] == [ROOT / "kernels"]
