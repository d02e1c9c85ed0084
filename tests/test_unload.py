"""unload() gives the T5 back, or refuses and leaves all as it was; and no forward passes for one with adapters that has
none."""

from __future__ import annotations

import pytest
import torch
from support.t5s import TASKS, bare_copy, batch, bits, tiny_config, tiny_model, tiny_t5, train
from torch import nn

from hyperformer_fast import get_hyperformer_model


@pytest.mark.parametrize("tied", [True, False])
def test_unload_gives_the_same_t5_back(tied):
    t5 = tiny_t5(tied=tied, dropout=0.1, dtype=torch.float32)
    t5.encoder.train()
    t5.shared.weight.requires_grad_(False)
    before, keys = bits(t5), list(t5.state_dict())
    flags = {name: p.requires_grad for name, p in t5.named_parameters()}
    modes = [module.training for module in t5.modules()]
    ids = batch()["input_ids"]
    t5.eval()
    text = t5.generate(ids, num_beams=2, max_new_tokens=6)
    t5.encoder.train()

    model = tiny_model(t5=t5, unfreeze_lm_head=True)
    assert list(t5.state_dict()) == keys
    model.train()
    model.gradient_checkpointing_enable()
    train(model)
    assert not torch.equal(t5.encoder.final_layer_norm.weight, before["encoder.final_layer_norm.weight"])
    assert model.unload() is t5

    assert list(t5.state_dict()) == keys
    assert {name: p.requires_grad for name, p in t5.named_parameters()} == flags
    assert [module.training for module in t5.modules()] == modes
    assert all(torch.equal(p, before[name]) for name, p in t5.named_parameters())
    assert all(p.grad is None for p in t5.parameters())
    assert not any(module._forward_hooks for module in t5.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in t5.modules())
    assert torch.equal(t5.eval().generate(ids, num_beams=2, max_new_tokens=6), text)
    with pytest.raises(RuntimeError, match="unloaded"):
        model(**batch(), task="mnli")
    with pytest.raises(RuntimeError, match="unloaded"):
        model.unload()
    get_hyperformer_model(t5, tiny_config())


@pytest.mark.filterwarnings("ignore:.*unfrozen by hand")
def test_a_parameter_unfrozen_by_hand_is_named(tmp_path):
    model = tiny_model()
    model.t5.encoder.block[0].layer[0].SelfAttention.q.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"encoder.block.0.layer.0.SelfAttention.q.weight .* would lack it"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="unfrozen by hand"):
        model.unload()


class LowRank(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False, dtype=base_layer.weight.dtype)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False, dtype=base_layer.weight.dtype)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_what_others_have_added_stays():
    t5 = tiny_t5()
    model = tiny_model(t5=t5)
    attention = t5.encoder.block[0].layer[0].SelfAttention
    attention.q = LowRank(attention.q)
    t5.extra = nn.Parameter(torch.ones(2))
    attention.q.base_layer.weight.requires_grad_(False)
    attention.q.lora_A.eval()
    train(model)
    twin = bare_copy(t5)
    model.unload()
    assert attention.q.base_layer.weight.requires_grad, "as it was before the adapters"
    assert attention.q.lora_A.weight.requires_grad and t5.extra.requires_grad and not attention.q.lora_A.training
    norm = t5.encoder.final_layer_norm.weight
    assert torch.equal(norm, torch.ones_like(norm)) and not torch.equal(twin.encoder.final_layer_norm.weight, norm)
    assert torch.equal(attention.q.lora_B.weight, twin.encoder.block[0].layer[0].SelfAttention.q.lora_B.weight)
    t5(**batch()).loss.backward()


def test_lora_of_peft_stays():
    peft = pytest.importorskip("peft")
    t5 = tiny_t5()
    model = tiny_model(t5=t5)
    peft.get_peft_model(t5, peft.LoraConfig(target_modules=["q", "v"]))
    model(**batch(), task="mnli").loss.backward()
    assert model.unload() is t5
    assert any("lora_A" in name for name, _ in t5.named_parameters())
    t5(**batch())


