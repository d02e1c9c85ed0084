"""HyperFormerModel: the adapters are where they should be, the T5 stays what it was, and misuse is named."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support.t5s import TASKS, VARIANTS, bare_copy, batch, bits, stated_logits, tiny_config, tiny_model, tiny_t5, train

from hyperformer_fast import get_hyperformer_model

MIXED = ["cola", "mnli", "mnli", "stsb"]


def one_sample(inputs, i):
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_the_method(variant, gated):
    model, inputs = tiny_model(variant, tiny_t5(gated=gated)), batch()
    twin = bare_copy(model.t5)
    out = model(**inputs, task="stsb")
    expected = stated_logits(model, twin, "stsb", inputs)
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9)
    plain = twin(**inputs).logits
    assert (out.logits - plain).abs().max() > 0.1, "the adapters do nothing, so the test shows nothing"

    ours = [p for name, p in model.named_parameters() if not name.startswith("t5.")]
    norms = [p for p in model.t5.parameters() if p.requires_grad]
    twin_norms = [p for p in twin.parameters() if p.requires_grad]
    assert norms and len(norms) == len(twin_norms)
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((out.logits * weight).sum(), ours + norms)
    want = torch.autograd.grad((expected * weight).sum(), ours + twin_norms)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("as_index", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_batch_is_its_samples_one_by_one(variant, as_index):
    model, inputs = tiny_model(variant), batch()
    twin = bare_copy(model.t5)
    task = {"task_index": torch.tensor([TASKS.index(t) for t in MIXED])} if as_index else {"task": MIXED}
    out = model(**inputs, **task)
    expected = torch.cat([stated_logits(model, twin, t, one_sample(inputs, i)) for i, t in enumerate(MIXED)])
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9)
    ours = [p for name, p in model.named_parameters() if not name.startswith("t5.")]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((out.logits * weight).sum(), ours)
    want = torch.autograd.grad((expected * weight).sum(), ours)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-8)


def test_no_task_means_no_adapter():
    model, inputs = tiny_model(), batch()
    plain = bare_copy(model.t5)(**inputs).logits
    out = model(**inputs, task_index=torch.tensor([-1, 0, -1, 1])).logits
    assert torch.equal(out[0], plain[0]) and torch.equal(out[2], plain[2])
    assert not torch.allclose(out[1], plain[1])


def test_every_embedding_has_a_gradient_zero_if_it_took_no_part():
    model = tiny_model()
    model(**batch(), task=["mnli", "mnli", "cola", "mnli"]).loss.backward()
    grads = {name: p.grad for name, p in model.task_embeddings.task_to_embeddings.items()}
    assert grads["mnli"].abs().sum() > 0 and grads["cola"].abs().sum() > 0
    assert torch.equal(grads["stsb"], torch.zeros(6))


def test_only_what_the_config_names_is_trained():
    model = tiny_model(t5=tiny_t5(dropout=0.1, dtype=torch.float32))
    model.train()
    before = bits(model)
    train(model)
    for name, parameter in model.named_parameters():
        frozen = name.startswith("t5.") and not name.endswith("layer_norm.weight")
        assert torch.equal(parameter, before[name]) == (frozen or name.endswith(("stsb", "cola"))), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norms, head", [(False, False), (False, True), (True, True)])
def test_what_is_unfrozen(tied, norms, head):
    t5 = tiny_t5(tied=tied)
    model = get_hyperformer_model(t5, tiny_config(unfreeze_layer_norms=norms, unfreeze_lm_head=head))
    trained = {name for name, p in t5.named_parameters() if p.requires_grad}
    expected = {n for n, _ in t5.named_parameters() if n.endswith("layer_norm.weight")} if norms else set()
    # 3 norms in a decoder's block, 2 in an encoder's, and one behind each stack
    assert len(expected) in (0, 2 * 3 + 3 * 2 + 2)
    # tied, the head and the embeddings are one tensor, and its first name is shared.weight
    assert trained == expected | ({"shared.weight" if tied else "lm_head.weight"} if head else set())
    assert all(p.requires_grad for p in model.hypernetworks.parameters())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_of_mixed_tasks_is_that_of_each(options):
    model, ids = tiny_model(), batch()["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "no_repeat_ngram_size": 1, **options}
    mixed = model.generate(ids, task=MIXED, **options)
    indexed = model.generate(ids, task_index=torch.tensor([TASKS.index(t) for t in MIXED]), **options)
    assert torch.equal(mixed, indexed)
    each = [model.generate(ids[i : i + 1], task=task, **options) for i, task in enumerate(MIXED)]
    assert torch.equal(mixed, torch.cat(each))
    others = model.generate(ids, task="stsb", **options)
    assert not torch.equal(mixed, others), "the tasks do not differ, so the test shows nothing"


def test_generation_is_greedy_decoding_of_the_stated_method():
    model, inputs = tiny_model(), batch()
    twin, ids = bare_copy(model.t5), torch.zeros(4, 1, dtype=torch.long)
    encoded = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for _ in range(5):
        logits = stated_logits(model, twin, "cola", {**encoded, "decoder_input_ids": ids})
        logits[..., 1] = -torch.inf
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    got = model.generate(**encoded, task="cola", max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(got, ids)


def test_weights_are_generated_and_folded_once_for_a_whole_generation(monkeypatch):
    from hyperformer_fast import ops

    model, calls = tiny_model(), []
    for module, name in ((ops, "generate_weights"), (ops.stack, "fold")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _plain=plain, _name=name: (calls.append(_name), _plain(*a))[1])
    model.generate(batch()["input_ids"], task=MIXED, max_new_tokens=6, num_beams=2)
    # of each task by itself in each of the two stacks, so that its bits do not depend on the others
    of_tasks = 2 * len(model.hyperformer_config.tasks)
    assert sorted(calls) == ["fold", "fold", *["generate_weights"] * of_tasks]
    calls.clear()
    model(**batch(), task="mnli")
    assert sorted(calls) == ["fold", "fold", "generate_weights", "generate_weights"]


def test_encoder_outputs_may_be_given():
    model, inputs = tiny_model(), batch()
    encoded = model(**inputs, task=MIXED)
    outputs = (encoded.encoder_last_hidden_state,)
    rest = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    again = model(encoder_outputs=outputs, **rest, task=MIXED)
    assert torch.equal(again.logits, encoded.logits)
    from transformers.modeling_outputs import BaseModelOutput

    options = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 4, "num_beams": 2, "task": MIXED}
    given = model.generate(encoder_outputs=BaseModelOutput(outputs[0]), **options)
    assert torch.equal(given, model.generate(input_ids=inputs["input_ids"], **options))
    with pytest.raises(ValueError, match="for 2 samples, but the batch has 4"):
        model.generate(encoder_outputs=BaseModelOutput(outputs[0]), **{**options, "task": MIXED[:2]})


def test_inputs_embeds_and_a_model_of_one_task():
    model = tiny_model(tasks=["only"])
    inputs = batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    assert torch.equal(model(inputs_embeds=embeds, **rest).logits, model(**inputs, task="only").logits)


def test_which_task_must_be_clear():
    model, inputs = tiny_model(), batch()
    cases = [
        ({}, "say which task.*mnli, stsb, cola"),
        ({"task": "rte"}, "unknown task 'rte'.*mnli, stsb, cola"),
        ({"task": ["mnli", "rte", "mnli", "mnli"]}, "unknown task 'rte'"),
        ({"task": "mnli", "task_index": torch.zeros(4, dtype=torch.long)}, "not both"),
        ({"task": ["mnli"]}, "for 1 samples, but the batch has 4"),
        ({"task": ["mnli", "cola"]}, "for 2 samples, but the batch has 4"),
        ({"task": []}, "one per sample"),
        ({"task": 3}, "task takes names"),
        ({"task_index": torch.zeros(3, dtype=torch.long)}, "for 3 samples, but the batch has 4"),
        ({"task_index": torch.zeros(4)}, "int32 or int64, got torch.float32"),
        ({"task_index": torch.zeros(4, 1, dtype=torch.long)}, r"\[B\].*\[4, 1\]"),
        ({"task_index": [0, 1, 2, 0]}, "must be a tensor"),
        ({"task_index": torch.tensor([0, 1, 3, 0])}, "from -1 .* to 2, got 3"),
        ({"task_index": torch.tensor([0, 1, -2, 0])}, "from -1 .* to 2, got -2"),
    ]
    for task, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**inputs, **task)
        with pytest.raises(ValueError, match=message):
            model.generate(inputs["input_ids"], max_new_tokens=2, **task)


def test_the_t5_by_itself_refuses():
    model, inputs = tiny_model(), batch()
    for call in (lambda: model.t5(**inputs), lambda: model.t5.generate(inputs["input_ids"], max_new_tokens=2)):
        with pytest.raises(RuntimeError, match=r"call the HyperFormerModel .* or unload\(\)"):
            call()


def test_an_error_inside_leaves_no_weights_behind(monkeypatch):
    model, inputs = tiny_model(), batch()

    def broken(*args, **kwargs):
        raise KeyError("inside")

    monkeypatch.setattr(model.t5.decoder.block[1].layer[-1].DenseReluDense.wo, "forward", broken)
    for call in (
        lambda: model(**inputs, task="mnli"),
        lambda: model.generate(inputs["input_ids"], task="mnli", max_new_tokens=2),
    ):
        with pytest.raises(KeyError, match="inside"):
            call()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="called by itself"):
        model.t5(**inputs)


def test_a_second_set_of_adapters_and_other_models_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has HyperFormer adapters already"):
        get_hyperformer_model(model.t5, tiny_config())
    with pytest.raises(TypeError, match="Linear has none"):
        get_hyperformer_model(torch.nn.Linear(2, 2), tiny_config())
    with pytest.raises(TypeError, match="HyperFormerModel has none"):
        get_hyperformer_model(model, tiny_config())
    with pytest.raises(TypeError, match="must be a HyperFormerConfig, got dict"):
        get_hyperformer_model(tiny_t5(), {"tasks": ["a"]})
    t5 = tiny_t5()
    flags = [p.requires_grad for p in t5.parameters()]
    with pytest.raises(ValueError, match="reduction_factor=64"):
        get_hyperformer_model(t5, tiny_config(reduction_factor=64))
    assert [p.requires_grad for p in t5.parameters()] == flags and not any(m._forward_hooks for m in t5.modules())


def test_nan_in_the_input_comes_out_and_stays_in_its_sample():
    model, inputs = tiny_model(), batch()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    clean = model(inputs_embeds=embeds, **inputs, task=MIXED).logits
    embeds[1, 0, 0] = torch.nan
    out = model(inputs_embeds=embeds, **inputs, task=MIXED)
    assert out.logits[1].isnan().all() and out.loss.isnan()
    keep = [0, 2, 3]
    assert torch.equal(out.logits[keep], clean[keep])


def test_threads_do_not_see_each_others_weights():
    model, inputs = tiny_model(), batch()
    expected = {task: model(**inputs, task=task).logits for task in TASKS}
    barrier, wrong = threading.Barrier(len(TASKS)), []

    def serve(task):
        barrier.wait()
        for _ in range(10):
            if not torch.equal(model(**inputs, task=task).logits, expected[task]):
                wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_deep_copy_is_a_model_of_its_own():
    model, inputs = tiny_model(), batch()
    expected, before = model(**inputs, task="mnli").logits, bits(model.t5)
    twin = copy.deepcopy(model)
    train(model)
    assert torch.equal(twin(**inputs, task="mnli").logits, expected)
    assert not any(module._forward_hooks for module in twin.unload().modules())
    assert not torch.equal(model(**inputs, task="mnli").logits, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.unload().named_parameters())


def test_two_models_share_nothing():
    config = tiny_config()
    one, other = get_hyperformer_model(tiny_t5(), config), get_hyperformer_model(tiny_t5(), config)
    one.add_task("rte")
    assert config.tasks == TASKS and other.hyperformer_config.tasks == TASKS
    with pytest.raises(ValueError, match="unknown task 'rte'"):
        other(**batch(), task="rte")


def test_add_task():
    model, inputs = tiny_model(), batch()
    expected = model(**inputs, task="mnli").logits
    model.add_task("twin", init_from="mnli")
    model.add_task("mean", init_from=["mnli", "cola"])
    model.add_task("fresh")
    e = model.task_embeddings.task_to_embeddings
    assert torch.equal(model(**inputs, task="twin").logits, expected)
    torch.testing.assert_close(e["mean"], (e["mnli"] + e["cola"]) / 2)
    assert e["fresh"].requires_grad and not torch.equal(e["fresh"], e["mnli"])
    assert model.hyperformer_config.tasks == [*TASKS, "twin", "mean", "fresh"]
    assert torch.equal(model(**inputs, task="mnli").logits, expected)
    model(**inputs, task_index=torch.tensor([5, 4, 3, 0])).loss.backward()
    assert e["fresh"].grad.abs().sum() > 0
    for name, source, message in [("mnli", None, "exists already"), ("x", "rte", "unknown task")]:
        with pytest.raises(ValueError, match=message):
            model.add_task(name, source)
    assert len(model.hyperformer_config.tasks) == len(e) == 6


def test_print_trainable_parameters(capsys):
    model = tiny_model()
    model.print_trainable_parameters()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.t5.parameters())
    line = capsys.readouterr().out
    assert line == (
        f"trainable params: {trained:,} || T5 params: {total:,} || trainable%: {100 * trained / total:.4f} || "
        f"per task: {100 * trained / total / 3:.4f} % (3 tasks)\n"
    )
