"""The command under torchrun: one run of two processes, in one folder, which is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import data_folder, saved_t5

import hyperformer_fast
from hyperformer_fast.cli import main
from hyperformer_fast.training.folder import checkpoints

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
WEIGHTS = "hyperformer.safetensors"

pytestmark = [
    pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m hyperformer_fast.cli".split()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    train = ["train", "--model", saved_t5(inputs / "t5"), "--data-dir", data_folder(inputs / "data")]
    train += [
        "--steps",
        "4",
        "--save-steps",
        "2",
        "--eval-steps",
        "2",
        "--reduction-factor",
        "4",
        "--logging-steps",
        "1",
    ]
    return [*train, "--hyperformer", "task_embedding_dim=4", "projected_task_embedding_dim=4", "task_hidden_dim=5"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, command):
    """(the folder of a run of two processes, what it printed)."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(*command, "--batch-size", "2", "--output-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_are_one_run(two, command, tmp_path):
    folder, out = two
    assert out.count("majority class") == 1 and out.count("trained in") == 1 and out.count("step 2:") == 1
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    for checkpoint in checkpoints(folder):
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert main([*command, "--batch-size", "4", "--output-dir", str(tmp_path / "one")]) == 0
    results = [json.loads((each / "metrics.json").read_text())["tasks"] for each in (folder, tmp_path / "one")]
    assert results[0] == results[1]
    histories = [json.loads((each / "history.json").read_text()) for each in (folder, tmp_path / "one")]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert len(losses[0]) == 4
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    ours, theirs = load_file(folder / WEIGHTS), load_file(tmp_path / "one" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_two_processes_resume_to_the_same_bits(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / WEIGHTS).unlink()
    done = torchrun("train", "--resume", "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from checkpoint-2") == 1
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (two[0] / WEIGHTS).read_bytes()


def test_one_process_does_not_resume_the_run_of_two(two, tmp_path, capsys):
    shutil.copytree(two[0], tmp_path / "run")
    assert main(["train", "--resume", "--output-dir", str(tmp_path / "run")]) == 1
    assert "Resume with as many processes as before" in capsys.readouterr().err


def test_all_processes_learn_why_the_first_refuses(two, command):
    done = torchrun(*command, "--batch-size", "2", "--output-dir", str(two[0]))
    assert done.returncode == 1
    assert "hyperformer-fast: error: " in done.stderr and "hyperformer-fast: error (rank 1): " in done.stderr
    assert done.stderr.count("holds another run") == 2
