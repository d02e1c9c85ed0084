"""What of a T5 keeps its own forward where the rest is fused, and says why."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fused import classes, reasons, tiny
from support.t5s import batch, tiny_config, tiny_t5
from torch import nn
from transformers import LongT5Config, LongT5ForConditionalGeneration

from hyperformer_fast import explain_fusion, fuse_t5, get_hyperformer_model
from hyperformer_fast.fusion import PIECES, attention, pieces_of, selftest


def test_what_others_have_replaced_keeps_its_own_forward():
    t5 = tiny()
    block = t5.encoder.block[0]
    norm = block.layer[0].layer_norm
    norm.forward = lambda x: x * 0

    class Mine(type(block.layer[1].DenseReluDense)):
        def forward(self, hidden_states):
            return hidden_states * 0

    block.layer[1].DenseReluDense.__class__ = Mine
    t5.encoder.block[1].layer[1].DenseReluDense.act = nn.Tanh()
    t5.encoder.block[2].layer[1].dropout = nn.AlphaDropout(0.0)
    want = t5(**batch()).logits
    fuse_t5(t5)
    torch.testing.assert_close(t5(**batch()).logits, want)
    said = reasons(t5)
    assert "forward was replaced" in said["encoder.block.0.layer.0.layer_norm", "norm"]
    assert "Mine is not a class of transformers" in said["encoder.block.0.layer.1.DenseReluDense", "feed_forward"]
    assert "activation, Tanh" in said["encoder.block.1.layer.1.DenseReluDense", "feed_forward"]
    assert "its dropout is not torch's" in said["encoder.block.2.layer.1", "dropout"]
    assert "not in encoder.block.0.layer.0.layer_norm: its forward" in str(explain_fusion(t5))
    with pytest.raises(ValueError, match=r"piece '\w+' cannot be fused in encoder"):
        fuse_t5(t5, True)


def test_a_patched_class_keeps_its_forward(monkeypatch):
    t5 = tiny()
    cls = type(t5.encoder.final_layer_norm)
    monkeypatch.setattr(cls, "forward", lambda self, x: x * 3)
    want = t5(**batch()).logits
    fuse_t5(t5)
    assert "the forward of T5LayerNorm was replaced" in reasons(t5)["encoder.final_layer_norm", "norm"]
    torch.testing.assert_close(t5(**batch()).logits, want)


def test_another_transformers_is_noticed(monkeypatch):
    """A sublayer that does not compute what the fused forward was written for is left alone."""
    cls = type(tiny().encoder.block[0].layer[1])

    def forward(self, hidden_states):
        return 0.5 * hidden_states + self.dropout(self.DenseReluDense(self.layer_norm(hidden_states)))

    forward.__module__, forward.__qualname__ = cls.__module__, cls.forward.__qualname__
    monkeypatch.setattr(cls, "forward", forward)
    selftest._why_not.cache_clear()
    try:
        assert "computes something else" in reasons(tiny())["encoder.block.0.layer.1", "dropout"]
    finally:
        monkeypatch.undo()
        selftest._why_not.cache_clear()


def test_long_t5_keeps_its_own():
    config = LongT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, local_radius=3)
    torch.manual_seed(0)
    t5 = LongT5ForConditionalGeneration(config).eval()
    before = classes(t5)
    fuse_t5(t5, {"norm", "dropout", "feed_forward"})
    assert classes(t5) == before
    assert all("is not a class" in reason for (_, piece), reason in reasons(t5).items() if piece in ("norm", "dropout"))


def test_float64_is_left_to_transformers():
    plain = tiny_t5()
    fused = fuse_t5(copy.deepcopy(plain))
    assert torch.equal(fused(**batch()).logits, plain(**batch()).logits)
    assert reasons(fused)["encoder.final_layer_norm", "norm"] == "transformers computes float64"
    assert reasons(fused.float())["encoder.final_layer_norm", "norm"] == ""


def test_what_fuse_may_be():
    t5 = tiny()
    with pytest.raises(ValueError, match="fuse has an unknown piece 'nrom': the pieces are .*did you mean 'norm'"):
        get_hyperformer_model(t5, tiny_config(), fuse={"nrom"})
    with pytest.raises(TypeError, match="pieces must be"):
        fuse_t5(t5, 3)
    assert pieces_of(fuse_t5(t5, "all")) == frozenset(PIECES)
    assert pieces_of(fuse_t5(t5, "none")) == frozenset()
    assert all(
        not r.fused and r.reason == "it was not asked for"
        for r in explain_fusion(t5)
        if r.piece not in ("loss", "products") and (r.piece != "attention" or attention.is_supported())
    )
    if attention.is_supported():
        fuse_t5(t5, True)
    else:
        with pytest.raises(ValueError, match="transformers 5 has"):
            fuse_t5(t5, True)
        assert pieces_of(t5) == frozenset()
        assert type(t5.encoder.final_layer_norm).__name__ == "T5LayerNorm"
