"""A fused T5 computes what the T5 computes, with gradients: without dropout to rounding, with dropout for the masks
that the definition of the bits gives."""

from __future__ import annotations

import copy

import pytest
import torch
from support.t5s import VARIANTS, batch, tiny_config, tiny_t5
from torch import nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    masking_utils,
    modeling_utils,
)

from hyperformer_fast import fuse_t5, get_hyperformer_model, philox, unfuse_t5
from hyperformer_fast.fusion import attention


def tiny(family="t5", dropout=0.0, dtype=torch.float32, **changes):
    """A tiny T5 of a family: t5, gated (T5 v1.1, flan-T5), mt5, umt5."""
    t5 = tiny_t5(gated=family != "t5", tied=family == "t5", dropout=dropout, dtype=dtype, **changes)
    if family in ("mt5", "umt5"):
        config, model = {
            "mt5": (MT5Config, MT5ForConditionalGeneration),
            "umt5": (UMT5Config, UMT5ForConditionalGeneration),
        }[family]
        fields = (
            "vocab_size d_model d_kv d_ff num_heads num_layers num_decoder_layers dropout_rate "
            "feed_forward_proj pad_token_id eos_token_id decoder_start_token_id"
        )
        torch.manual_seed(0)
        t5 = model(config(**{name: getattr(t5.config, name) for name in fields.split()})).to(dtype).eval()
    if not attention.is_supported():
        for module in t5.modules():
            if hasattr(module, "relative_attention_num_buckets"):
                module.dropout = 0.0  # its masks are torch's
    with torch.no_grad():
        for name, parameter in t5.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.uniform_(0.5, 1.5)  # a norm without its weight must be seen
    return t5


def step(t5, seed=0, **given):
    """The logits, the loss and the gradient of every parameter."""
    t5.zero_grad()
    inputs = batch()
    torch.manual_seed(seed)
    out = t5(**inputs, **given)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in t5.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()[None], **gradients}


def assert_same(fused, plain, exact):
    """Hold what the fused T5 loses to what the T5 in the same dtype loses. A number has some sixty roundings behind it
    in both, so that single rows cannot be compared."""
    assert fused.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        eps = torch.finfo(fused[name].dtype).eps
        got, allowed = (fused[name].double() - truth).abs(), (plain[name].double() - truth).abs()
        assert got.norm() <= 2 * allowed.norm() + 4 * eps * truth.norm(), name
        assert got.max() <= 8 * allowed.max() + 8 * eps * truth.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["t5", "gated", "mt5", "umt5"])
def test_a_fused_t5_without_dropout_is_the_t5(family, dtype):
    plain = tiny(family, dtype=dtype).train()
    exact = copy.deepcopy(plain).double()
    fused = fuse_t5(copy.deepcopy(plain))
    assert_same(step(fused), step(plain), step(exact))
    assert torch.equal(step(unfuse_t5(fused))["logits"], step(plain)["logits"])


class Counted(nn.Module):
    """Dropout by the definition of the bits, in plain PyTorch."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return philox.apply(x, philox.draw(self.p, x)) if self.training else x


def stated(t5):
    """A copy of an unfused T5 whose dropouts are ``Counted``."""
    twin = copy.deepcopy(t5)
    for name, module in list(twin.named_modules()):
        if type(module) is nn.Dropout:
            twin.set_submodule(name, Counted(module.p))
    if attention.is_supported():
        twin.encoder.config._attn_implementation = twin.decoder.config._attn_implementation = "stated"
    return twin


def stated_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, position_bias=None, **_):
    scores = query @ key.transpose(2, 3) * scaling + position_bias
    if attention_mask is not None:
        scores = torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if dropout:
        weights = philox.apply(weights, philox.draw(dropout, weights))
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def with_stated_attention():
    if not attention.is_supported():
        return
    modeling_utils.AttentionInterface.register("stated", stated_attention)
    masks = masking_utils.AttentionMaskInterface
    masks.register("stated", lambda *a, **k: masking_utils.sdpa_mask(*a, **{**k, "allow_is_causal_skip": False}))


@pytest.mark.usefixtures("with_stated_attention")
@pytest.mark.parametrize("family", ["t5", "gated", "umt5"])
def test_dropout_is_where_the_t5_has_it_forward_and_backward(family):
    plain = tiny(family, dropout=0.2).train()
    fused = fuse_t5(copy.deepcopy(plain), "auto")
    twin = stated(plain)
    exact = copy.deepcopy(twin).double()
    assert_same(step(fused), step(twin), step(exact))
    assert not torch.equal(step(fused, seed=1)["logits"], step(fused, seed=0)["logits"])


@pytest.mark.usefixtures("with_stated_attention")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("variant", [*VARIANTS, "finetuning"])
def test_adapters_in_a_fused_t5(variant, dropout):
    """The hooks of an unfused T5 adapt what comes from the same masks."""
    models = []
    for fuse, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        t5 = tiny(dropout=dropout, dtype=dtype)
        if not fuse and dropout:
            t5 = stated(t5)
        model = get_hyperformer_model(t5, tiny_config(variant), fuse="auto" if fuse else False)
        torch.manual_seed(1)
        with torch.no_grad():
            for module in (model.task_embeddings, model.hypernetworks):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.4)
        models.append(model.train())
    fused, plain, exact = (step(model, task=["mnli", "stsb", "cola", "mnli"]) for model in models)
    assert_same(fused, plain, exact)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_block_has_the_masks_of_its_forward(use_reentrant):
    plain = fuse_t5(tiny(dropout=0.2).train())
    again = copy.deepcopy(plain)
    enable = getattr(again, "activation_checkpointing_enable", None) or again.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    got, want = step(again), step(plain)
    assert torch.equal(got["logits"], want["logits"])
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_compiled_fused_t5_has_the_masks_of_the_eager_one():
    t5 = fuse_t5(tiny(dropout=0.2, num_layers=1, num_decoder_layers=1).train())
    want = step(t5)
    torch._dynamo.reset()
    compiled = torch.compile(t5, backend="aot_eager", fullgraph=True)
    inputs = batch()
    torch.manual_seed(0)
    t5.zero_grad()
    out = compiled(**inputs)
    torch.testing.assert_close(out.logits, want["logits"])
    out.loss.backward()
    for name, parameter in t5.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5, msg=name)
