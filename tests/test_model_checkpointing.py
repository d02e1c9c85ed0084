"""Gradient checkpointing: gradients equal to the run without it, each recomputed block with the weights of its own
forward."""

from __future__ import annotations

import copy

import pytest
import torch
from support.t5s import VARIANTS, batch, tiny_model, tiny_t5

MIXED = ["cola", "mnli", "mnli", "stsb"]

pytestmark = pytest.mark.filterwarnings("ignore:.*use_cache:UserWarning")


def gradients(model, *losses):
    model.zero_grad()
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got.keys() == want.keys() and len(want) > 10
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def counted(model):
    """How often the first block of the encoder ran its feed-forward."""
    runs = []
    model.t5.encoder.block[0].layer[-1].DenseReluDense.wi.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("task", ["mnli", MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_without_it(variant, task):
    model = tiny_model(variant).train()
    want = gradients(model, model(**batch(), task=task).loss)
    runs = counted(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing
    got = gradients(model, model(**batch(), task=task).loss)
    assert len(runs) == 2, "nothing was recomputed, so the test shows nothing"
    assert_same(got, want)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert_same(gradients(model, model(**batch(), task=task).loss), want)
    assert len(runs) == 3


def test_with_dropout_the_recomputation_draws_the_same_masks():
    model = tiny_model(t5=tiny_t5(dropout=0.2)).train()
    torch.manual_seed(5)
    want = gradients(model, model(**batch(), task=MIXED).loss)
    model.gradient_checkpointing_enable()
    torch.manual_seed(5)
    assert_same(gradients(model, model(**batch(), task=MIXED).loss), want)


def test_two_forwards_before_one_backward():
    model = tiny_model().train()
    calls = [{**batch(seed=1), "task": "mnli"}, {**batch(B=3, seed=2), "task": ["cola", "stsb", "cola"]}]
    want = gradients(model, *(model(**call).loss for call in calls))
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, *(model(**call).loss for call in calls)), want)


def test_weights_changed_between_forward_and_backward_do_not_reach_the_recomputation():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    want = gradients(model, model(**batch(), task="mnli").loss)
    loss = model(**batch(), task="mnli").loss
    with torch.no_grad():
        model(**batch(), task="cola")
        model.eval().generate(batch()["input_ids"], task="stsb", max_new_tokens=2)
    model.train()
    assert_same(gradients(model, loss), want)


def test_backward_twice():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    loss = model(**batch(), task="mnli").loss
    model.zero_grad()
    loss.backward(retain_graph=True)
    want = {name: 2 * p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, want)


def test_a_backward_inside_another_forward_leaves_its_weights_in_place(monkeypatch):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    expected = model(**batch(), task="cola").logits
    loss = model(**batch(), task="mnli").loss
    last = model.t5.decoder.final_layer_norm
    first = model.t5.decoder.block[0]
    handle = first.register_forward_pre_hook(
        lambda *_: loss.backward() if handle.id in first._forward_pre_hooks else None
    )
    ran = []

    def once(*_):
        handle.remove()
        ran.append(1)
        loss.backward()

    handle.remove()
    handle = first.register_forward_pre_hook(once)
    assert torch.equal(model(**batch(), task="cola").logits, expected)
    assert ran and last.weight.grad is not None


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_reentrant_is_an_error_that_says_so(enable):
    model = tiny_model()
    with pytest.raises(ValueError, match="use_reentrant=True cannot work.*set it to False"):
        getattr(model, enable)({"use_reentrant": True})
    with pytest.raises(ValueError, match="context_fn is taken"):
        getattr(model, enable)({"context_fn": lambda: None})
    assert not model.is_gradient_checkpointing
    getattr(model, enable)({"use_reentrant": False, "preserve_rng_state": False})
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_switched_on_at_the_t5_is_an_error(reentrant):
    t5 = tiny_t5()
    t5.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match="gradient checkpointing is on in this T5"):
        tiny_model(t5=t5)
    model = tiny_model().train()
    model.t5.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.t5.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"use HyperFormerModel.gradient_checkpointing_enable"):
        model(**batch(), task="mnli").loss.backward()


def test_input_require_grads_is_delegated_and_undone():
    model, ids = tiny_model(unfreeze_layer_norms=False), batch()["input_ids"]
    embeddings = model.get_input_embeddings()
    model.gradient_checkpointing_enable()
    assert not embeddings(ids).requires_grad, "transformers' hook is of no use here, and costs a backward"
    model.enable_input_require_grads()
    assert model.t5.encoder.embed_tokens(ids).requires_grad
    model.gradient_checkpointing_disable()
    assert not model.t5.encoder.embed_tokens(ids).requires_grad
    model.disable_input_require_grads()


def test_a_deep_copy_recomputes_with_its_own_weights():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    want = gradients(model, model(**batch(), task="mnli").loss)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.hypernetworks.parameters():
            p.zero_()
    assert_same(gradients(twin, twin(**batch(), task="mnli").loss), want)
