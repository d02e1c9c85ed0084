"""What a fused T5 is to everybody else: its names, copies, hooks, generation and recorded outputs; and what keeps its
own forward, and says why."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from support.t5s import TASKS, batch, tiny_config, tiny_model, tiny_t5
from torch import nn
from transformers import LongT5Config, LongT5ForConditionalGeneration, T5EncoderModel, T5ForSequenceClassification

from hyperformer_fast import explain_fusion, fuse_t5, get_hyperformer_model, ops, unfuse_t5
from hyperformer_fast.fusion import PIECES, attention, pieces_of, selftest
from hyperformer_fast.fusion.layers import plan_of


def tiny(**changes):
    return tiny_t5(dtype=torch.float32, **changes)


def pair(**changes):
    """A T5 and its fused twin."""
    plain = tiny(**changes)
    return plain, fuse_t5(copy.deepcopy(plain))


def classes(t5):
    return [type(module) for module in t5.modules()]


@pytest.fixture
def norms(monkeypatch):
    """The number of norms that were computed by themselves."""
    calls = []
    plain = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda *args: calls.append(args) or plain(*args))
    return calls


def test_names_stay_and_unfusing_gives_everything_back():
    t5 = tiny()
    keys, before, implementation = list(t5.state_dict()), classes(t5), t5.encoder.config._attn_implementation
    names = [name for name, _ in t5.named_modules()]
    assert fuse_t5(t5) is t5 and pieces_of(t5) == frozenset(PIECES) - {"loss"}
    assert list(t5.state_dict()) == keys and [name for name, _ in t5.named_modules()] == names
    assert classes(t5) != before and all(isinstance(m, c) for m, c in zip(t5.modules(), before, strict=True))
    fuse_t5(t5, {"norm"})
    assert pieces_of(t5) == {"norm"} and t5.encoder.config._attn_implementation == implementation
    unfuse_t5(unfuse_t5(t5))
    assert classes(t5) == before and t5.encoder.config._attn_implementation == implementation
    assert not t5._forward_pre_hooks and not t5._forward_pre_hooks_with_kwargs
    assert not any(plan_of(module) for module in t5.modules())


def saved_and_loaded(t5):
    file = io.BytesIO()
    torch.save(t5, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copies_of(t5):
    return {
        "deepcopy": copy.deepcopy(t5),
        "pickle": pickle.loads(pickle.dumps(t5)),
        "torch.save": saved_and_loaded(t5),
    }


def test_a_copy_is_fused_and_its_own(norms):
    t5 = fuse_t5(tiny())
    want = t5(**batch()).logits
    computed = len(norms)
    assert computed == 2, "the first norm of each stack; the sublayers make the others"
    for how, twin in copies_of(t5).items():
        assert classes(twin) == classes(t5), how
        norms.clear()
        assert torch.equal(twin(**batch()).logits, want), how
        assert len(norms) == computed, f"{how}: its sublayers are linked to its own norms"
        with torch.no_grad():
            for parameter in t5.parameters():
                parameter.add_(1.0)
        assert torch.equal(twin(**batch()).logits, want), f"{how}: it ran a module of the T5 that it was copied from"
        with torch.no_grad():
            for parameter, original in zip(t5.parameters(), twin.parameters(), strict=True):
                parameter.copy_(original)


def test_a_copied_sublayer_takes_no_neighbours_along():
    t5 = fuse_t5(tiny())
    t5(**batch())
    size = len(pickle.dumps(t5.encoder.block[0].layer[0]))
    assert size < 2 * len(pickle.dumps(tiny().encoder.block[0].layer[0]))


def test_replicas_of_data_parallel_compute_with_their_own_weights():
    t5 = fuse_t5(tiny())
    t5(**batch())
    norm = t5.encoder.block[0].layer[0].layer_norm
    replica = norm._replicate_for_data_parallel()
    replica.weight = norm.weight.detach() * 2
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(replica(x), 2 * norm(x))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generate(options):
    plain, fused = pair()
    given = {name: batch()[name] for name in ("input_ids", "attention_mask")} | {"max_new_tokens": 6} | options
    texts = []
    for t5 in (plain, fused):
        torch.manual_seed(0)
        texts.append(t5.generate(**given))
    assert torch.equal(*texts)


def test_hidden_states_and_attentions_are_recorded():
    for implementation in ("sdpa", "eager"):
        plain = tiny(dropout=0.1)
        if attention.is_supported():
            plain.set_attn_implementation(implementation)
        fused = fuse_t5(copy.deepcopy(plain))
        wanted = {
            "output_hidden_states": True,
            "output_attentions": attention.is_supported() and implementation == "eager",
        }
        for round in range(2):  # transformers puts its hooks on in the first
            one, other = plain(**batch(), **wanted), fused(**batch(), **wanted)
            for name, value in one.items():
                if name.endswith(("states", "attentions")) and isinstance(value, tuple):
                    assert len(value) == len(other[name]) > 0
                    torch.testing.assert_close(other[name], value, msg=f"{name} in round {round}")
        other = fused.train()(**batch(), **wanted)
        if wanted["output_attentions"]:
            assert [len(other[n]) for n in ("encoder_attentions", "decoder_attentions", "cross_attentions")] == [
                3,
                2,
                2,
            ]


def test_an_encoder_alone():
    plain, fused = pair()
    ids = batch()["input_ids"]
    want = plain.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(fused.encoder(input_ids=ids).last_hidden_state, want)
    torch.testing.assert_close(copy.deepcopy(fused.encoder)(input_ids=ids).last_hidden_state, want)
    model = fuse_t5(T5EncoderModel(plain.config).eval())
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, want)
    torch.testing.assert_close(fuse_t5(copy.deepcopy(plain.encoder))(input_ids=ids).last_hidden_state, want)
    with pytest.raises(TypeError, match="Linear has none"):
        fuse_t5(nn.Linear(2, 2))


def test_no_cache_is_made_for_a_loss_unless_somebody_asks():
    plain, fused = pair()
    inputs = batch()
    assert plain(**inputs).past_key_values is not None
    assert fused(**inputs).past_key_values is None
    assert fused(**inputs, use_cache=True).past_key_values is not None
    without = {**inputs, "decoder_input_ids": inputs["labels"], "labels": None}
    assert fused(**without).past_key_values is not None
    assert len(fused(**inputs, return_dict=False)) == len(plain(**inputs, return_dict=False))
    assert fuse_t5(tiny(), {"norm"})(**inputs).past_key_values is not None


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


def reasons(t5):
    return {(report.name, report.piece): report.reason for report in explain_fusion(t5)}


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
    assert all(not reason or piece in ("attention", "loss") for (_, piece), reason in reasons(fused).items())
    one, other = plain(**batch()), fused(**batch())
    torch.testing.assert_close(other.logits, one.logits)
    one.loss.backward()
    other.loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_threads_do_not_meet():
    t5 = fuse_t5(tiny())
    inputs = [batch(seed=seed) for seed in range(4)]
    want = [t5(**each).logits for each in inputs]
    got = [[] for _ in inputs]

    def run(i):
        for _ in range(5):
            got[i].append(t5(**inputs[i]).logits)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(logits, want[i]) for i in range(len(inputs)) for logits in got[i])
    assert [len(each) for each in got] == [5] * len(inputs)


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


def test_inference_mode_and_heads():
    plain, fused = pair()
    with torch.inference_mode():
        torch.testing.assert_close(fused(**batch()).logits, plain(**batch()).logits)
    head = T5ForSequenceClassification(plain.config).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 1], [7, 8, 1]]), "labels": torch.tensor([0, 1])}
    want = head(**inputs).logits
    torch.testing.assert_close(fuse_t5(head)(**inputs).logits, want)
    assert "makes no cache" in reasons(fuse_t5(T5EncoderModel(plain.config)))["", "cache"]


def test_functorch_sees_plain_pytorch():
    plain, fused = pair()
    norm, block = fused.encoder.block[0].layer[1].layer_norm, fused.encoder.block[0].layer[1]
    x = torch.randn(2, 3, 32)
    for module, other in ((norm, plain.encoder.block[0].layer[1].layer_norm), (block, plain.encoder.block[0].layer[1])):
        got = torch.func.jvp(module, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(got, torch.func.jvp(other, (x,), (torch.ones_like(x),)))


@pytest.mark.parametrize("fuse", ["auto", False, {"norm", "dropout"}, "attention"])
def test_fuse_of_a_model_and_unload(fuse):
    t5 = tiny()
    before = classes(t5)
    want = t5(**batch()).logits
    model = get_hyperformer_model(t5, tiny_config(), fuse=fuse)
    assert (pieces_of(t5) == frozenset()) == (fuse is False)
    model(**batch(), task=TASKS[0]).loss.backward()
    assert model.unload() is t5 and classes(t5) == before and pieces_of(t5) == frozenset()
    assert torch.equal(t5(**batch()).logits, want)


def test_a_t5_that_came_fused_is_given_back_fused():
    t5 = fuse_t5(tiny(), {"norm"})
    model = get_hyperformer_model(t5, tiny_config())
    assert pieces_of(t5) == frozenset(PIECES) - {"loss"}
    model.unload()
    assert pieces_of(t5) == {"norm"}
    assert pieces_of(get_hyperformer_model(t5, tiny_config(), fuse=False).t5) == {"norm"}


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


def test_an_adapted_model_computes_its_norms_in_its_sublayers(norms):
    model = tiny_model(t5=tiny())
    model(**batch(), task=TASKS[0])
    assert len(norms) == 2
    norms.clear()
    model.train()
    model.gradient_checkpointing_enable()
    model(**batch(), task=TASKS[0]).loss.backward()
    assert len(norms) == 2 * 5 + 2, "each block of 5 makes its first norm, in the forward and recomputed; and the last"


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
