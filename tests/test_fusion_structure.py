"""What a fused T5 is to everybody else: its names, copies, generation and recorded outputs.

test_fusion_others.py: hooks, wrappers and sharding of others. test_fusion_left_alone.py: what keeps its own forward.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from support.fused import classes, count_norms, pair, reasons, tiny
from support.t5s import TASKS, batch, tiny_config, tiny_model
from torch import nn
from transformers import T5EncoderModel, T5ForSequenceClassification

from hyperformer_fast import fuse_t5, get_hyperformer_model, unfuse_t5
from hyperformer_fast.fusion import PIECES, attention, handover, pieces_of
from hyperformer_fast.fusion.layers import plan_of

#: The first norm of each of the two stacks; the sublayers make the others. transformers before 5 records the sums
#: between blocks where nobody can see it, and so each of the five blocks makes its own first norm for a backward.
FIRST_NORMS = 2 if handover._collector is not None else 5


@pytest.fixture
def norms(monkeypatch):
    return count_norms(monkeypatch)


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
    norms.clear()  # of what compares a class with its fused form, once
    want = t5(**batch()).logits
    computed = len(norms)
    assert computed == FIRST_NORMS
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


def test_an_adapted_model_computes_its_norms_in_its_sublayers(norms):
    model = tiny_model(t5=tiny())
    norms.clear()
    model(**batch(), task=TASKS[0])
    assert len(norms) == FIRST_NORMS
    norms.clear()
    model.train()
    model.gradient_checkpointing_enable()
    model(**batch(), task=TASKS[0]).loss.backward()
    assert len(norms) == 2 * 5 + 2, "each block of 5 makes its first norm, in the forward and recomputed; and the last"
