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
from support import failing_rank
from support.runs import SMALL, data_folder, expect_same_results, saved_t5

import hyperformer_fast
from hyperformer_fast.cli import main
from hyperformer_fast.training.folder import checkpoints

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
WEIGHTS = "model.safetensors"

pytestmark = [
    pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore:.*was saved by 2 processes"),
]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    fields = {"model_name_or_path": saved_t5(inputs / "t5"), "data_dir": data_folder(inputs / "data"), **SMALL}
    fields |= {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "logging_steps": 1, "warmup_steps": 0}
    fields |= {"mixed_batches": True, "label_smoothing_factor": 0.1, "learning_rate": 0.01}
    return ["train", *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]


def of_batch(command, size: int, folder: Path) -> list[str]:
    return [*command, "--per_device_train_batch_size", str(size), "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def one(tmp_path_factory, command):
    """The folder of a run of one process with twice the batch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert main(of_batch(command, 4, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, command):
    """(the folder of a run of two processes, what it printed)."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = torchrun("-m", "hyperformer_fast", *of_batch(command, 2, folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def expect_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"hyperformer_description"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_two_processes_are_one_run(one, two):
    folder, out = two
    assert out.count("majority class") == 1 and out.count("trained in") == 1 and out.count("step 2:") == 1
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    for checkpoint in checkpoints(folder):
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    results = [json.loads((each / "metrics.json").read_text())["tasks"] for each in (folder, one)]
    # the stock loop's loss is of the first process's rows alone
    assert not any("loss" in task for task in results[0].values()) and all("loss" in t for t in results[1].values())
    expect_same_results(*results)
    histories = [json.loads((each / "history.json").read_text()) for each in (folder, one)]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert len(losses[0]) == 4
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-4)
    expect_same_weights(folder, one)


def test_two_processes_share_the_rows_of_an_evaluation(two):
    done = torchrun("-m", "hyperformer_fast", "evaluate", str(two[0]), "--split", "validation")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("majority class") == 1
    found, before = (json.loads((two[0] / name).read_text()) for name in ("evaluation.json", "metrics.json"))
    expect_same_results(found["tasks"], before["tasks"])


def unfinished(run: Path, folder: Path) -> Path:
    """A copy of a run that ended after its first checkpoint."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / WEIGHTS).unlink()
    return folder


def test_one_process_goes_on_with_the_run_of_two(one, two, command, tmp_path, capsys):
    folder = unfinished(two[0], tmp_path / "run")
    resume = "--resume_from_checkpoint", "true"
    assert main([*of_batch(command, 2, folder), *resume]) == 1
    said = capsys.readouterr().err
    assert "took 4 examples and would now take 2" in said and "set per_device_train_batch_size to 4" in said
    assert main([*of_batch(command, 4, folder), *resume]) == 0
    expect_same_weights(folder, one)


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(two, command, tmp_path):
    from hyperformer_fast.training import RunArguments
    from hyperformer_fast.training.folder import RunError, check_same, read_run

    run = read_run(two[0])[0]
    assert isinstance(run, RunArguments)
    with pytest.raises(RunError, match="4 examples do not divide by 3 processes; start a number that divides it"):
        check_same(two[0], run, {}, 3)


def test_a_killed_process_ends_the_run_which_is_resumed(one, command, tmp_path):
    folder = tmp_path / "run"
    done = torchrun(failing_rank.__file__, "kill", *of_batch(command, 2, folder))
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"] and not (folder / WEIGHTS).exists()
    assert main([*of_batch(command, 4, folder), "--resume_from_checkpoint", "true"]) == 0
    expect_same_weights(folder, one)


def test_a_process_that_fails_does_not_leave_the_other_waiting(command, tmp_path):
    done = torchrun(failing_rank.__file__, "raise", *of_batch(command, 2, tmp_path / "run"))
    assert done.returncode == 1
    assert "hyperformer-fast: error (rank 1): " in done.stderr and "bad row" in done.stderr
