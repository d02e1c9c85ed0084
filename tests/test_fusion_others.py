"""A fused T5 beside what others put into it: hooks, LoRA, wrappers that recompute, and sharding."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fused import pair, reasons, tiny
from support.t5s import batch
from torch import nn

from hyperformer_fast import fuse_t5, unfuse_t5


def change(module, args, output):
    """What a hook may do to the hidden states that pass."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden.data[..., 0].add_(1.0)


def in_place(module, args, output):
    hidden = output[0] if isinstance(output, tuple) else output
    hidden[..., 0].add_(1.0)


def another(module, args, output):
    return (output[0].cumsum(-1), *output[1:]) if isinstance(output, tuple) else output.cumsum(-1)


@pytest.mark.parametrize("hook", [change, in_place, another])
@pytest.mark.parametrize("where", ["block.0", "block.0.layer.0", "block.1.layer.1", "final_layer_norm"])
def test_hooks_see_and_change_what_they_did_before(hook, where):
    plain, fused = pair()
    inputs = batch()
    for t5 in (plain, fused):
        t5(**inputs)
        t5.encoder.get_submodule(where).register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(fused(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("where", ["block.1", "block.1.layer.0", "block.1.layer.1", "block.1.layer.0.layer_norm"])
def test_pre_hooks_see_and_change_what_they_did_before(where):
    plain, fused = pair()

    def change(module, args):
        args[0].data[..., 0].add_(1.0)

    for t5 in (plain, fused):
        t5.encoder.get_submodule(where).register_forward_pre_hook(change)
    with torch.no_grad():
        torch.testing.assert_close(fused(**batch()).logits, plain(**batch()).logits)


@pytest.mark.parametrize("name", ["dropout", "DenseReluDense.dropout", "DenseReluDense.act", "DenseReluDense.wi"])
def test_modules_with_hooks_are_called(name):
    plain, fused = pair(dropout=0.1)
    for t5 in (plain, fused):
        t5.train()
        t5.encoder.block[0].layer[1].get_submodule(name).register_forward_hook(lambda *_: torch.zeros_like(_[2]))
        for module in t5.modules():
            if isinstance(module, nn.Dropout) or hasattr(module, "attention_dropout"):
                module.p = 0.0
            if hasattr(module, "has_relative_attention_bias"):
                module.dropout = 0.0
    torch.testing.assert_close(fused(**batch()).logits, plain(**batch()).logits)


def test_accelerate_before_and_after():
    hooks = pytest.importorskip("accelerate.hooks")

    def attach(t5):
        for module in t5.encoder.block[0].modules():
            hooks.add_hook_to_module(module, hooks.ModelHook())
        return t5

    want = tiny()(**batch()).logits
    early = fuse_t5(attach(tiny()))
    assert "forward was replaced" in reasons(early)["encoder.block.0.layer.0.layer_norm", "norm"]
    late = attach(fuse_t5(tiny()))
    for t5 in (early, late):
        torch.testing.assert_close(t5(**batch()).logits, want)
        unfuse_t5(t5)
        assert torch.equal(t5(**batch()).logits, want)
        for module in t5.modules():
            hooks.remove_hook_from_module(module)
        assert torch.equal(t5(**batch()).logits, want)


def test_lora_inside():
    peft = pytest.importorskip("peft")
    plain = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q", "v", "wi", "wo"], init_lora_weights=False))
    fused = fuse_t5(copy.deepcopy(plain))
    kept = {(name, piece) for (name, piece), reason in reasons(fused).items() if reason}
    assert {piece for _, piece in kept} <= {"attention", "loss", "products"}
    trained = {name for (name, _), reason in reasons(fused).items() if "its weight is trained" in reason}
    assert all(".lora_" in name for name in trained)
    one, other = plain(**batch()), fused(**batch())
    torch.testing.assert_close(other.logits, one.logits)
    one.loss.backward()
    other.loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("level", ["block", "sublayer"])
def test_modules_that_others_recompute(level):
    wrap = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper").checkpoint_wrapper
    plain, fused = pair(dropout=0.0)
    fused(**batch())
    for stack in (fused.encoder, fused.decoder):
        for i, block in enumerate(stack.block):
            if level == "block":
                stack.block[i] = wrap(block)
            else:
                for j, sublayer in enumerate(block.layer):
                    block.layer[j] = wrap(sublayer)
    for t5 in (plain, fused):
        t5.train()(**batch()).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_fsdp2_gets_the_gradients_of_its_units():
    """A norm is not made by the block before it, whose backward ends after that of the norm's own unit."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, fused = pair()
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in [*fused.encoder.block, *fused.decoder.block]:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(fused, mesh=mesh, reshard_after_forward=False)
        for t5 in (plain, fused):
            with torch.no_grad():
                t5(**batch())
            t5(**batch()).loss.backward()  # finds the weights of every unit gathered
        assert type(fused.encoder.block[0]).__name__ == "FSDPT5Block"
        for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6, msg=name)
        unfuse_t5(fused)
        torch.testing.assert_close(fused(**batch()).logits, plain(**batch()).logits)
    finally:
        distributed.destroy_process_group()
