"""The adapters library's format: loaded there, the same logits; and what it has no form for is refused."""

from __future__ import annotations

import json

import pytest
import torch
from support.t5s import LAYERS, VARIANTS, batch, tiny_model, tiny_t5
from torch.testing import assert_close
from transformers import T5EncoderModel, T5ForConditionalGeneration

FIELDS = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "pre-norm": {"add_layer_norm_before_adapter": True, "non_linearity": "gelu"},
    "no norms": {"add_layer_norm_after_adapter": False, "non_linearity": "relu"},
    "silu": {"non_linearity": "silu", "reduction_factor": 5},
}


def model_of(**changes):
    return tiny_model(t5=tiny_t5(dtype=torch.float32), **changes).eval()


def logits(t5, **kwargs):
    with torch.no_grad():
        return t5(**batch(), **kwargs).logits


@pytest.mark.parametrize("name", FIELDS)
def test_the_library_loads_the_same_answers(name, tmp_path):
    adapters = pytest.importorskip("adapters", reason="needs adapters", exc_type=ImportError)
    model = model_of(unfreeze_layer_norms=False, **FIELDS[name])
    model.t5.save_pretrained(tmp_path / "base")
    expected = {task: logits(model, task=task) for task in ("stsb", "cola")}
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    adapters.init(theirs)
    for task in expected:
        assert model.materialize(task).save_adapters(tmp_path / task) is None
        info: dict = {}
        theirs.load_adapter(str(tmp_path / task), loading_info=info)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    for task, value in expected.items():
        theirs.set_active_adapters(task)
        assert_close(logits(theirs), value, rtol=1e-4, atol=1e-5)


def test_trained_layer_norms_go_along(tmp_path):
    adapters = pytest.importorskip("adapters", reason="needs adapters", exc_type=ImportError)
    model = model_of()
    with torch.no_grad():
        model.t5.encoder.block[0].layer[0].layer_norm.weight.mul_(3)
    base = model.materialize("stsb").save_adapters(tmp_path / "stsb", name="other")
    theirs = T5ForConditionalGeneration.from_pretrained(base).eval()
    adapters.init(theirs)
    assert theirs.load_adapter(str(tmp_path / "stsb"), set_active=True) == "other"
    assert_close(logits(theirs), logits(model, task="stsb"), rtol=1e-4, atol=1e-5)


def test_what_is_written(tmp_path):
    model = model_of(add_layer_norm_before_adapter=True, reduction_factor=5)
    base = model.materialize("cola").save_adapters(tmp_path / "cola")
    assert base == tmp_path / "cola" / "t5" and (base / "config.json").is_file()
    said = json.loads((tmp_path / "cola" / "adapter_config.json").read_text())
    assert said["name"] == "cola" and said["model_class"] == "T5ForConditionalGeneration"
    assert 32 // said["config"]["reduction_factor"] == 6 and said["config"]["ln_before"] and said["config"]["ln_after"]
    state = torch.load(tmp_path / "cola" / "pytorch_adapter.bin", weights_only=True)
    assert {key.split(".adapters.cola.")[0] for key in state} == {
        f"{stack}.block.{layer}.layer.{sublayer}"
        for stack, last in (("encoder", 1), ("decoder", 2))
        for layer in range(LAYERS[stack])
        for sublayer in (0, last)
    }
    with pytest.raises(OSError, match="other files in it"):
        model.materialize("cola").save_adapters(tmp_path)
    model.materialize("stsb").save_adapters(tmp_path / "cola", "cola")
    (tmp_path / "cola" / "adapter_model.safetensors").write_text(
        "weights of PEFT, whose adapter_config.json has that name"
    )
    with pytest.raises(OSError, match="than an export writes, adapter_model.safetensors for one"):
        model.materialize("cola").save_adapters(tmp_path / "cola")


def test_an_adapter_that_the_library_saved_is_not_replaced(tmp_path):
    """Its files have the very names of ours."""
    plain = model_of().materialize("cola")
    for name in ("adapter_config.json", "pytorch_adapter.bin"):
        (tmp_path / name).write_text("somebody's")
    with pytest.raises(OSError, match="no exported_by_hyperformer_fast.json of an earlier export: give a new folder"):
        plain.save_adapters(tmp_path)
    assert (tmp_path / "pytorch_adapter.bin").read_text() == "somebody's"


REFUSED = {
    "norms alone": ({"train_adapters_blocks": False}, None, "without a bottleneck"),
    "finetuning": ({"variant": "finetuning"}, None, "has no adapters"),
    "dotted": ({}, "a.b", "pass another one as name="),
    "taken": ({}, "keys", "pass another one as name="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_has_no_form_for_is_refused(name, tmp_path):
    fields, called, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        model_of(**fields).materialize("cola").save_adapters(tmp_path / "x", called)
    assert not list(tmp_path.iterdir())


def test_a_t5_of_another_class_is_refused(tmp_path):
    plain = tiny_model(t5=T5EncoderModel(tiny_t5().config)).materialize("cola")
    with pytest.raises(ValueError, match="not for T5EncoderModel"):
        plain.save_adapters(tmp_path / "x")
