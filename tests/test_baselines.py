"""The two methods that the paper compares its hypernetworks with, in float64 against plain PyTorch: adapters that each
task learns for itself, and fine-tuning of the whole T5."""

from __future__ import annotations

import copy

import pytest
import torch
from support.t5s import LAYERS, TASKS, bare_copy, batch, bits, tiny_config, tiny_model, tiny_t5, train
from torch import nn

from hyperformer_fast import HyperFormerModel, get_hyperformer_model, official
from hyperformer_fast.checkpoint import CheckpointError

MIXED = ["cola", "mnli", "mnli", "stsb"]


class PlainAdapter(nn.Module):
    """One adapter as the authors have it: two linears, an activation, a layer norm, the skip."""

    def __init__(self, d: int, b: int):
        super().__init__()
        self.down, self.up, self.norm = nn.Linear(d, b), nn.Linear(b, d), nn.LayerNorm(d)

    def forward(self, x):
        return x + self.norm(self.up(nn.functional.gelu(self.down(x), approximate="tanh")))


class PlainAdapters(nn.Module):
    """A copy of a model's T5 with hooks that call plain adapters of one task, filled from the model's tables."""

    def __init__(self, model: HyperFormerModel, task: str):
        super().__init__()
        self.t5, self.places = bare_copy(model.t5), []
        self.adapters = nn.ModuleList()
        for stack, layers in LAYERS.items():
            table = model.hypernetworks[stack]
            for layer in range(layers):
                block = getattr(self.t5, stack).block[layer]
                modules = {
                    "self_attention": block.layer[0].SelfAttention,
                    "feed_forward": block.layer[-1].DenseReluDense,
                }
                for position, module in modules.items():
                    site, adapter = table.site(layer, position), PlainAdapter(table.layout.d, table.layout.b).double()
                    whole = torch.cat([table.adapters[task][site], table.norms[site]]).detach()
                    parts = table.layout.unpack(whole)
                    for name, parameter in self.parts_of(adapter).items():
                        parameter.data.copy_(parts[name])
                    self.adapters.append(adapter)
                    self.places.append((stack, site))
                    module.register_forward_hook(
                        lambda m, a, out, f=adapter: (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
                    )

    @staticmethod
    def parts_of(adapter: PlainAdapter) -> dict[str, torch.Tensor]:
        return {
            "down_weight": adapter.down.weight,
            "down_bias": adapter.down.bias,
            "up_weight": adapter.up.weight,
            "up_bias": adapter.up.bias,
            "post_gamma": adapter.norm.weight,
            "post_beta": adapter.norm.bias,
        }

    def gradients(self, layout) -> dict[str, torch.Tensor]:
        """The gradients of all adapters, in the form of a table: stack -> [S, P]."""
        found = {stack: torch.zeros(2 * layers, layout.numel).double() for stack, layers in LAYERS.items()}
        for (stack, site), adapter in zip(self.places, self.adapters):
            found[stack][site] = layout.pack({name: p.grad for name, p in self.parts_of(adapter).items()})
        return found


def test_adapters_are_plain_adapters():
    """Logits and all gradients of one task; the other tasks' adapters get zeros."""
    model, inputs = tiny_model("adapters"), batch()
    plain = PlainAdapters(model, "stsb")
    weight = torch.randn(4, 5, 64, dtype=torch.float64)
    out, expected = model(**inputs, task="stsb").logits, plain.t5(**inputs).logits
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert (out - bare_copy(model.t5)(**inputs).logits).abs().max() > 0.1, "the adapters do nothing"
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for stack, want in plain.gradients(model.hypernetworks["encoder"].layout).items():
        table = model.hypernetworks[stack]
        got = torch.cat([table.adapters["stsb"].grad, table.norms.grad], -1)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
        for other in ("mnli", "cola"):
            assert torch.equal(table.adapters[other].grad, torch.zeros_like(table.adapters[other]))
    for (name, ours), theirs in zip(model.t5.named_parameters(), plain.t5.parameters()):
        assert ours.requires_grad == ("layer_norm" in name)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9)


def test_a_mixed_batch_takes_each_samples_own_adapters_and_sums_the_gradients_of_the_norms():
    model, inputs = tiny_model("adapters"), batch()
    weight = torch.randn(4, 5, 64, dtype=torch.float64)
    out = model(**inputs, task=MIXED).logits
    (out * weight).sum().backward()
    layout = model.hypernetworks["encoder"].layout
    projections = layout.numel - layout.norm_numel
    norms = {stack: 0.0 for stack in LAYERS}
    for task in TASKS:
        rows, plain = [i for i, of in enumerate(MIXED) if of == task], PlainAdapters(model, task)
        expected = plain.t5(**{name: value[rows] for name, value in inputs.items()}).logits
        torch.testing.assert_close(out[rows], expected, rtol=1e-9, atol=1e-9)
        (expected * weight[rows]).sum().backward()
        for stack, want in plain.gradients(layout).items():
            got = model.hypernetworks[stack].adapters[task].grad
            torch.testing.assert_close(got, want[:, :projections], rtol=1e-8, atol=1e-9)
            norms[stack] = norms[stack] + want[:, projections:]
    for stack, want in norms.items():
        torch.testing.assert_close(model.hypernetworks[stack].norms.grad, want, rtol=1e-8, atol=1e-9)


def test_adapters_start_as_the_authors_do():
    model = get_hyperformer_model(tiny_t5(d_model=96, dtype=torch.float32), tiny_config("adapters", reduction_factor=4))
    table = model.hypernetworks["encoder"]
    parts = table.layout.unpack(table(model.task_embeddings()))
    drawn = torch.cat([parts["down_weight"].flatten(), parts["up_weight"].flatten()])
    assert abs(drawn.std() - 1e-2) < 2e-4 and abs(drawn.mean()) < 2e-4
    assert not parts["down_bias"].any() and not parts["up_bias"].any() and not parts["post_beta"].any()
    assert (parts["post_gamma"] == 1).all()


