"""The Trainer: the same steps however they are cut, stopped or shared; nothing broken is ever saved."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import losses, small_t5, small_trainer, trained
from transformers import TrainerCallback

import hyperformer_fast
from hyperformer_fast import HyperFormerModel
from hyperformer_fast.checkpoint import CheckpointError
from hyperformer_fast.training import TrainingDiverged, task_evaluation
from hyperformer_fast.training.folder import checkpoints

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]


def run_script(name, *arguments, **environment):
    """A helper of tests/support in a process of its own, with one thread."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"} | environment
    script = ROOT / "tests" / "support" / name
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], env=env, stdout=subprocess.PIPE, text=True)


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_training_changes_what_it_should_and_nothing_else(tmp_path):
    trainer = small_trainer(tmp_path, dropout=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained(trainer.model))
    assert len(losses(trainer)) == 6 and losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_accumulated_micro_batches_are_one_batch(tmp_path, label_smoothing):
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    results = []
    for accumulation, batch_size in ((4, 2), (1, 8)):
        cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = small_trainer(tmp_path, max_steps=3, label_smoothing_factor=label_smoothing, **cut)
        start = trained(trainer.model)
        trainer.train()
        results.append((trained(trainer.model), losses(trainer)))
    assert_same(results[0][0], results[1][0], **tolerance)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-3)
    assert any((results[0][0][name] - start[name]).abs().max() > 1e-3 for name in start), "nothing was trained"


def test_resuming_is_not_having_stopped(tmp_path):
    whole = small_trainer(tmp_path / "whole", dropout=0.1, max_steps=7, gradient_accumulation_steps=2)
    whole.train()
    first = small_trainer(tmp_path / "cut", dropout=0.1, max_steps=7, gradient_accumulation_steps=2, save_steps=3)
    first.add_callback(StopAt(4))
    first.train()
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-3"]
    again = small_trainer(tmp_path / "cut", dropout=0.1, max_steps=7, gradient_accumulation_steps=2, save_steps=3)
    torch.manual_seed(77)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert_same(trained(again.model), trained(whole.model), rtol=0, atol=0)
    rates = [[entry["learning_rate"] for entry in t.state.log_history if "loss" in entry] for t in (again, whole)]
    assert rates[0] == rates[1]


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    options = {"max_steps": 3, "save_steps": 3, "eval_steps": 3, "mixed_batches": True, "loss_reduction": "sum"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        run_script("rank.py", tmp_path, json.dumps(options), RANK=str(r), LOCAL_RANK=str(r), **group) for r in range(2)
    ]
    one = small_trainer(tmp_path / "one", per_device_train_batch_size=4, **options)
    start = trained(one.model)
    one.train()
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for rank in range(2):
        assert_same(load_file(tmp_path / f"rank{rank}.safetensors"), trained(one.model), rtol=1e-4, atol=1e-6)
    assert any((start[name] - p).abs().max() > 1e-3 for name, p in trained(one.model).items()), "nothing was trained"
    saved = tmp_path / "two" / "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {path.name for path in saved.iterdir()}
    scores = [[e["eval_average_metrics"] for e in history if "eval_average_metrics" in e] for history in (
        one.state.log_history, json.loads((saved / "trainer_state.json").read_text())["log_history"]
    )]  # fmt: skip
    assert scores[0] == scores[1] and len(scores[0]) == 1


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    """Ten kills of a run that saves at every step; what is left is what an undisturbed run had at that very step."""
    process = run_script("killed.py", tmp_path / "run", tmp_path / "left")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    reached = [int(step) for step in out.split()]
    assert len(reached) == 10 and reached == sorted(reached) and reached[-1] >= 10
    reference = small_trainer(tmp_path / "reference", dropout=0.1, max_steps=1000)
    wanted = {step: None for step in reached}
    reference.add_callback(Snapshot(wanted, stop=reached[-1]))
    reference.train()
    for step in wanted:
        left = load_file(tmp_path / "left" / f"{step}.safetensors")
        assert_same(left, wanted[step], rtol=1e-5, atol=1e-7)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Snapshot(TrainerCallback):
    def __init__(self, wanted, stop):
        self.wanted, self.stop = wanted, stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.wanted:
            self.wanted[state.global_step] = trained(model)
        control.should_training_stop = state.global_step == self.stop


class Spoil(TrainerCallback):
    """Make a weight infinite at the end of a step, as a step with an infinite gradient does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(p for p in model.hypernetworks.parameters()).data.fill_(float("inf"))


@pytest.mark.parametrize(
    ("save_steps", "message"), [(2, "the loss is nan at step 4, on '"), (1, "weights are not finite at step 3")]
)
def test_what_is_not_finite_is_never_saved(tmp_path, save_steps, message):
    trainer = small_trainer(tmp_path, save_steps=save_steps)
    trainer.add_callback(Spoil(3))
    with pytest.raises(TrainingDiverged, match=message + ".*Lower learning_rate .now 0.01."):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)][-1] == "checkpoint-2"
    good = HyperFormerModel.from_pretrained(checkpoints(tmp_path)[-1], t5=small_t5())
    assert all(p.isfinite().all() for p in good.parameters())


def test_a_device_is_asked_for_finiteness_before_logging(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer._not_finite = torch.tensor(True)
    with pytest.raises(TrainingDiverged, match="the loss was not finite at or before step 0"):
        trainer.log({"loss": 1.0})


def test_checkpoints_hold_what_resuming_needs_and_nothing_pickled_freely(tmp_path):
    trainer = small_trainer(tmp_path, save_steps=2)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for path in checkpoints(tmp_path):
        assert not (path / "training_args.bin").exists()
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(path / name, weights_only=True)
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_broken_checkpoint_is_named(tmp_path, file):
    small_trainer(tmp_path, save_steps=3).train()
    broken = tmp_path / "checkpoint-3" / file
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        small_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    small_trainer(tmp_path, save_steps=3).train()
    other = small_trainer(tmp_path, task_hidden_dim=7)
    before = trained(other.model)
    with pytest.raises(CheckpointError, match="task_hidden_dim is 5 in the checkpoint, 7 in this model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(before, trained(other.model), rtol=0, atol=0)


def scores_of(monkeypatch, values):
    """Let the evaluations of the single task cola find these scores in turn."""
    scores = iter(values)
    monkeypatch.setattr(task_evaluation, "score", lambda *_: {"matthews": (value := next(scores)), "score": value})


def evaluations(trainer):
    return [entry["eval_average_metrics"] for entry in trainer.state.log_history if "eval_average_metrics" in entry]


def test_the_best_evaluation_is_kept(tmp_path, monkeypatch):
    scores_of(monkeypatch, [10.0, 30.0, 20.0])
    trainer = small_trainer(tmp_path, tasks=("cola",), eval_steps=2, save_steps=2, load_best_model_at_end=True)
    assert trainer.args.metric_for_best_model == "average_metrics" and trainer.args.greater_is_better
    wanted = {4: None}
    trainer.add_callback(Snapshot(wanted, stop=6))
    trainer.train()
    assert_same(trained(trainer.model), wanted[4], rtol=0, atol=0)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert evaluations(trainer) == [10.0, 30.0, 20.0]
