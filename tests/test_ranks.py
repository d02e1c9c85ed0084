"""Two gloo processes compute what one process of twice the batch does: DDP and FSDP2, by themselves and in a Trainer.

The checks are functions of support/two_ranks.py, all run by one start of torchrun.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support import two_ranks
from support.rank_cases import CASES, result, run_case
from support.runs import small_t5

import hyperformer_fast
from hyperformer_fast import HyperFormerModel
from hyperformer_fast.training import RunArguments, ranks
from hyperformer_fast.training.arguments import RunConfigError

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
CHECKS = [name for name in vars(two_ranks) if name.startswith("check_")]

pytestmark = [
    pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


GONE = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10166",
    "NCCL error: remote process exited or there was a network error",
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: Connection reset by peer",
)


@pytest.mark.parametrize("text", GONE)
def test_an_error_that_only_means_that_a_process_is_gone_says_so(monkeypatch, text):
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (0, 2))
    assert "another process of this run failed or was killed" in str(ranks.explain_lost_process(RuntimeError(text)))
    assert ranks.explain_lost_process(RuntimeError("the loss is nan")) is None
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (0, 1))
    assert ranks.explain_lost_process(RuntimeError(text)) is None


def test_processes_that_would_be_runs_of_their_own_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.expect_one_run(2)
    with pytest.raises(ValueError, match="2 processes were started, but each would train by itself"):
        ranks.expect_one_run(1)


def test_fsdp_of_version_1_is_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setenv("FSDP_VERSION", "1")
    plain = types.SimpleNamespace(fsdp=[], fsdp_config={})
    ranks.expect_fsdp2(plain)
    for fsdp_config in ({"version": 1}, {}):
        with pytest.raises(ValueError, match="fsdp_version is 1, but .* needs version 2"):
            ranks.expect_fsdp2(types.SimpleNamespace(fsdp=True, fsdp_config=fsdp_config))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # by accelerate launch --use_fsdp
    with pytest.raises(ValueError, match="accelerate launch --fsdp_version 2"):
        ranks.expect_fsdp2(plain)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_is_asked_for_in_the_words_of_transformers(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text('{"train_batch_size": "auto"}')
    with pytest.raises(RunConfigError, match="the Trainer refuses these arguments here: .*deepspeed"):
        RunArguments.from_dict({"output_dir": str(tmp_path), "deepspeed": str(config)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder):
    """What one process makes of each case."""
    return {name: result(run_case(folder / "one" / name, name, 1)) for name in CASES}


@pytest.fixture(scope="module")
def ended(folder, one):
    """How each check ended on each process: an empty text, or the traceback."""
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split(), two_ranks.__file__]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(folder)], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"checks{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(ended, check):
    for rank, texts in enumerate(ended):
        assert texts.get(check, "not run, because an earlier check failed") == "", f"process {rank}"


#: How closely one process and two agree, where it is not to the last digits of float32.
TOLERANCES = {
    # Adam divides the rounding of tiny gradients by their size; a step is 1e-3.
    "fsdp": {"rtol": 1e-3, "atol": 2e-5},
    # FSDP2 also computes the generated weights in bfloat16.
    "bf16": {"rtol": 1e-2, "atol": 1e-3},
    "fsdp bf16": {"rtol": 5e-2, "atol": 1e-2},
}


def expect_same(found, wanted, case):
    if "bf16" not in case:
        assert found["texts"] == wanted["texts"]
    tolerance = TOLERANCES.get(case, {"rtol": 1e-5, "atol": 1e-6})
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=max(1e-4, tolerance["rtol"]), atol=1e-4)
    torch.testing.assert_close(found["figures"], wanted["figures"], rtol=1e-2, atol=1e-2)
    assert wanted["figures"]  # at the end of the training, if not before
    torch.testing.assert_close(found["weights"], wanted["weights"], **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_our_trainer_in_two_processes_is_that_of_one_with_twice_the_batch(folder, one, ended, case):
    for rank in (0, 1):
        expect_same(torch.load(folder / f"{case} {rank}.pt"), one[case], case)


def test_a_run_goes_from_one_process_to_fsdp2(folder, one, ended):
    for rank in (0, 1):
        expect_same(torch.load(folder / f"resumed {rank}.pt"), one["fsdp"], "fsdp")


@pytest.mark.filterwarnings("ignore:.*was saved by 2 processes")
def test_a_run_goes_from_fsdp2_to_one_process(folder, one, ended):
    checkpoint = folder / "two" / "fsdp" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in (folder / "one" / "fsdp" / "checkpoint-2").iterdir()} - names == {"rng_state.pth"}
    resumed = run_case(folder / "back", "fsdp", 1, resume=str(checkpoint))
    expect_same(result(resumed), one["fsdp"], "fsdp")
    loaded = HyperFormerModel.from_pretrained(checkpoint.with_name("checkpoint-4"), t5=small_t5())
    weights = {name: p.detach() for name, p in loaded.named_parameters() if p.requires_grad}
    torch.testing.assert_close(weights, torch.load(folder / "fsdp 0.pt")["weights"], rtol=0, atol=0)
