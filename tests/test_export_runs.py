"""``hyperformer-fast export``, and greedy decoding of what it wrote in a process without this library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import data_folder, small_t5
from transformers import AutoTokenizer, ByT5Tokenizer

import hyperformer_fast
from hyperformer_fast import HyperFormerModel, extras
from hyperformer_fast.cli import main
from hyperformer_fast.export.formats import FORMATS

EXAMPLE = Path(hyperformer_fast.__file__).resolve().parents[1] / "examples" / "export_decode.py"
TASKS, TEXTS = ["stsb", "cola", "stsb"], ["one text", "a second, longer text", "three"]

#: Runs the example where every import of the library fails.
WITHOUT_LIBRARY = """
import runpy, sys
sys.modules["hyperformer_fast"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    t5 = small_t5()
    with torch.no_grad():
        for name, parameter in t5.named_parameters():
            if parameter.dim() == 2:
                # As it is drawn it repeats the token before, whatever it reads.
                parameter.mul_(0.3 if "shared" in name else 2)
    t5.save_pretrained(root / "t5")
    ByT5Tokenizer().save_pretrained(root / "t5")
    train = ["train", "--model_name_or_path", str(root / "t5"), "--max_steps", "1"]
    train += ["--data_dir", data_folder(root / "data"), "--output_dir", str(root / "run"), "--learning_rate", "1e-3"]
    train += ["--reduction_factor", "4", "--eval_strategy", "no", "--save_strategy", "no", "--recipe", "authors"]
    assert main(train) == 0
    return root / "run"


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_greedy_decoding_without_the_library(format, run, tmp_path, capsys):
    for package in FORMATS[format].packages:
        pytest.importorskip(package, reason=f"needs {package}")
    folder = tmp_path / "exported"
    assert main(["export", str(run), "--format", format, "--output", str(folder)]) == 0
    assert "2 tasks in" in capsys.readouterr().out
    description = json.loads((folder / "export.json").read_text())
    longest = {name: said["max_new_tokens"] for name, said in description["generation"].items()}
    assert longest["stsb"] == 4  # as `predict` decodes it: three characters and the end

    given = [str(EXAMPLE), str(folder), "--task", *TASKS, "--text", *TEXTS]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY, *given],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = HyperFormerModel.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch, task=TASKS, max_new_tokens=max(longest.values()), do_sample=False)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert done.stdout == "".join(f"{task}: {text}\n" for task, text in zip(TASKS, expected))


def test_what_is_wrong_is_said(run, tmp_path, capsys, monkeypatch):
    given = ["export", str(run), "--output", str(tmp_path / "x"), "--format"]
    assert main([*given, "torch", "--tasks", "rte"]) != 0
    assert "unknown task 'rte'; this run has cola, stsb" in capsys.readouterr().err
    monkeypatch.setattr(extras, "_importable", lambda module: module != "onnxscript")
    assert main([*given, "onnx"]) == 1
    said = capsys.readouterr().err
    assert "export to onnx needs onnxscript" in said and "pip install 'hyperformer-fast[export]'" in said
    assert not list(tmp_path.iterdir())
