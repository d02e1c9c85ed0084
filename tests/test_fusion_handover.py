"""The norm that a sublayer hands on, and what else a fused T5 must not keep from those who look inside it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fused import count_norms, pair, tiny
from support.t5s import batch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import T5ForTokenClassification

from hyperformer_fast import fuse_t5, unfuse_t5
from hyperformer_fast.fusion import attention
from hyperformer_fast.fusion.handover import hand_on, take
from hyperformer_fast.ops import products


@pytest.fixture
def norms(monkeypatch):
    return count_norms(monkeypatch)


def test_a_norm_is_taken_once_and_only_while_it_is_one():
    weight, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    normed = torch.ones(2, 4)

    def handed():
        out = torch.ones(2, 4)
        hand_on(out, normed, weight)
        return out

    out = handed()
    assert take(out, weight) is normed and take(out, weight) is None
    assert take(handed(), other) is None
    assert take(handed() * 1, weight) is None
    out = handed()
    out[0] = 2.0
    assert take(out, weight) is None
    out = handed()
    with torch.no_grad():
        weight.mul_(2.0)
    assert take(out, weight) is None


def test_a_norm_without_a_graph_is_not_taken_where_gradients_are_wanted():
    x, weight = torch.ones(2, 4, requires_grad=True), nn.Parameter(torch.ones(4))

    def handed(x):
        out = x * 1
        hand_on(out, x * weight, weight)
        return out

    with torch.no_grad():
        outs = [handed(x) for _ in range(2)]
    assert take(outs[0], weight) is None
    with torch.no_grad():
        assert take(outs[1].requires_grad_(), weight) is None
        assert take(handed(x), weight) is not None
    leaf = handed(x).detach_().requires_grad_()
    assert take(leaf, weight) is None
    assert take(handed(x), weight) is not None


def gradients_of_hidden_states(t5):
    out = t5(**batch(), output_hidden_states=True)
    return torch.autograd.grad(out.loss, [*out.encoder_hidden_states[1:3], *out.decoder_hidden_states[1:2]])


def test_recorded_hidden_states_have_their_whole_gradients():
    plain, fused = pair()
    for got, want in zip(gradients_of_hidden_states(fused), gradients_of_hidden_states(plain), strict=True):
        torch.testing.assert_close(got, want)


def test_a_hook_that_sees_the_sum_as_an_input_gets_its_whole_gradient():
    def gradient(t5):
        seen = []
        for module in (t5.encoder.block[1], t5.encoder.block[0].layer[1].layer_norm):
            module.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        return torch.autograd.grad(t5(**batch()).loss, seen)

    plain, fused = pair()
    for got, want in zip(gradient(fused), gradient(plain), strict=True):
        torch.testing.assert_close(got, want)


def test_after_hidden_states_were_recorded_norms_are_handed_on_again(norms):
    if not attention.is_supported():
        pytest.skip("this transformers records hidden states where no hook sees it")
    fused = fuse_t5(tiny())
    fused(**batch())
    before = len(norms)
    gradients_of_hidden_states(fused)
    norms.clear()
    fused(**batch())
    assert len(norms) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_sublayers_that_somebody_checkpoints_keep_their_gradients(reentrant):
    def gradients(t5, run):
        t5(**batch())  # links the sublayers
        t5.zero_grad()
        encoder = t5.encoder
        hidden = encoder.embed_tokens(batch()["input_ids"])
        for block in encoder.block:
            hidden = run(block.layer[1], hidden)
        encoder.final_layer_norm(hidden).sin().sum().backward()
        return {name: p.grad for name, p in t5.named_parameters() if p.grad is not None}

    plain, fused = pair()
    want = gradients(plain, lambda part, x: part(x))
    got = gradients(fused, lambda part, x: checkpoint(part, x, use_reentrant=reentrant))
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_fused_linear_is_not_passed_over_by_quantisation(monkeypatch):
    monkeypatch.setattr(products, "_found", "")
    t5 = fuse_t5(tiny())
    with pytest.raises(RuntimeError, match="call unfuse_t5"):
        torch.ao.quantization.quantize_dynamic(t5, {nn.Linear}, torch.qint8)
    quantised = torch.ao.quantization.quantize_dynamic(unfuse_t5(t5), {nn.Linear}, torch.qint8)
    assert type(quantised.encoder.block[0].layer[1].DenseReluDense.wo) is not nn.Linear


def test_a_head_whose_forward_takes_no_cache_gets_none():
    torch.manual_seed(0)
    plain = T5ForTokenClassification(tiny().config).eval()
    fused = fuse_t5(copy.deepcopy(plain))
    ids = batch()["input_ids"]
    given = {"input_ids": ids, "labels": torch.zeros_like(ids)}
    torch.testing.assert_close(fused(**given).loss, plain(**given).loss)