def test_adapters_without_a_norm_and_with_a_pre_norm():
    for before, after in ((False, False), (True, True)):
        model = tiny_model("adapters", add_layer_norm_before_adapter=before, add_layer_norm_after_adapter=after)
        table = model.hypernetworks["decoder"]
        packed = table(model.task_embeddings())
        assert packed.shape == (4, 3, table.layout.numel) and (table.norms is not None) == after
        model(**batch(), task=MIXED).loss.backward()
        assert all(p.grad.any() for p in table.parameters())


def test_add_task_copies_averages_or_draws_adapters(tmp_path):
    model, inputs = tiny_model("adapters"), batch()
    before = model(**inputs, task="cola").logits
    model.add_task("twin", "cola")
    model.add_task("mean", ["cola", "mnli"])
    model.add_task("fresh")
    assert torch.equal(model(**inputs, task="twin").logits, before)
    table = model.hypernetworks["encoder"]
    torch.testing.assert_close(table.adapters["mean"], (table.adapters["cola"] + table.adapters["mnli"]) / 2)
    assert 0 < table.adapters["fresh"].std() < 0.02
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        model.add_task("other", "nope")
    assert model.hyperformer_config.tasks == [*TASKS, "twin", "mean", "fresh"] == table.config.tasks
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    assert torch.equal(loaded(**inputs, task="mean").logits, model(**inputs, task="mean").logits)


def test_tasks_may_share_adapters():
    model, inputs = tiny_model("adapters", task_to_embeddings={"mnli": "a", "stsb": "b", "cola": "a"}), batch()
    assert list(model.hypernetworks["encoder"].adapters) == ["a", "b"]
    logits = {task: model(**inputs, task=task).logits for task in TASKS}
    assert torch.equal(logits["mnli"], logits["cola"]) and not torch.allclose(logits["mnli"], logits["stsb"])


@pytest.mark.parametrize("tied", [True, False])
def test_finetuning_is_plain_training_of_the_t5(tmp_path, tied):
    """Two steps of a plain T5 and of the model: the same losses, gradients and weights, all in the checkpoint."""
    plain = tiny_t5(tied=tied)
    before, twin = bits(plain), copy.deepcopy(plain)
    plain.requires_grad_(False)
    model = get_hyperformer_model(plain, tiny_config("finetuning"))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step, task in enumerate(("mnli", MIXED)):
        ours, theirs = model(**batch(seed=step), task=task).loss, twin(**batch(seed=step)).loss
        assert torch.equal(ours, theirs)
        for loss, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.t5.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) and torch.equal(ours, theirs), name
        assert not torch.equal(ours, before[name]), name
    assert (model.t5.lm_head.weight is model.t5.shared.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5(tied=tied, seed=5))
    for (name, ours), theirs in zip(loaded.t5.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    ids = batch()["input_ids"]
    assert torch.equal(loaded.generate(ids, task="cola", **options), twin.generate(ids, **options))
    unloaded = model.unload()
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in unloaded.named_parameters())


def test_finetuning_checks_the_tasks_that_it_does_not_need():
    model, inputs = get_hyperformer_model(tiny_t5(), tiny_config("finetuning")), batch()
    cases = [
        ({}, "say which task.*mnli, stsb, cola"),
        ({"task": "rte"}, "unknown task 'rte'"),
        ({"task": ["mnli", "cola"]}, "for 2 samples, but the batch has 4"),
        ({"task_index": torch.tensor([0, 1, 3, 0])}, "from -1 .* to 2, got 3"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**inputs, **arguments)
    model.add_task("rte", "mnli")
    assert torch.equal(model(**inputs, task="rte").logits, model.t5(**inputs).logits)
    count = model.parameter_count()
    assert count.t5_trained == count.trained == count.t5_total and count.tasks == 4


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_finetuning_refuses_a_quantised_t5():
    if torch.backends.quantized.engine == "none":
        pytest.skip("needs an engine for quantised linears, which this build of torch lacks")
    t5 = torch.ao.quantization.quantize_dynamic(tiny_t5(dtype=torch.float32), {nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match="variant 'finetuning' trains the whole T5, but this one is quantised"):
        get_hyperformer_model(t5, tiny_config("finetuning"))


def test_the_authors_checkpoints_of_finetuning_load_and_those_of_adapters_are_refused_by_name():
    theirs = {name: tensor.clone() for name, tensor in tiny_t5(seed=7).state_dict().items()}
    model = get_hyperformer_model(tiny_t5(), tiny_config("finetuning"))
    official.load_state_dict(model, theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in official.export(model).items())
    with pytest.raises(ValueError, match="'adapters' has no official names"):
        official.export(tiny_model("adapters"))


def test_every_trained_parameter_of_the_adapters_moves_and_nothing_else():
    model = tiny_model("adapters", tiny_t5(dropout=0.1, dtype=torch.float32)).train()
    before = bits(model)
    train(model)
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {
        name
        for name, _ in model.named_parameters()
        if (name.startswith("t5.") and "layer_norm" not in name) or name.endswith((".stsb", ".cola"))
    }


@pytest.mark.parametrize(
    "changes", [{"feed_forward_proj": "gelu"}, {"layer_norm_epsilon": 1e-2}, {"tie_word_embeddings": False}], ids=str
)
def test_finetuned_weights_are_refused_by_a_t5_that_computes_otherwise(tmp_path, changes):
    tiny_model("finetuning").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained on another T5: .* was"):
        HyperFormerModel.from_pretrained(tmp_path, tiny_t5(**changes))
