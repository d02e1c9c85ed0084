"""Checkpoints: what is in them comes back, what does not fit is named, and no kill breaks one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.t5s import TASKS, VARIANTS, batch, bits, tiny_config, tiny_model, tiny_t5, train

from hyperformer_fast import HyperFormerModel, atomic, checkpoint
from hyperformer_fast.checkpoint import DESCRIPTION, CheckpointError, recover_directory, write_directory, write_file


def trained_model(**changes):
    model = tiny_model(t5=tiny_t5(dtype=torch.float32), **changes)
    train(model)
    return model


@pytest.fixture
def saved(tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run", model


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_is_exact(tmp_path, variant, head):
    model = trained_model(variant=variant, unfreeze_lm_head=head, train_task_embeddings=True)
    model.add_task("rte", ["mnli", "cola"])
    model.save_pretrained(tmp_path / "run")
    again = HyperFormerModel.from_pretrained(tmp_path / "run", t5=tiny_t5(dtype=torch.float32))
    assert again.hyperformer_config == model.hyperformer_config
    mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(
        torch.equal(theirs[name], p) and theirs[name].requires_grad == p.requires_grad for name, p in mine.items()
    )
    for task in [*TASKS, "rte"]:
        assert torch.equal(again(**batch(), task=task).logits, model(**batch(), task=task).logits)
    assert all(
        torch.equal(p, q) for p, q in zip(again.unload().parameters(), tiny_t5(dtype=torch.float32).parameters())
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norms, head", [(True, False), (False, False), (True, True), (False, True)])
def test_it_holds_what_is_trained_and_nothing_else(tmp_path, norms, head, tied):
    model = tiny_model(t5=tiny_t5(tied=tied), unfreeze_layer_norms=norms, unfreeze_lm_head=head)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {name for name, p in model.named_parameters() if p.requires_grad} | {
        "base_sample",
        DESCRIPTION,
    }
    own = {name for name in names if name.startswith("t5.")}
    assert ({"t5.shared.weight" if tied else "t5.lm_head.weight"} <= own) == head
    assert ("t5.encoder.final_layer_norm.weight" in own) == norms
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["config"] == model.hyperformer_config.to_dict()
    assert (
        description["base_model"]["class"] == "T5ForConditionalGeneration"
        and description["base_model"]["d_model"] == 32
    )


def test_other_files_of_the_directory_stay(saved):
    directory, model = saved
    (directory / "tokenizer.json").write_text("{}")
    train(model)
    model.save_pretrained(directory)
    written = ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in directory.iterdir()) == [*written, "tokenizer.json"]
    assert (directory / "model.safetensors").stat().st_mode == (directory / "tokenizer.json").stat().st_mode
    again = HyperFormerModel.from_pretrained(directory, t5=tiny_t5(dtype=torch.float32))
    assert torch.equal(again(**batch(), task="mnli").logits, model(**batch(), task="mnli").logits)


def test_a_base_in_another_precision_is_the_same_base(saved):
    directory, model = saved
    for dtype in (torch.bfloat16, torch.float16):
        half = HyperFormerModel.from_pretrained(directory, t5=tiny_t5(dtype=torch.float32).to(dtype))
        a, b = model(**batch(), task="mnli").logits, half(**batch(), task="mnli").logits
        assert (a - b).norm() < 0.03 * a.norm()


def _edit(directory, tensors=None, **description):
    path = directory / "model.safetensors"
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["hyperformer"])
    held = load_file(path)
    save_file(tensors(held) if tensors else held, path, {"hyperformer": json.dumps({**old, **description})})


BROKEN = {
    "no directory": (
        lambda d: [f.unlink() for f in d.iterdir()] and d.rmdir(),
        FileNotFoundError,
        "no HyperFormer checkpoint",
    ),
    "empty": (
        lambda d: (d / "model.safetensors").unlink(),
        FileNotFoundError,
        "model.safetensors is not there",
    ),
    "truncated": (
        lambda d: os.truncate(d / "model.safetensors", 5000),
        CheckpointError,
        "model.safetensors is not a whole safetensors file",
    ),
    "no bytes": (lambda d: os.truncate(d / "model.safetensors", 0), CheckpointError, "not a whole safetensors"),
    "a pickle": (
        lambda d: torch.save({"a": torch.ones(3)}, d / "model.safetensors"),
        CheckpointError,
        "not a whole safetensors file",
    ),
    "someone else's": (
        lambda d: save_file({"a": torch.ones(3)}, d / "model.safetensors"),
        CheckpointError,
        "not a HyperFormer checkpoint",
    ),
    "a later format": (lambda d: _edit(d, format_version=2), CheckpointError, "format version 2; this library reads 1"),
    "an unknown field": (
        lambda d: _edit(d, config={**tiny_config().to_dict(), "depth": 3}),
        CheckpointError,
        r"unknown configuration fields \['depth'\]",
    ),
    "another size": (
        lambda d: _edit(d, base_model={"model_type": "t5", "d_model": 512}),
        CheckpointError,
        "another T5: d_model was 512, this one's is 32",
    ),
    "a deep description": (
        lambda d: _edit(d, config=json.loads("[" * 100 + "]" * 100)),
        CheckpointError,
        "model.safetensors: the header's 'hyperformer' .*nested more than 16 deep",
    ),
    "no base": (lambda d: _edit(d, base_model=None), CheckpointError, "another T5: model_type was None"),
    "a missing norm": (
        lambda d: _edit(d, lambda t: {n: v for n, v in t.items() if n != "t5.encoder.final_layer_norm.weight"}),
        CheckpointError,
        r"lacks t5.encoder.final_layer_norm.weight of this model \(1 missing, 0 unknown\)",
    ),
    "a stranger": (
        lambda d: _edit(d, lambda t: {**t, "t5.encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(32, 32)}),
        CheckpointError,
        "has t5.encoder.block.0.layer.0.SelfAttention.q.weight, unknown",
    ),
    "another shape": (
        lambda d: _edit(d, lambda t: {**t, "task_embeddings.task_to_embeddings.mnli": torch.ones(7)}),
        CheckpointError,
        r"task_to_embeddings.mnli is \[7\] in the checkpoint, \[6\] in this model",
    ),
    "no sample": (
        lambda d: _edit(d, lambda t: {n: v for n, v in t.items() if n != "base_sample"}),
        CheckpointError,
        "lacks base_sample",
    ),
}


@pytest.mark.filterwarnings("ignore:.*is absent or differs")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_changes(saved, kind):
    directory, _ = saved
    damage, error, message = BROKEN[kind]
    damage(directory)

    t5 = tiny_t5(dtype=torch.float32)
    before, flags = bits(t5), [p.requires_grad for p in t5.parameters()]
    with pytest.raises(error, match=message):
        HyperFormerModel.from_pretrained(directory, t5=t5)
    assert all(torch.equal(p, before[name]) for name, p in t5.named_parameters())
    assert [p.requires_grad for p in t5.parameters()] == flags
    assert not any(module._forward_hooks for module in t5.modules())

    model = tiny_model(t5=t5)
    before = bits(model)
    with pytest.raises((error, CheckpointError)):
        model.load_weights(directory)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 200 + "]" * 200])
def test_a_deep_copy_of_the_description_is_only_another_one(saved, text):
    directory, _ = saved
    (directory / "config.json").write_text(text)
    with pytest.warns(UserWarning, match="config.json is absent or differs"):
        tensors, description = checkpoint.load_checkpoint(directory)
    assert tensors and description["format_version"] == 1


def test_another_t5_of_the_same_size_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"another T5: its frozen .* has .* where this one's has"):
        HyperFormerModel.from_pretrained(saved[0], t5=tiny_t5(dtype=torch.float32, seed=9))
    with pytest.raises(CheckpointError, match="num_layers was 3, this one's is 2"):
        HyperFormerModel.from_pretrained(saved[0], t5=tiny_t5(num_layers=2))
    with pytest.raises(CheckpointError, match="feed_forward_proj was 'relu', this one's is 'gated-gelu'"):
        HyperFormerModel.from_pretrained(saved[0], t5=tiny_t5(gated=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"non_linearity": "relu"}, "non_linearity is 'gelu_new' in the checkpoint, 'relu' in this model"),
        ({"variant": "hyperformer"}, "variant is"),
        ({"tasks": ["mnli", "cola", "stsb"]}, "tasks is"),
        ({"unfreeze_layer_norms": False}, "unfreeze_layer_norms is True"),
    ],
)
def test_load_weights_wants_the_same_configuration(saved, changes, message):
    directory, trained = saved
    model = tiny_model(t5=tiny_t5(dtype=torch.float32), **changes)
    before = bits(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_weights(directory)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    same = tiny_model(t5=tiny_t5(dtype=torch.float32))
    same.load_weights(directory)
    assert torch.equal(same(**batch(), task="mnli").logits, trained(**batch(), task="mnli").logits)


def test_the_description_beside_the_weights_is_only_a_copy(saved):
    directory, model = saved
    copy = directory / "config.json"
    for text in ('{"format_version": 1}', "not json", None):
        copy.write_text(text) if text else copy.unlink()
        with pytest.warns(UserWarning, match="absent or differs from the description inside"):
            again = HyperFormerModel.from_pretrained(directory, t5=tiny_t5(dtype=torch.float32))
        assert again.hyperformer_config == model.hyperformer_config


def test_a_state_dict_in_place_of_the_parameters(tmp_path):
    """As processes that share the parameters save: each has a part, and one is given all."""
    model, other = trained_model(unfreeze_lm_head=True), tiny_model(t5=tiny_t5(dtype=torch.float32))
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    tied = whole.pop("t5.shared.weight")
    assert torch.equal(whole["t5.lm_head.weight"], tied), "which has the tensor under another name"
    train(model)
    model.save_pretrained(tmp_path, state_dict=whole)
    held = load_file(tmp_path / "model.safetensors")
    assert torch.equal(held["t5.shared.weight"], tied)
    assert all(torch.equal(held[name], value) for name, value in whole.items() if name in held)
    with pytest.raises(ValueError, match=r"the state dict lacks .*stsb, which this model trains: nothing was"):
        other.save_pretrained(tmp_path, state_dict={"task_embeddings.task_to_embeddings.mnli": torch.ones(6)})
    for nothing in ({"state_dict": {}}, {"is_main_process": False}):
        other.save_pretrained(tmp_path / "not", **nothing)
    assert not (tmp_path / "not").exists()
    with pytest.raises(ValueError, match="saved as safetensors only"):
        other.save_pretrained(tmp_path, safe_serialization=False)
    assert all(torch.equal(value, held[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


AS_NOBODY = """
import os, sys
from hyperformer_fast.checkpoint import save_checkpoint, write_directory
import torch
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
save = lambda: save_checkpoint(sys.argv[1], {"a": torch.ones(2)}, {})
for attempt in (save, write_directory(sys.argv[1] + "/below").__enter__):
    try:
        attempt()
    except PermissionError as error:
        print(error)
