"""An embedding that is learned from a few rows: nothing else moves, and training it in the model makes the same."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.runs import SMALL, rows, small_t5
from support.t5s import TASKS, VARIANTS, batch, tiny_model, tiny_t5
from transformers import ByT5Tokenizer, T5EncoderModel

from hyperformer_fast import HyperFormerConfig, fit_task, get_hyperformer_model, nearest_task, register_task
from hyperformer_fast.data import registry


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32, dropout=0.3)).eval()


def encoded(seed=2, B=4):
    found = batch(B=B, seed=seed)
    lengths = found["attention_mask"].sum(1).tolist()
    return [
        {"input_ids": ids[:length].tolist(), "labels": labels.tolist()}
        for ids, labels, length in zip(found["input_ids"], found["labels"], lengths)
    ]


@torch.no_grad()
def loss(model, task, seed=2):
    return model(**batch(seed=seed), task=task).loss.item()


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_only_the_new_embedding_is_learned(model):
    model.t5.shared.weight.requires_grad_(True)  # whatever the flags are
    model.hypernetworks["encoder"].requires_grad_(False)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    examples = encoded()
    drawn, found = generators(), nearest_task(model, examples)
    fitted = fit_task(model, "new", examples, steps=20, learning_rate=0.2)
    assert fitted.init_from == found[0].task and fitted.seconds > 0 and len(fitted.losses) == 20
    assert fitted.losses[0] == pytest.approx(found[0].loss, rel=1e-4)
    assert generators() == drawn
    assert loss(model, "new") < fitted.losses[0] - 0.05
    now = dict(model.named_parameters())
    for name, (parameter, value, trained) in before.items():
        assert now[name] is parameter and torch.equal(parameter, value) and parameter.requires_grad == trained, name
        assert parameter.grad is None
    assert now.keys() - before.keys() == {"task_embeddings.task_to_embeddings.new"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "hyperformer"},
        {"variant": "hyperformer", "train_task_embeddings": True, "conditional_layer_norm": False},
        {"variant": "hyperformer-shared", "normalize_embeddings": True},
        {"train_adapters_blocks": False},
        {"unfreeze_lm_head": True},
    ],
    ids=str,
)
def test_it_is_what_training_in_the_model_makes(changes):
    model, twin = (tiny_model(t5=tiny_t5(), **changes).eval() for _ in range(2))
    fit_task(model, "new", encoded(), steps=3, init_from="cola", learning_rate=0.1)
    twin.add_task("new", "cola")
    twin.train_only_task_embeddings()
    optimizer = torch.optim.Adam([twin.task_embeddings.task_to_embeddings["new"]])
    for rate in (0.1, 0.1 * 2 / 3, 0.1 / 3):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        twin(**batch(), task="new").loss.backward()
        optimizer.step()
    ours, theirs = (each.task_embeddings.task_to_embeddings["new"] for each in (model, twin))
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_nearest_task_is_the_one_with_the_least_loss(variant):
    model = tiny_model(variant, tiny_t5(dtype=torch.float32)).eval()
    expected = {task: loss(model, task) for task in TASKS}
    for size in (1, 5, 32):
        found = nearest_task(model, encoded(), batch_size=size)
        assert dict(found) == pytest.approx(expected, rel=1e-4)
        assert [each.task for each in found] == sorted(TASKS, key=expected.__getitem__)
    assert [each.task for each in nearest_task(model, encoded(), tasks=["cola"])] == ["cola"]


def test_rows_beyond_a_batch_are_taken_in_turns(model):
    options = {"steps": 12, "batch_size": 2, "init_from": "mnli"}
    fitted = fit_task(model, "new", encoded(B=5), **options, seed=1)
    again = fit_task(model, "again", encoded(B=5), **options, seed=1)
    other = fit_task(model, "other", encoded(B=5), **options, seed=2)
    assert fitted.losses == again.losses != other.losses


def test_a_task_that_is_drawn(model):
    examples = encoded()
    drawn = generators()
    fitted = fit_task(model, "new", examples, steps=2, init_from=None, seed=5)
    again = fit_task(model, "again", examples, steps=2, init_from=None, seed=5)
    assert fitted.losses == again.losses and fitted.init_from is None and generators() == drawn
    assert fit_task(model, "mean", encoded(), steps=1, init_from=["mnli", "cola"]).init_from == ["mnli", "cola"]


def test_modes_are_restored(model):
    model.train()
    model.t5.decoder.eval()
    modes = [module.training for module in model.modules()]
    fitted = fit_task(model, "new", encoded(), steps=2, init_from="mnli")
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert fit_task(model, "again", encoded(), steps=2, init_from="mnli").losses == fitted.losses


def test_it_works_wherever_it_is_called(model):
    fitted = fit_task(model, "new", encoded(), steps=2, init_from="mnli")
    model.requires_grad_(False)
    with torch.inference_mode():
        assert fit_task(model, "again", encoded(), steps=2, init_from="mnli").losses == fitted.losses
    embedding = model.task_embeddings.task_to_embeddings["again"]
    assert not embedding.requires_grad and not embedding.is_inference()
    half = tiny_model(t5=tiny_t5(dtype=torch.bfloat16)).eval().to(torch.bfloat16)
    half.fit_task("new", encoded(), steps=2)
    assert half.task_embeddings.task_to_embeddings["new"].dtype == torch.bfloat16


def test_an_error_leaves_the_model_as_it_was(model):
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"the loss is nan at step 2: lower learning_rate=3e\+37"):
        fit_task(model, "new", encoded(), learning_rate=3e37)
    for options, message in (
        ({"name": "cola"}, "'cola' exists already"),
        ({"steps": 0}, "steps must be a whole number from 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number from 1, got 2.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite, got nan"),
        ({"init_from": "rte"}, "unknown task 'rte'"),
        ({"init_from": []}, "init_from must name at least one task"),
        ({"rows": []}, "there are no rows"),
        ({"rows": [{"input_ids": [3, 1], "labels": [-100]}]}, "row 1 must have input_ids and labels, each with"),
        ({"rows": [{"text": "a", "label": 0}]}, "need the T5's tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_task(**{"model": model, "name": "new", "rows": encoded(), **options})
    assert dict(model.named_parameters()).keys() == before.keys() and model.hyperformer_config.tasks == TASKS


def test_what_has_no_embedding_or_writes_no_text(model):
    with pytest.raises(ValueError, match="variant 'adapters' does not have"):
        fit_task(tiny_model("adapters"), "new", encoded())
    encoder = get_hyperformer_model(T5EncoderModel(tiny_t5().config), model.hyperformer_config)
    for call in (lambda: fit_task(encoder, "new", encoded()), lambda: nearest_task(encoder, encoded())):
        with pytest.raises(TypeError, match="T5EncoderModel has no head that writes text"):
            call()


def test_rows_of_texts_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    torch.manual_seed(0)
    model = get_hyperformer_model(small_t5(), HyperFormerConfig(tasks=["a", "b"], **SMALL)).eval()
    tokenizer, examples = ByT5Tokenizer(), rows("cola", 4)
    path = tmp_path / "train.csv"
    path.write_text("sentence,label\n" + "".join(f"{row['sentence']},{row['label']}\n" for row in examples))
    fields = {"source": "sentence: {sentence}", "labels": ["0", "1"]}
    register_task(name="mine", **fields)
    found = [
        fit_task(model, str(i), given, tokenizer=tokenizer, task=task, steps=1, init_from="a").losses
        for i, (given, task) in enumerate(
            [
                (examples, "cola"),
                (Dataset.from_list(examples), "cola"),
                (path, "cola"),
                (examples, fields),
                (examples, "mine"),
                (examples, registry.find_task("cola")),
                (examples, None),
            ]
        )
    ]
    assert all(each == found[0] for each in found)
    assert nearest_task(model, examples, tokenizer=tokenizer)[0].loss < 20
    (tmp_path / "rows.jsonl").write_text(json.dumps({"sentence": "x", "label": 7}) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:1: 'label' is out of range"):
        fit_task(model, "new", tmp_path / "rows.jsonl", tokenizer=tokenizer, task="cola")


def test_a_mask_and_padding_that_rows_bring(model):
    padded = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for ids, mask, labels in zip(*(batch()[name].tolist() for name in ("input_ids", "attention_mask", "labels")))
    ]
    assert dict(nearest_task(model, padded)) == pytest.approx(dict(nearest_task(model, encoded())), rel=1e-5)
