"""Runs with fused pieces: the argument, dropout in training, resuming, two processes, and the loss they reach."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from support import watched_masks
from support.runs import SMALL, data_folder, losses, same_weights, saved_t5, small_run, small_trainer, trained
from support.t5s import batch, tiny_model, tiny_t5
from test_torchrun import torchrun

from hyperformer_fast import HyperFormerModel, philox
from hyperformer_fast.cli import main
from hyperformer_fast.frozen_head import NOT_COMPUTED
from hyperformer_fast.fusion import AUTO_PIECES, PIECES, pieces_of
from hyperformer_fast.training import RunArguments, RunError, evaluate_run, train_run
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training.arguments import RunConfigError
from hyperformer_fast.training.evaluate import load_model
from hyperformer_fast.training.fewshot import fewshot_run
from hyperformer_fast.training.folder import read_run
from hyperformer_fast.training.start import build_model

STEPS = 4


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    t5 = saved_t5(folder / "t5", dropout=0.1, num_layers=2)
    return {"model_name_or_path": t5, "data_dir": data_folder(folder / "data"), **SMALL}


def command(inputs, folder, *flags: str) -> list[str]:
    fields = {**inputs, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "warmup_steps": 0, "seed": 3}
    fields |= {"label_smoothing_factor": 0.1, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    named = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    return ["train", *named, "--output_dir", str(folder), *flags]


@pytest.fixture(scope="module")
def fused(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_curves", lambda *_: None)
        assert main(command(inputs, folder)) == 0
    return folder


# The argument


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        *[(given, AUTO_PIECES) for given in ({}, {"fuse": None}, {"fuse": "auto"}, {"fuse": True}, [])],
        *[(given, set()) for given in ({"fuse": "none"}, {"fuse": False}, {"fuse": ["none"]}, ["--fuse", "none"])],
        ({"fuse": "all"}, set(PIECES)), ({"fuse": ["norm", "loss"]}, {"norm", "loss"}),
        ({"fuse": "norm, cache"}, {"norm", "cache"}), (["--fuse", "norm", "dropout"], {"norm", "dropout"}),
        (["--fuse", "norm,dropout"], {"norm", "dropout"}),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, (set, frozenset)) else str(value),
)  # fmt: skip
def test_what_is_fused_is_an_argument(given, pieces):
    run = RunArguments.from_args(given) if isinstance(given, list) else RunArguments.from_dict({**SMALL, **given})
    assert RunArguments.from_dict(run.to_dict()).model.fuse == run.model.fuse
    model, _ = build_model(run, ["cola"])
    assert model._pieces == pieces and pieces_of(model.t5) == pieces
    assert model.loss_without_logits == ("loss" in pieces or pieces == AUTO_PIECES)


@pytest.mark.parametrize(
    ("fuse", "message"),
    [
        ("norms", "fuse must be among auto, none, all, products, norm, .* got 'norms'; did you mean 'norm'"),
        (["none", "norm"], "fuse: 'none' stands alone, got none, norm"),
        ([], 'fuse must name at least one piece, got an empty list; "none" fuses nothing'),
        (3, "fuse must be a list of names or null, got 3"),
    ],
)
def test_pieces_that_do_not_exist_are_refused(fuse, message):
    with pytest.raises(RunConfigError, match=message):
        RunArguments.from_dict({"fuse": fuse})


def test_a_run_keeps_what_is_fused(inputs, fused, tmp_path):
    flags = "--fuse", "dropout", "norm", "--max_steps", "1"
    assert main(command(inputs, tmp_path / "run", *flags)) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["fuse"] == ["dropout", "norm"]
    run = read_run(tmp_path / "run")[0]
    model, _ = load_model(tmp_path / "run", run, None, Console(quiet=True))
    assert pieces_of(model.t5) == {"dropout", "norm"}
    model = HyperFormerModel.from_pretrained(tmp_path / "run", fuse=False)
    assert pieces_of(model.t5) == frozenset()
    # Other masks would be another run.
    with pytest.raises(RunError, match=r"cannot resume .*: fuse was None and is now \['none'\]"):
        train_run(
            RunArguments.from_args(command(inputs, fused, "--fuse", "none", "--resume_from_checkpoint", "true")[1:]),
            Console(quiet=True),
        )


def test_a_run_of_an_earlier_release_goes_on_unfused(inputs, tmp_path):
    """Its run.json says nothing of it. The masks are then torch's, as they were."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(command(inputs, whole, "--fuse", "none")) == 0
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / "run.json").read_text())
    del content["arguments"]["fuse"]
    (folder / "run.json").write_text(json.dumps(content))
    run = read_run(folder)[0]
    assert run.model.fuse == ["none"]
    assert main(command(inputs, folder, "--resume_from_checkpoint", "true")) == 0
    assert same_weights(folder, whole)
    assert json.loads((folder / "run.json").read_text())["arguments"]["fuse"] == ["none"]


