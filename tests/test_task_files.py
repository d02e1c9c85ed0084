"""A task as a file: it gives the same answers in another copy of the model, and nothing else is taken in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.prepared import logits
from support.t5s import TASKS, VARIANTS, batch, tiny_model, tiny_t5
from transformers import T5EncoderModel

from hyperformer_fast import fingerprint, get_hyperformer_model, task_files
from hyperformer_fast.atomic import write_file
from hyperformer_fast.checkpoint import CheckpointError, digest_of


def made(variant="hyperformer++", dtype=torch.float32, **changes):
    """Always the same model."""
    return tiny_model(variant, tiny_t5(dtype=dtype), **changes).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "stsb.safetensors"
    made().export_task("stsb", path)
    return path


@pytest.fixture
def other():
    """A copy of the model that lacks the task."""
    model = made()
    model.remove_task("stsb")
    return model


def forged(source, path, tensors=None, **fields):
    """A file with other content and the digest that belongs to it; ``...`` takes a field out."""
    with safe_open(source, framework="pt") as file:
        before = {name: file.get_tensor(name) for name in file.keys()}
        description = json.loads(file.metadata()["hyperformer_task"])
    description = {name: value for name, value in {**description, **fields}.items() if value is not ...}
    tensors = before if tensors is None else tensors
    description["sha256"] = digest_of(tensors, description)
    save_file(tensors, path, {"format": "pt", "hyperformer_task": json.dumps(description)})
    return path


def parameters(model):
    return {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_unmoved(model, before):
    now = dict(model.named_parameters())
    for name, (parameter, value, trained) in before.items():
        assert now[name] is parameter and torch.equal(parameter, value) and parameter.requires_grad == trained, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_task_answers_the_same_in_another_copy(variant, tmp_path):
    path = tmp_path / "new" / "task.safetensors"
    model, other = made(variant), made(variant)
    expected = logits(model, "stsb")
    model.export_task("stsb", path)
    other.remove_task("stsb")
    before, theirs = parameters(other), {task: logits(other, task) for task in ("mnli", "cola")}
    assert other.import_task(path) == "stsb"
    assert other.hyperformer_config.tasks == ["mnli", "cola", "stsb"]
    torch.testing.assert_close(logits(other, "stsb"), expected, rtol=1e-5, atol=1e-5)
    assert_unmoved(other, before)
    for task, each in theirs.items():
        torch.testing.assert_close(logits(other, task), each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(other, ["stsb"] * 4), expected, rtol=1e-5, atol=1e-5)


def test_a_file_is_small_and_says_what_it_belongs_to(file):
    assert file.stat().st_size < 4096
    content = task_files.read_task_file(file)
    assert content.task == "stsb" and content.tensors.keys() == {"task_embedding"}
    assert len(content.hypernetworks) == 64 and content.description["t5"]["digests"]


def test_another_name(file, other):
    assert other.import_task(file, "other: a.b") == "other: a.b"
    with pytest.raises(ValueError, match=r"task 'mnli' exists already.*import_task\(path, name=...\)"):
        other.import_task(forged(file, file.with_name("mnli"), task="mnli"))
    with pytest.raises(ValueError, match="'cola' exists already: choose a name other than mnli, cola, other: a.b$"):
        other.import_task(file, "cola")


def test_a_frozen_model_takes_a_frozen_task(file, other):
    assert other.requires_grad_(False).import_task(file) == "stsb"
    assert not any(p.requires_grad for p in other.parameters())
    twin = made()
    twin.remove_task("stsb")
    with torch.inference_mode():
        twin.import_task(file)
    embedding = twin.task_embeddings.task_to_embeddings["stsb"]
    assert embedding.requires_grad and not embedding.is_inference()


def changed_generator(model):
    model.hypernetworks["decoder"].generator.bias.data[0, -1] += 1e-3


def changed_projector(model):
    model.hypernetworks["encoder"].projector[0].weight.data[0, 0] += 1e-3


@pytest.mark.parametrize("change", [changed_generator, changed_projector])
def test_other_hypernetworks_are_refused_with_both_hashes(file, other, change):
    ours = task_files._Belongs.of(other).hypernetworks
    assert ours == task_files.read_task_file(file).hypernetworks
    change(other)
    now = task_files._Belongs.of(other).hypernetworks
    before = parameters(other)
    with pytest.raises(CheckpointError, match=rf"other hypernetworks \(SHA-256 {ours} in the file, {now} in this"):
        other.import_task(file)
    assert_unmoved(other, before)
    assert other.hyperformer_config.tasks == ["mnli", "cola"] and len(before) == len(list(other.parameters()))


def test_another_configuration_is_refused_by_its_field(file):
    model = made(non_linearity="relu")
    with pytest.raises(CheckpointError, match="non_linearity is 'gelu_new' in the file, 'relu' in this model"):
        model.import_task(file, "new")
    with pytest.raises(CheckpointError, match="variant is 'hyperformer[+][+]' in the file, 'adapters' in this model"):
        made("adapters").import_task(file, "new")


def test_what_is_trained_makes_no_other_hypernetworks(file):
    model = made(freeze_model_but_task_embeddings=True, init_weights="hyperfan_in")
    model.add_task("more")
    assert model.import_task(file, "new") == "new"


@pytest.mark.parametrize("name", ["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.final_layer_norm.weight"])
def test_another_t5_is_refused(file, other, name):
    other.t5.get_parameter(name).data.view(-1)[0] += 1e-3
    with pytest.raises(CheckpointError, match=r"task of another T5.*digests of all weights are \w{64} in float32 and"):
        other.import_task(file)


def test_another_computation_of_the_t5_is_refused(file):
    model = tiny_model(t5=tiny_t5(dtype=torch.float32, layer_norm_epsilon=1e-3)).eval()
    with pytest.raises(CheckpointError, match="task of another T5.*layer_norm_epsilon differs"):
        model.import_task(file, "new")


def test_the_same_t5_in_half_precision_is_taken(file, tmp_path, recwarn):
    model = made(dtype=torch.bfloat16)
    assert model.import_task(file, "new") == "new"
    model.export_task("new", tmp_path / "back")
    assert made().import_task(tmp_path / "back") == "new"
    widened = tiny_model(t5=tiny_t5(dtype=torch.bfloat16).float()).eval()
    assert widened.import_task(file, "new") == "new"
    assert not recwarn.list


def test_cast_hypernetworks_are_named(file):
    with pytest.raises(CheckpointError, match="in float32 there, in bfloat16 here; import tasks before a cast"):
        made().to(torch.bfloat16).import_task(file, "new")


def test_a_t5_that_cannot_be_compared_is_a_warning(file, other, monkeypatch):
    real = fingerprint.frozen
    monkeypatch.setattr(fingerprint, "frozen", lambda t5, trained: {**real(t5, trained), "x.weight": None})
    with pytest.warns(UserWarning, match="make sure that this is the T5") as caught:
        other.import_task(file)
    assert caught[0].filename == __file__


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda content: b"", "not a whole safetensors file"),
        (lambda content: content[:-1], "not a whole safetensors file"),
        (lambda content: content[:100], "not a whole safetensors file"),
        (lambda content: b"\xff" * 64, "not a whole safetensors file"),
        (lambda content: content + b"\0", "not a whole safetensors file"),
        (flipped, "not what was saved"),
        (lambda content: content.replace(b'\\"task\\": \\"stsb', b'\\"task\\": \\"stsa'), "not what was saved"),
    ],
    ids=["empty", "truncated", "header truncated", "noise", "longer", "bit flipped", "name changed"],
)
def test_broken_files_are_refused(file, other, tmp_path, spoilt, message):
    path = tmp_path / "broken"
    path.write_bytes(spoilt(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        other.import_task(path)
    assert other.hyperformer_config.tasks == ["mnli", "cola"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"task_embedding": torch.full((6,), float("nan"))}}, "task_embedding has the value nan"),
        ({"tensors": {"task_embedding": torch.zeros(7)}}, r"task_embedding has shape \[7\] in the file, \[6\] in this"),
        ({"tensors": {"task_embedding": torch.zeros(6).int()}}, "has dtype torch.int32 in the file, torch.float32 in"),
        ({"tensors": {"other": torch.zeros(6)}}, "has other, and not task_embedding"),
        ({"format_version": 2}, "format version 2; this library reads 1"),
        ({"task": 3}, "task must be a str, got 3"),
        ({"task": ""}, "a name must be a non-empty string"),
        ({"t5": ...}, "t5 must be a dict, got None"),
        ({"t5": {"name_or_path": ""}}, "t5.computation must be a dict, got None"),
        ({"t5": []}, r"t5 must be a dict, got \[\]"),
    ],
    ids=str,
)
def test_files_with_wrong_content_are_refused(file, other, tmp_path, changes, message):
    with pytest.raises((CheckpointError, TypeError), match=message):
        other.import_task(forged(file, tmp_path / "forged", **changes))
    assert other.hyperformer_config.tasks == ["mnli", "cola"]


def test_other_files_are_refused(other, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="but not one that export_task wrote$"):
        other.import_task(tmp_path / "foreign")
    other.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="the checkpoint of a whole model"):
        other.import_task(tmp_path / "whole" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        other.import_task(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        other.import_task(tmp_path / "absent")


def test_several_files_are_taken_all_or_none(file, other, tmp_path):
    second = forged(file, tmp_path / "second", task="second")
    broken = forged(file, tmp_path / "broken", {"task_embedding": torch.zeros(7)}, task="broken")
    with pytest.raises(CheckpointError, match=r"shape \[7\]"):
        other.import_tasks([file, second, broken])
    with pytest.raises(ValueError, match="'second' exists already"):
        other.import_tasks([file, second, second])
    assert other.hyperformer_config.tasks == ["mnli", "cola"]
    assert other.import_tasks([file, second]) == ["stsb", "second"]


def test_no_file_is_replaced_unasked(tmp_path):
    model, path = made(), tmp_path / "task"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.export_task("mnli", path)
    assert path.read_text() == "precious"
    model.export_task("mnli", path, overwrite=True)
    assert task_files.read_task_file(path).task == "mnli"
    assert [each.name for each in tmp_path.iterdir()] == ["task"]


def test_no_file_is_replaced_that_another_writer_finished_meanwhile(tmp_path):
    path = tmp_path / "task"
    with pytest.raises(FileExistsError), write_file(path, replace=False) as partial:
        partial.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and [each.name for each in tmp_path.iterdir()] == ["task"]
    with write_file(tmp_path / "alone", replace=False) as partial:
        partial.write_text("ours")
    assert (tmp_path / "alone").read_text() == "ours" and (tmp_path / "alone").stat().st_nlink == 1


def test_what_cannot_be_exported(tmp_path):
    model = made()
    with pytest.raises(ValueError, match="unknown task 'rte'"):
        model.export_task("rte", tmp_path / "task")
    model.task_embeddings.task_to_embeddings["cola"].data[0] = float("inf")
    with pytest.raises(ValueError, match="task_embedding of 'cola' has values that are not finite"):
        model.export_task("cola", tmp_path / "task")
    with pytest.raises(ValueError, match="'finetuning' has no weights of its own"):
        made("finetuning").export_task("cola", tmp_path / "task")
    assert not list(tmp_path.iterdir())


def test_a_whole_table_of_adapters_travels(tmp_path):
    model = made("adapters")
    model.export_task("cola", tmp_path / "task")
    found = task_files.read_task_file(tmp_path / "task").tensors
    assert found.keys() == {"adapters.encoder", "adapters.decoder"}
    model.hypernetworks["encoder"].norms.data[0, 0] += 1e-3  # which all tasks share
    with pytest.raises(CheckpointError, match="other hypernetworks"):
        model.import_task(tmp_path / "task", "new")


def test_tasks_that_share_an_embedding(tmp_path):
    model = made(task_to_embeddings={"mnli": "both", "stsb": "both", "cola": "cola"})
    expected = logits(model, "stsb")
    model.export_task("stsb", tmp_path / "task")
    assert model.import_task(tmp_path / "task", "alone") == "alone"
    torch.testing.assert_close(logits(model, "alone"), expected, rtol=1e-5, atol=1e-5)
    model.task_embeddings.task_to_embeddings["both"].data.zero_()
    torch.testing.assert_close(logits(model, "alone"), expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_alone(tmp_path):
    torch.manual_seed(0)
    t5 = T5EncoderModel(tiny_t5(dtype=torch.float32).config).eval()
    model = get_hyperformer_model(t5, made().hyperformer_config).eval()
    model.export_task("cola", tmp_path / "task")
    assert model.import_task(tmp_path / "task", "new") == "new"
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        assert torch.equal(model(**inputs, task="new")[0], model(**inputs, task="cola")[0])
    assert model.hyperformer_config.tasks == [*TASKS, "new"]
