"""The paper's ablations and the training of task embeddings alone, each against a plain statement of what it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.t5s import LAYERS, TASKS, bare_copy, batch, bits, stated_logits, tiny_config, tiny_model, tiny_t5, train

from hyperformer_fast import HyperFormerModel, get_hyperformer_model, official
from hyperformer_fast.norm_only import NormStack
from hyperformer_fast.variants import HYPERNETWORK_VARIANTS

MIXED = ["cola", "mnli", "mnli", "stsb"]


@pytest.mark.parametrize("variant", HYPERNETWORK_VARIANTS)
@pytest.mark.parametrize("norm", [True, False])
def test_without_the_task_projector_the_generators_read_the_embeddings_themselves(variant, norm):
    model = tiny_model(variant, task_projector=False, projected_task_embedding_dim=5, unique_hyper_net_layer_norm=norm)
    assert not [name for name, _ in model.named_parameters() if "projector" in name]
    tasks = torch.stack([model.task_embeddings.task_to_embeddings[task] for task in TASKS])
    assert tasks.shape == (3, 5)
    net = model.hypernetworks["decoder"]
    packed = net(model.task_embeddings())
    for position_id, position in enumerate(("feed_forward", "self_attention")):
        for layer in range(LAYERS["decoder"]):
            site, joint = net.site(layer, position), tasks
            if variant != "hyperformer":
                joint = joint + net.layer_embeddings.weight[layer]
            if variant == "hyperformer++":
                joint = joint + net.position_embeddings.weight[position_id]
            if variant != "hyperformer" and norm:
                joint = F.layer_norm(joint, (5,), net.embedding_norm.weight, net.embedding_norm.bias, 1e-6)
            which = {"hyperformer++": 0, "hyperformer-shared": position_id, "hyperformer": site}[variant]
            expected = joint @ net.generator.weight[which].T + net.generator.bias[which]
            torch.testing.assert_close(packed[site], expected, rtol=1e-12, atol=1e-12)
    model(**batch(), task=MIXED).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.hypernetworks.parameters())


@pytest.mark.parametrize("variant", HYPERNETWORK_VARIANTS)
@pytest.mark.parametrize("as_index", [False, True])
def test_without_adapter_blocks_the_generated_norms_are_left(variant, as_index):
    model, inputs = tiny_model(variant, train_adapters_blocks=False), batch()
    assert model.hypernetworks["encoder"].layout.numel == 2 * 32
    twin = bare_copy(model.t5)
    tasks = {"task_index": torch.tensor([TASKS.index(task) for task in MIXED])} if as_index else {"task": MIXED}
    out = model(**inputs, **tasks).logits
    samples = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(4)]
    expected = torch.cat([stated_logits(model, twin, task, sample) for task, sample in zip(MIXED, samples)])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert (out - twin(**inputs).logits).abs().max() > 0.1, "the norms do nothing"
    ours = [p for name, p in model.named_parameters() if not name.startswith("t5.")]
    norms = [p for p in model.t5.parameters() if p.requires_grad]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((out * weight).sum(), ours + norms)
    want = torch.autograd.grad((expected * weight).sum(), ours + [p for p in twin.parameters() if p.requires_grad])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-8)


def test_without_adapter_blocks_the_rest_works_as_ever(tmp_path):
    """No task, bad tasks, generation, float16 and bfloat16, a checkpoint."""
    model, inputs = tiny_model(train_adapters_blocks=False), batch()
    plain = bare_copy(model.t5)(**inputs).logits
    out = model(**inputs, task_index=torch.tensor([-1, 0, -1, 1])).logits
    assert torch.equal(out[::2], plain[::2]) and not torch.allclose(out[1], plain[1])
    with pytest.raises(ValueError, match="from -1 .* to 2, got 3"):
        model(**inputs, task_index=torch.tensor([0, 1, 3, 0]))
    options = {"max_new_tokens": 4, "num_beams": 2}
    together = model.generate(inputs["input_ids"], task=MIXED, **options)
    assert torch.equal(together[:1], model.generate(inputs["input_ids"][:1], task="cola", **options))
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    assert torch.equal(loaded(**inputs, task="cola").logits, model(**inputs, task="cola").logits)
    for dtype in (torch.float16, torch.bfloat16):
        low = tiny_model(t5=tiny_t5(dtype=dtype), train_adapters_blocks=False)
        low.load_state_dict(model.state_dict())
        expected = model(**inputs, task=MIXED).logits
        assert low(**inputs, task=MIXED).logits.dtype == dtype
        torch.testing.assert_close(low(**inputs, task=MIXED).logits.double(), expected, rtol=0.1, atol=0.1)


def test_a_norm_before_and_one_behind_may_both_be_left():
    model, inputs = tiny_model(train_adapters_blocks=False, add_layer_norm_before_adapter=True), batch()
    net = model.hypernetworks["encoder"]
    x, packed = torch.randn(2, 3, 32, dtype=torch.float64), net(model.task_embeddings())
    parts = {name: part[0, 1] for name, part in net.layout.unpack(packed).items()}
    y = F.layer_norm(x, (32,), parts["pre_gamma"], parts["pre_beta"])
    expected = x + F.layer_norm(y, (32,), parts["post_gamma"], parts["post_beta"])
    got = NormStack(packed[:, 1:2], net.layout, "gelu_new").adapter(x, 0, None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    model(**inputs, task=MIXED).loss.backward()
    assert all(p.grad.any() for p in net.parameters())


def test_without_conditional_norms_all_tasks_share_learned_ones():
    model, inputs = tiny_model("hyperformer", conditional_layer_norm=False), batch()
    for net in model.hypernetworks.values():
        packed = net(model.task_embeddings())
        shared = net.generator.norms.unsqueeze(1).expand(-1, 3, -1)
        assert torch.equal(packed[..., -2 * 32 :], shared) and not torch.equal(packed[:, 0], packed[:, 1])
    expected = stated_logits(model, bare_copy(model.t5), "stsb", inputs)
    torch.testing.assert_close(model(**inputs, task="stsb").logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", [*HYPERNETWORK_VARIANTS, "adapters"])
def test_without_t5s_layer_norms_nothing_of_the_t5_is_trained(variant):
    t5 = tiny_t5(dropout=0.1, dtype=torch.float32)
    before = bits(t5)
    model = tiny_model(variant, t5, unfreeze_layer_norms=False).train()
    train(model)
    assert all(torch.equal(p, before[name]) for name, p in t5.named_parameters())


@pytest.mark.parametrize("variant", HYPERNETWORK_VARIANTS)
def test_the_task_embeddings_alone_are_trained_and_all_is_saved(tmp_path, variant):
    """A model that was trained before: its hypernetworks and layer norms stay what they are, and are in the file."""
    first = tiny_model(variant, tiny_t5(dtype=torch.float32))
    train(first)
    first.save_pretrained(tmp_path / "first")
    model = HyperFormerModel.from_pretrained(tmp_path / "first", t5=tiny_t5(dtype=torch.float32))
    config = model.hyperformer_config.replace(freeze_model_but_task_embeddings=True)
    alone = get_hyperformer_model(model.unload(), config)
    alone.load_state_dict(first.state_dict())
    alone.add_task("rte", "mnli")
    before = bits(alone)
    gradients_of_all = stated_gradient(alone, "rte")
    train(alone, steps=1, task="rte")
    moved = {name for name, p in alone.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"task_embeddings.task_to_embeddings.rte"}
    embedding = alone.task_embeddings.task_to_embeddings["rte"]
    torch.testing.assert_close(embedding.grad, gradients_of_all, rtol=1e-4, atol=1e-7)
    alone.save_pretrained(tmp_path / "alone")
    loaded = HyperFormerModel.from_pretrained(tmp_path / "alone", t5=tiny_t5(dtype=torch.float32))
    for name, p in loaded.named_parameters():
        assert torch.equal(p, dict(alone.named_parameters())[name]), name


def stated_gradient(model, task):
    """The gradient of the task's embedding by the plain statement of the method, on the batch that ``train`` takes."""
    inputs = batch(seed=0)
    logits = stated_logits(model, bare_copy(model.t5), task, inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    return torch.autograd.grad(loss, model.task_embeddings.task_to_embeddings[task])[0]


def test_a_projector_of_the_embeddings_is_frozen_with_the_rest():
    model = tiny_model("hyperformer", train_task_embeddings=True, freeze_model_but_task_embeddings=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"task_embeddings.task_to_embeddings.{task}" for task in TASKS]


@pytest.mark.parametrize("switch", ["task_projector", "train_adapters_blocks"])
def test_the_authors_names_know_no_such_model(switch):
    model = get_hyperformer_model(tiny_t5(), tiny_config(**{switch: False}))
    with pytest.raises(ValueError, match=f"{switch}=False has no official names"):
        official.export(model)