"""


def test_a_directory_that_cannot_be_written(tmp_path):
    # not below tmp_path, whose parents only their owner may enter
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "run")
        checkpoint.save_checkpoint(directory, {"a": torch.zeros(2)}, {})
        Path(folder).chmod(0o755)
        directory.chmod(0o555)
        command = [sys.executable, "-c", AS_NOBODY, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
        directory.chmod(0o755)
        assert done.stdout.count("cannot write") == 2 and done.stdout.count("Permission denied") == 2, done
        assert torch.equal(checkpoint.load_checkpoint(directory)[0]["a"], torch.zeros(2))
        assert len(list(directory.iterdir())) == 2
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="cannot write"):
            tiny_model().save_pretrained(path)
    assert (tmp_path / "file").read_text() == "x"


def _environment():
    root = str(Path(checkpoint.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_an_error_while_writing_leaves_the_old(tmp_path, monkeypatch):
    target = tmp_path / "run"
    with write_directory(target) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(KeyError), write_directory(target) as partial:
        (partial / "a").write_text("new")
        raise KeyError
    with pytest.raises(KeyError), write_file(target / "a") as partial:
        partial.write_text("new")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and [p.name for p in target.iterdir()] == ["a"]
    assert (target / "a").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    target, link = tmp_path / "a[b]c", tmp_path / "link"
    for version in ("one", "two", "three"):
        with write_directory(target if version != "three" else link) as partial:
            assert partial.parent == target.parent
            (partial / "deep").mkdir()
            (partial / "deep" / version).write_text(version)
        if version == "one":
            link.symlink_to(target)
        assert [p.name for p in (target / "deep").iterdir()] == [version]
        assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["a[b]c", "link"]


def test_renameat2_serves_here():
    """Otherwise the test above shows the fallback twice."""
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux's")
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"exchange-{os.getpid()}"
        for name in ("a", "b"):
            (folder / name / name).mkdir(parents=True)
        try:
            patch.chdir(folder)
            assert atomic._exchange(folder / "a", folder / "b")
            assert (folder / "a" / "b").is_dir() and (folder / "b" / "a").is_dir()
        finally:
            shutil.rmtree(folder)


def test_a_kill_between_the_two_renames_is_mended(tmp_path, monkeypatch):
    target = tmp_path / "run"
    with write_directory(target) as partial:
        (partial / "a").write_text("old")
    os.rename(target, tmp_path / ".run.previous")
    assert (recover_directory(target) / "a").read_text() == "old"
    os.rename(target, tmp_path / ".run.previous")
    with write_directory(target) as partial:
        (partial / "a").write_text("new")
    assert (target / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["run"]
    (tmp_path / ".run.previous").mkdir()
    recover_directory(target)
    assert (target / "a").read_text() == "new"
    with write_directory(target):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "what a killed writer left is swept up"


def test_a_living_writer_is_not_swept_away(tmp_path):
    with write_directory(tmp_path / "run") as one:
        (one / "a").write_text("one")
        with write_directory(tmp_path / "run") as other:
            (other / "a").write_text("other")
        assert (tmp_path / "run" / "a").read_text() == "other"
    assert (tmp_path / "run" / "a").read_text() == "one"


def test_kill_9_leaves_the_old_or_the_new(tmp_path):
    # in a process of its own: a fork of this one, whose libraries have threads by now, may hang
    script = Path(__file__).with_name("support") / "killed_writer.py"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["file", "directory", "renames"]
