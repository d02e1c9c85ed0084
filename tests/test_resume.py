"""Resuming: the same run bit for bit, or an error that names the file; never another run, never a broken process."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from support.runs import SMALL, data_folder, losses, same_weights, saved_t5, small_run, small_trainer, trained
from transformers import EarlyStoppingCallback

from hyperformer_fast.checkpoint import CheckpointError
from hyperformer_fast.cli import main
from hyperformer_fast.training import HyperFormerTrainer, checkpointing, task_evaluation, train_run
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training.folder import checkpoints
from hyperformer_fast.training.resume import read_saved

STEPS, KEPT = 4, 2


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    """Plotting takes most of such a small run's time."""
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: None)


def trainer_of(folder, **changes):
    return small_trainer(folder, dropout=0.1, max_steps=STEPS, **{"save_steps": KEPT, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, with a checkpoint in its middle."""
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.fixture
def checkpoint(whole, tmp_path):
    name = f"checkpoint-{KEPT}"
    shutil.copytree(f"{whole.args.output_dir}/{name}", tmp_path / name)
    return tmp_path / name


def test_a_run_with_dropout_resumes_to_the_same_bits(whole, checkpoint):
    again = trainer_of(checkpoint.parent)
    # another process would not be where this one stopped
    torch.manual_seed(77)
    np.random.seed(77)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)
    expected = trained(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in trained(again.model).items())


def moments(saved):
    return saved["state"][1]


def shrink(saved):
    moments(saved)["exp_avg"] = moments(saved)["exp_avg"].flatten()[:1].clone()


def expand(saved):
    moments(saved)["exp_avg_sq"] = torch.zeros(()).expand_as(moments(saved)["exp_avg_sq"])


def transpose(saved):
    state = next(s for s in saved["state"].values() if s["exp_avg"].dim() == 2 and min(s["exp_avg"].shape) > 1)
    state["exp_avg"] = state["exp_avg"].mT.contiguous().mT


def share(saved):
    moments(saved)["exp_avg"] = moments(saved)["exp_avg_sq"]


def spoil(name, value):
    def tamper(saved):
        moments(saved)[name].view(-1)[0] = value

    return tamper


def put(name, value):
    def tamper(saved):
        moments(saved)[name] = value

    return tamper


def in_group(name, value):
    def tamper(saved):
        saved["param_groups"][0][name] = value

    return tamper


def cast(dtype):
    def tamper(saved):
        moments(saved)["exp_avg"] = moments(saved)["exp_avg"].to(dtype)

    return tamper


TAMPERED = {
    "a moment is too small": (shrink, "parameter 1: exp_avg must be torch.float32 .* with strides .*, got"),
    "a moment is one number expanded": (expand, "exp_avg_sq must be .*, got .* with strides .0"),
    "a moment lies the other way": (transpose, "exp_avg must be .* with strides"),
    "two moments share memory": (share, "shares memory with another"),
    "a moment of half precision": (cast(torch.float16), "exp_avg must be torch.float32 .*, got torch.float16"),
    "a moment of double precision": (cast(torch.float64), "exp_avg must be torch.float32 .*, got torch.float64"),
    "a sparse moment": (lambda saved: put("exp_avg", moments(saved)["exp_avg"].to_sparse())(saved), "sparse"),
    "a moment without memory": (
        lambda saved: put("exp_avg", moments(saved)["exp_avg"].to("meta"))(saved),
        "exp_avg must be",
    ),
    "a moment that is no tensor": (put("exp_avg", 1.0), "exp_avg must be .*, got float"),
    "an infinite moment": (spoil("exp_avg", float("inf")), "exp_avg is not finite"),
    "a NaN": (spoil("exp_avg_sq", float("nan")), "exp_avg_sq is not finite"),
    "a negative square": (spoil("exp_avg_sq", -1.0), "exp_avg_sq is a mean of squares"),
    "two steps": (put("step", torch.tensor([1.0, 1.0])), "step must be one finite number >= 0"),
    "a negative step": (put("step", torch.tensor(-1.0)), "step must be one finite number >= 0"),
    "a step that is NaN": (put("step", torch.tensor(float("nan"))), "step must be one finite number >= 0"),
    "a step in words": (put("step", "two"), "step must be one finite number >= 0, got 'two'"),
    "no step": (lambda saved: moments(saved).pop("step"), "parameter 1 must have exp_avg, exp_avg_sq, step"),
    "one thing more": (put("momentum", 1.0), "parameter 1 must have exp_avg, exp_avg_sq, step"),
    "a parameter is left out": (lambda saved: saved["state"].pop(1), "must hold a state for each of"),
    "one parameter more": (lambda saved: saved["state"].update({999: {}}), "differs in 999"),
    "not a dictionary": (lambda saved: saved.update(state=[]), "does not hold an optimizer's state"),
    "another flag": (in_group("amsgrad", True), "group 0 has amsgrad True, this optimizer False"),
    "another kind of flag": (in_group("capturable", 1), "group 0 has capturable 1, this optimizer False"),
    "other betas": (in_group("betas", (0.0, 2.0)), "group 0 has betas"),
    "a flag is absent": (lambda saved: saved["param_groups"][0].pop("eps"), "group 0 lacks eps"),
    "an unknown flag": (in_group("fast", True), "unknown setting 'fast'"),
    "a rate of its own": (in_group("lr", 0.5), "the learning rate at step 2 is"),
    "a rate that is none": (in_group("lr", float("nan")), "has the learning rate nan"),
    "parameters in another order": (in_group("params", [1, 0]), "group 0 has params"),
    "a group less": (lambda saved: saved["param_groups"].pop(), "parameter groups, this optimizer 2"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_optimizer_is_refused(checkpoint, what):
    tamper, message = TAMPERED[what]
    path = checkpoint / "optimizer.pt"
    saved = read_saved(path)
    tamper(saved)
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=f"optimizer.pt.*{message}"):
        trainer_of(checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))


def edit_json(change):
    def tamper(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return tamper


def edit_saved(change):
    def tamper(path):
        content = read_saved(path)
        change(content)
        torch.save(content, path)

    return tamper


def numpy_state(state):
    state["numpy"] = (*state["numpy"][:2], 10**9, *state["numpy"][3:])


BROKEN = {
    "another step": ("trainer_state.json", edit_json(lambda s: s.update(global_step=3)), "global_step is 3, but"),
    "a step that is none": ("trainer_state.json", edit_json(lambda s: s.update(global_step="2")), "global_step"),
    "no step": ("trainer_state.json", edit_json(lambda s: s.pop("global_step")), "must be a whole number, got None"),
    "an unknown field": ("trainer_state.json", edit_json(lambda s: s.update(steps=3)), "unknown field 'steps'"),
    "a field of another type": ("trainer_state.json", edit_json(lambda s: s.update(total_flos="x")), "total_flos"),
    "another history": ("trainer_state.json", edit_json(lambda s: s.update(log_history=[1])), "log_history"),
    "no JSON": ("trainer_state.json", lambda path: path.write_text("{"), "cannot be read"),
    "JSON without end": ("trainer_state.json", lambda path: path.write_text("[" * 10**5), "cannot be read"),
    "a list": ("trainer_state.json", lambda path: path.write_text("[]"), "must be a JSON object"),
    "a schedule elsewhere": ("scheduler.pt", edit_saved(lambda s: s.update(last_epoch=1)), "last_epoch must be 2"),
    "another rate": ("scheduler.pt", edit_saved(lambda s: s.update(_last_lr=[0.5, 0.5])), "learning rate at step 2"),
    "another peak": ("scheduler.pt", edit_saved(lambda s: s.update(base_lrs=[1.0, 1.0])), "base_lrs was"),
    "a method of its own": ("scheduler.pt", edit_saved(lambda s: s.update(step=1)), "unknown field 'step'"),
    "no schedule": ("scheduler.pt", lambda path: torch.save([1], path), "does not hold a scheduler's state"),
    "half a schedule": ("scheduler.pt", lambda path: path.write_bytes(path.read_bytes()[:99]), "cannot be read"),
    "half an optimizer": ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:-99]), "cannot be read"),
    "no optimizer": ("optimizer.pt", lambda path: path.write_bytes(b""), "cannot be read"),
    "no random numbers": (
        "rng_state.pth",
        lambda path: path.unlink(),
        "without saved RNG states .* become a different run",
    ),
    "half of them": ("rng_state.pth", lambda path: path.write_bytes(path.read_bytes()[:-99]), "cannot be read"),
    "NumPy's beyond the end": ("rng_state.pth", edit_saved(numpy_state), "the RNG state of NumPy"),
    "Python's are none": ("rng_state.pth", edit_saved(lambda s: s.update(python=(3, (1,), None))), "cannot be set"),
    "torch's are none": ("rng_state.pth", edit_saved(lambda s: s.update(cpu=s["cpu"][:9])), "cannot be set"),
    "torch's are absent": ("rng_state.pth", edit_saved(lambda s: s.pop("cpu")), "does not hold the RNG states"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named(checkpoint, what):
    name, spoil_it, message = BROKEN[what]
    spoil_it(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"checkpoint-2.*{message}"):
        trainer_of(checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))


def test_other_settings_of_the_optimizer_are_refused(checkpoint):
    for changes, message in (
        ({"weight_decay": 0.1}, "has weight_decay 0.0, this optimizer 0.1"),
        ({"learning_rate": 0.5}, "has initial_lr 0.01, this optimizer 0.5"),
        ({"lr_scheduler_type": "cosine"}, "the learning rate at step 2 is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainer_of(checkpoint.parent, warmup_steps=1, **changes).train(resume_from_checkpoint=str(checkpoint))


def test_the_command_resumes_with_dropout_or_says_what_is_missing(tmp_path, capsys):
    run, resume = tmp_path / "run", ["train", "--resume_from_checkpoint", "true"]
    train = ["train", "--model_name_or_path", saved_t5(tmp_path / "t5", dropout=0.1)]
    train += ["--data_dir", data_folder(tmp_path / "data"), "--save_steps", "2", "--eval_steps", "3"]
    train += [f"--{name}={value}" for name, value in SMALL.items()]
    train += ["--max_steps", "4", "--per_device_train_batch_size", "4", "--output_dir", str(run)]
    assert main(train) == 0
    shutil.copytree(run, tmp_path / "whole")
    (run / "model.safetensors").unlink()
    (run / "checkpoint-4" / "rng_state.pth").unlink()
    capsys.readouterr()
    assert main([*resume, "--output_dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert "skipped an incomplete checkpoint: checkpoint-4 lacks rng_state*.pth" in out
    assert "resuming from checkpoint-2" in out
    assert same_weights(run, tmp_path / "whole")
    edit_json(lambda state: state.update(global_step=1))(run / "checkpoint-4" / "trainer_state.json")
    assert main([*resume, "--output_dir", str(run)]) == 1
    err = capsys.readouterr().err
    assert "checkpoint-4/trainer_state.json: global_step is 1, but the checkpoint was saved at step 4" in err
    assert "unexpected" not in err and len(checkpoints(run)) == 2


class Stopped(BaseException):
    """What no handler of the library stops, as a kill."""


def at_call(monkeypatch, owner, name, number):
    """Stop a run at the given call of a function, counted from 1."""
    plain, calls = getattr(owner, name), []

    def act(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            raise Stopped
        return plain(*arguments, **named)

    monkeypatch.setattr(owner, name, act)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {"model_name_or_path": saved_t5(folder / "t5", dropout=0.1), "data_dir": data_folder(folder / "data")}


def whole_run(inputs, folder, **changes):
    fields = {"max_steps": 7, "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True, **inputs, **changes}
    return train_run(small_run(folder, **fields), Console(quiet=True))


#: Runs that are interrupted. An epoch of the second ends after three steps, between two checkpoints.
RUNS = {
    "steps": {"gradient_accumulation_steps": 4},
    "mixed epochs": {
        "gradient_accumulation_steps": 4, "mixed_batches": True, "num_train_epochs": 2.0, "max_steps": -1
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """A function that returns (the folder, the results) of one of the runs."""

    @functools.cache
    def finished(name):
        folder = tmp_path_factory.mktemp("undisturbed")
        return folder, whole_run(inputs, folder, **RUNS[name])

    return finished


PLACES = {
    "before the first checkpoint": (HyperFormerTrainer, "training_step", 5),
    "between two checkpoints": (HyperFormerTrainer, "training_step", 22),
    "in an evaluation": (HyperFormerTrainer, "evaluate_task", 4),
    "while a checkpoint is written": (checkpointing, "write_directory", 2),
    "in the final evaluation": (HyperFormerTrainer, "evaluate_task", 8),
    "at the very end": (run_module, "_report", 1),
}


@pytest.mark.parametrize(
    ("name", "place"), [("steps", place) for place in PLACES] + [("mixed epochs", "between two checkpoints")]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(undisturbed, inputs, tmp_path, monkeypatch, name, place):
    changes, (folder, results) = RUNS[name], undisturbed(name)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_call(patch, *PLACES[place])
        whole_run(inputs, tmp_path, **changes)
    again = whole_run(inputs, tmp_path, resume_from_checkpoint="true", **changes)
    assert {**again, "train_seconds": 0} == {**results, "train_seconds": 0}
    histories = [json.loads((each / "history.json").read_text()) for each in (folder, tmp_path)]
    for key in ("loss", "eval_average_metrics", "eval_cola_loss", "learning_rate"):
        one, other = ([(entry["step"], entry[key]) for entry in history if key in entry] for history in histories)
        assert one == other and one
    assert same_weights(folder, tmp_path)


def test_a_run_grows_in_steps_and_in_epochs(tmp_path):
    """Under a constant rate a run that grows is the longer run; under another the rate follows the longer schedule."""
    for name, short, longer in (("steps", {"max_steps": 4}, {"max_steps": 7}), (
        "epochs", {"max_steps": -1, "num_train_epochs": 1.0}, {"max_steps": -1, "num_train_epochs": 2.0}
    )):  # fmt: skip
        constant = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 3, "save_steps": 2, "dropout": 0.1}
        small_trainer(tmp_path / name, **constant, **short).train()
        grown = small_trainer(tmp_path / name, **constant, **longer)
        grown.train(resume_from_checkpoint=True)
        long = small_trainer(tmp_path / f"long {name}", **constant, **longer)
        long.train()
        assert losses(grown) == losses(long) and len(losses(grown)) == (7 if name == "steps" else 8)
    small_trainer(tmp_path / "linear", max_steps=4, save_steps=2).train()
    grown = small_trainer(tmp_path / "linear", max_steps=12, save_steps=2)
    grown.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in grown.state.log_history if "loss" in entry]
    assert rates[4:] == pytest.approx([0.01 * (12 - step) / 10 for step in range(4, 12)])


def test_a_shorter_run_does_not_go_back(checkpoint):
    with pytest.raises(CheckpointError, match="saved at step 2, beyond the run's 1 steps"):
        small_trainer(checkpoint.parent, max_steps=1).train(resume_from_checkpoint=str(checkpoint))


def test_early_stopping_goes_on_where_it_was(tmp_path, monkeypatch):
    """One patience counts across an interruption, and a run that had stopped early stays stopped."""

    def trainer(folder, scores, **changes):
        values = iter(scores)
        monkeypatch.setattr(task_evaluation, "score", lambda *_: {"matthews": (value := next(values)), "score": value})
        fields = {"tasks": ("cola",), "max_steps": 10, "eval_steps": 1, "save_steps": 1, "save_total_limit": None}
        early = [EarlyStoppingCallback(early_stopping_patience=2)]
        return small_trainer(folder, load_best_model_at_end=True, callbacks=early, **{**fields, **changes})

    found = [10.0, 30.0, 20.0, 20.0, 20.0]
    stopped = trainer(tmp_path, found)
    stopped.train()
    assert stopped.state.global_step == 4 and stopped.state.best_global_step == 2
    for step, rest in ((3, found[3:]), (4, [])):
        again = trainer(tmp_path, rest)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.global_step == 4
        assert all(torch.equal(value, trained(stopped.model)[name]) for name, value in trained(again.model).items())


def test_a_moved_run_finds_its_best_checkpoint(tmp_path, monkeypatch):
    values = iter([30.0, 10.0, 10.0])
    monkeypatch.setattr(task_evaluation, "score", lambda *_: {"matthews": (value := next(values)), "score": value})
    fields = {"tasks": ("cola",), "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    before = small_trainer(tmp_path / "before", **fields)
    before.train()
    (tmp_path / "before").rename(tmp_path / "after")
    after = small_trainer(tmp_path / "after", **fields)
    after.train(resume_from_checkpoint=True)
    assert after.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-2")
    assert all(torch.equal(value, trained(before.model)[name]) for name, value in trained(after.model).items())
