"""One task as a plain T5: the same answers, from a process that has nothing of this library."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from support.t5s import VARIANTS, batch, tiny_model, tiny_t5, train
from torch.testing import assert_close

import hyperformer_fast
from hyperformer_fast.export.plain_t5 import Adapter
from hyperformer_fast.fusion.classes import original_class

FIELDS = {
    "pre-norm": {"add_layer_norm_before_adapter": True, "non_linearity": "gelu"},
    "no norms": {"add_layer_norm_after_adapter": False, "non_linearity": "relu"},
    "norms alone": {"train_adapters_blocks": False},
    "head": {"unfreeze_lm_head": True, "non_linearity": "silu"},
}


def answers(model, task):
    with torch.no_grad():
        return model(**batch(), task=task).logits


def hooks_of(module):
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def check(model, task="stsb"):
    model.eval()
    plain = model.materialize(task).t5
    with torch.no_grad():
        got = plain(**batch()).logits
    assert_close(got, answers(model, task))
    assert not torch.allclose(got, answers(model, "cola"))
    return plain


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_same_answers(variant):
    plain = check(tiny_model(variant))
    assert not plain.training and not any(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("name", FIELDS)
def test_every_kind_of_adapter_gives_the_same_answers(name):
    model = tiny_model(t5=tiny_t5(gated=True, tied=name != "head"), **FIELDS[name])
    train(model.train(), steps=1)
    check(model)


def test_finetuning_gives_its_t5():
    model = tiny_model("finetuning").eval()
    plain = model.materialize("stsb")
    with torch.no_grad():
        assert_close(plain.t5(**batch()).logits, answers(model, "stsb"), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="has no adapters"):
        plain.save("anywhere")


def test_the_model_keeps_its_own():
    model = tiny_model().eval()
    before = answers(model, "mnli")
    plain = model.materialize("stsb").t5
    assert all(original_class(type(module)) is None for module in plain.modules())
    hooks = [hook for module in plain.modules() for hook in hooks_of(module)]
    assert {hook.__module__ for hook in hooks} == {"hyperformer_fast.export.plain_t5"}
    assert not any("hyperformer" in str(part.config._attn_implementation) for part in (plain, plain.encoder))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert_close(answers(model, "mnli"), before, rtol=0, atol=0)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="rte"):
        tiny_model().materialize("rte")


def test_half_precision_keeps_the_adapters_precision():
    model = tiny_model(t5=tiny_t5(dtype=torch.bfloat16)).eval()
    plain = model.materialize("stsb").t5
    assert plain.encoder.block[0].layer[0].SelfAttention.adapter.down.weight.dtype == torch.float32
    with torch.no_grad():
        assert_close(plain(**batch()).logits, answers(model, "stsb"), rtol=0.05, atol=0.05)


def test_what_overflowed_in_float16_does_not_become_nan():
    adapter = Adapter(d=8, b=2, activation="relu", norm_before=False, norm_after=True)
    x = torch.ones(2, 8, dtype=torch.float16)
    x[0, 0] = torch.inf
    assert adapter(x).isfinite().all()


LOADER = """
import builtins, sys, json
real = builtins.__import__
def importing(name, *args, **kwargs):
    assert not name.startswith("hyperformer_fast"), name
    return real(name, *args, **kwargs)
builtins.__import__ = importing
import torch
sys.path.insert(0, sys.argv[1])
from plain_t5 import load
t5 = load(sys.argv[1])
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    logits = t5(**inputs).logits
    text = t5.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=4)
assert "hyperformer_fast" not in sys.modules
torch.save({"logits": logits, "text": text, "tied": t5.lm_head.weight is t5.shared.weight}, sys.argv[3])
"""


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_one_runs_without_the_library(tmp_path, tied):
    model = tiny_model(t5=tiny_t5(gated=not tied, tied=tied)).eval()
    model.generation_config.num_beams = 2
    folder = tmp_path / "plain"
    model.materialize("cola").save(folder)
    if not tied:  # as transformers 5 writes it, for the one that is installed
        fields = json.loads((folder / "config.json").read_text())
        fields |= {"scale_decoder_outputs": False, "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(fields))
    torch.save(batch(), tmp_path / "inputs.pt")
    given = [str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "found.pt")]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *given], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert_close(found["logits"], answers(model, "cola"))
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    assert torch.equal(found["text"], model.generate(**inputs, task="cola", max_new_tokens=4))
    assert found["tied"] == tied


def test_saving_replaces_its_own_and_nothing_else(tmp_path):
    plain = tiny_model().eval().materialize("cola")
    plain.save(tmp_path / "plain")
    plain.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "adapters.json").read_text())["task"] == "cola"
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match=r"than an export writes, tokenizer\.json for one"):
        plain.save(tmp_path / "plain")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(OSError, match="other files in it"):
        plain.save(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("where", ["in it", "around it"])
def test_what_could_not_be_loaded_again_is_refused(tmp_path, where):
    plain = tiny_model().eval().materialize("cola")
    if where == "in it":
        plain.t5.encoder.block[0].layer[0].SelfAttention.q.lora = torch.nn.Linear(2, 2)
        message = "q.lora.bias is no parameter of a T5ForConditionalGeneration"
    else:
        plain.t5.__class__ = type("Wrapped", (type(plain.t5),), {"__module__": "peft"})
        message = "this T5 is a Wrapped"
    for save in (plain.save, plain.save_adapters):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_file_for_users_imports_nothing_of_the_library():
    source = (hyperformer_fast.__path__[0]) + "/export/plain_t5.py"
    with open(source, encoding="utf-8") as file:
        assert "from ." not in file.read()