def test_few_shot_transfer_keeps_what_is_fused(inputs, tmp_path, monkeypatch):
    small = {"max_steps": 1, "tasks": ["cola"], "fuse": ["norm"], **inputs}
    train_run(small_run(tmp_path / "run", **small), Console(quiet=True))
    seen = []
    plain = run_module.HyperFormerTrainer.train
    monkeypatch.setattr(
        run_module.HyperFormerTrainer, "train",
        lambda self, *args, **kwargs: seen.append(pieces_of(self.model.t5)) or plain(self, *args, **kwargs),
    )  # fmt: skip
    grid = {"samples": [4], "seeds": 1, "max_steps": 1, "console": Console(quiet=True)}
    fewshot_run(tmp_path / "run", "stsb", output_dir=tmp_path / "study", data_dir=inputs["data_dir"], **grid)
    assert seen == [{"norm"}]


# Dropout in training


def test_the_command_trains_with_the_counters_masks(inputs, tmp_path, monkeypatch):
    """All pieces draw theirs, none draws torch's; with none fused it is the other way round."""
    drawn = []
    monkeypatch.setattr(philox, "draw", _watched(philox.draw, drawn))
    results = []
    for name, flags in (("fused", ()), ("bare", ("--fuse", "none"))):
        assert main(command(inputs, tmp_path / name, "--max_steps", "1", *flags)) == 0
        results.append(len(drawn))
        drawn.clear()
    # two blocks of the encoder and two of the decoder have ten sublayers, and four feed-forwards
    assert results[0] >= 14 and results[1] == 0
    histories = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("fused", "bare"))
    one, other = (next(entry["loss"] for entry in history if "loss" in entry) for history in histories)
    assert one != other and one == pytest.approx(other, rel=0.1)


def _watched(draw, drawn):
    def watched(p, like):
        dropout = draw(p, like)
        drawn.append(dropout)
        return dropout

    return watched


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(inputs, fused, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(fused, folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    assert main(command(inputs, folder, "--resume_from_checkpoint", "true")) == 0
    assert same_weights(folder, fused)
    both = [json.loads((each / "history.json").read_text()) for each in (folder, fused)]
    found, wanted = ([(e["step"], e["loss"]) for e in history if "loss" in e] for history in both)
    assert found == wanted and len(found) == STEPS
    evaluated = evaluate_run(folder, "validation", console=Console(quiet=True))
    assert evaluated["tasks"] == json.loads((fused / "metrics.json").read_text())["tasks"]


def test_recomputed_blocks_have_the_masks_of_their_forward(tmp_path):
    """Trained with gradient checkpointing and without, to the same bits."""
    found = []
    for checkpointing in (False, True):
        trainer = small_trainer(tmp_path, dropout=0.1, max_steps=3, gradient_checkpointing=checkpointing)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        found.append((losses(trainer), trained(trainer.model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_a_compiled_model_has_the_masks_of_the_eager_one():
    inputs = batch() | {"task_index": torch.tensor([0, 1, 2, 0]), "output_logits": False}
    found = []
    for compiled in (False, True):
        t5 = tiny_t5(dtype=torch.float32, dropout=0.3, num_layers=1, num_decoder_layers=1)
        model = tiny_model(t5=t5).train()
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        torch.manual_seed(11)
        outputs = [model(**inputs) for _ in range(2)]
        assert all(out.logits is NOT_COMPUTED for out in outputs)
        losses_of = [out.loss for out in outputs]
        sum(losses_of).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.stack(losses_of).detach(), gradients))
    assert found[0][0][0] != found[0][0][1]  # two draws
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_each_process_has_masks_of_its_own(inputs, tmp_path):
    done = torchrun(watched_masks.__file__, str(tmp_path), *command(inputs, tmp_path / "run", "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"masks{rank}.json").read_text()) for rank in (0, 1))
    assert len(one) == len(two) > 10
    assert [stream for _, _, stream in one] == [0] * len(one) and [stream for _, _, stream in two] == [1] * len(two)
    # Trainer gives all processes one seed, and with it the masks of torch's own generator.
    assert [(p, seed) for p, seed, _ in one] == [(p, seed) for p, seed, _ in two]
    assert len({seed for _, seed, _ in one}) == len(one)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert all(entry["loss"] > 0 for entry in history if "loss" in entry)


# What is learned


def loss_curve(seed: int, fuse, dropout: float, steps: int = 16) -> float:
    """The mean loss of a training on a few batches, after its first half."""
    t5 = tiny_t5(dtype=torch.float32, dropout=dropout, seed=seed, num_layers=1, num_decoder_layers=1)
    model = tiny_model(t5=t5, fuse=fuse).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(100 + seed)
    curve = []
    for step in range(steps):
        state = torch.get_rng_state()
        inputs = batch(seed=step % 3)
        torch.set_rng_state(state)
        optimizer.zero_grad()
        loss = model(**inputs, task="mnli", output_logits=None if fuse else True).loss
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return sum(curve[steps // 2 :]) / (steps - steps // 2)


def test_fused_and_unfused_trainings_agree_in_distribution():
    """Five seeds each: other masks, the same loss; and much less loss without dropout, so that the test can tell."""
    fused, bare = (torch.tensor([loss_curve(seed, fuse, 0.3) for seed in range(5)]) for fuse in ("all", False))
    without = torch.tensor([loss_curve(seed, False, 0.0) for seed in range(5)])
    difference = fused - bare  # the seeds have the same T5s, whose losses differ more than the masks'
    assert (difference != 0).all()
    assert difference.mean().abs() < 3 * difference.std() / 5**0.5 + 0.005
    assert (bare - without).mean() > 10 * difference.mean().abs()