@pytest.mark.filterwarnings("ignore:.*new rows")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 60])
def test_resized_embeddings_are_given_back(tied, size):
    t5 = tiny_t5(tied=tied)
    before = bits(t5)
    model = tiny_model(t5=t5, unfreeze_lm_head=True)
    head = "shared.weight" if tied else "lm_head.weight"
    model.resize_token_embeddings(size)
    drawn = dict(t5.named_parameters())[head].detach().clone()
    inputs = {name: tensor.clamp(max=59) for name, tensor in batch().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs, task="mnli").loss.backward()
    optimizer.step()
    assert not torch.equal(dict(t5.named_parameters())[head], drawn)
    model.unload()
    weight = dict(t5.named_parameters())[head]
    rows = min(size, 64)
    assert weight.shape == (size, 32) and torch.equal(weight, drawn) and torch.equal(weight[:rows], before[head][:rows])


def test_new_rows_that_nothing_trains_are_named():
    model = tiny_model()
    with pytest.warns(UserWarning, match="the 6 new rows of the embeddings stay as they were drawn"):
        model.resize_token_embeddings(70)
    with pytest.warns(UserWarning, match="the 2 new rows"):
        model.resize_token_embeddings(72)


def still_works(model, expected):
    assert torch.equal(model(**batch(), task="mnli").logits[..., :64], expected)


def test_embeddings_resized_behind_the_models_back():
    model = tiny_model()
    model.t5.resize_token_embeddings(70)
    assert model.unload().shared.weight.shape == (70, 32), "frozen, they are none of the model's business"

    model = tiny_model(unfreeze_lm_head=True)
    expected = model(**batch(), task="mnli").logits
    model.t5.resize_token_embeddings(70)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"shared.weight.*\[70, 32\].*was \[64, 32\].*resize_token_embeddings"):
            model.unload()
        still_works(model, expected)
    model.t5.resize_token_embeddings(64)
    model.unload()(**batch())


def test_an_unload_that_fails_half_way_changes_nothing(monkeypatch):
    model = tiny_model()
    train(model)
    before, expected = bits(model), model(**batch(), task="mnli").logits
    last = model.t5.decoder.final_layer_norm.weight
    plain = torch.Tensor.copy_

    def copy(self, other):
        if self is last and not torch.equal(other, before["t5.decoder.final_layer_norm.weight"]):
            raise torch.OutOfMemoryError("no memory")
        return plain(self, other)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", copy)
        with pytest.raises(torch.OutOfMemoryError):
            model.unload()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    still_works(model, expected)
    model.unload()


def test_without_its_hooks_a_model_does_not_answer():
    model = tiny_model()
    ids = batch()["input_ids"]
    for module in model.t5.modules():
        module._forward_hooks.clear()
    for call in (
        lambda: model(**batch(), task="mnli"),
        lambda: model(**batch(), task_index=torch.tensor([0, 1, -1, -1])),
        lambda: model.generate(ids, task="mnli", max_new_tokens=2),
    ):
        with pytest.raises(RuntimeError, match="the adapter behind the feed_forward of encoder block 0 did not run"):
            call()
    model.unload()(**batch())


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_replaced_block_is_seen(stack):
    model = tiny_model()
    expected = model(**batch(), task="mnli").logits
    blocks = getattr(model.t5, stack).block
    ours, other = blocks[1], getattr(tiny_t5(seed=3), stack).block[1]
    blocks[1] = other
    for call in (
        lambda: model(**batch(), task="mnli"),
        lambda: model.generate(batch()["input_ids"], task=[*TASKS, "mnli"], max_new_tokens=2),
    ):
        with pytest.raises(RuntimeError, match=f"feed_forward of {stack} block 1 did not run"):
            call()
    with pytest.raises(RuntimeError, match=f"self_attention of {stack} block 1 was taken out or replaced"):
        model.unload()
    blocks[1] = ours
    still_works(model, expected)
    model.unload()


def test_a_block_left_out_is_seen():
    model = tiny_model()
    model.t5.encoder.block = model.t5.encoder.block[:2]
    with pytest.raises(RuntimeError, match="feed_forward of encoder block 2 did not run"):
        model(**batch(), task="mnli")


def test_a_block_in_two_places_is_refused():
    t5 = tiny_t5()
    t5.encoder.block[2] = t5.encoder.block[1]
    with pytest.raises(ValueError, match="stands in two places"):
        get_hyperformer_model(t5, tiny_config())
