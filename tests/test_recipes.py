"""Recipes: what they set, how weights start, adapters that start as the identity, normalised embeddings."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from support import t5s
from support.old_files import without_recipe
from support.t5s import TASKS, batch, bits, tiny_t5
from torch import nn

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model, official
from hyperformer_fast.hypernetwork import HyperNetwork, TaskEmbeddings
from hyperformer_fast.initialisation import (
    POST_GAMMA,
    TASK_PART,
    TASK_SHARE,
    UP_SHARE,
    Initialisation,
    last_parts,
    plain_starts,
)
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.recipes import RECIPES
from hyperformer_fast.variants import HYPERNETWORK_VARIANTS

NORMS = list(itertools.product([False, True], repeat=2))
WITH_ADAPTERS = (*HYPERNETWORK_VARIANTS, "adapters")


def tiny_config(variant="hyperformer++", tasks=TASKS, **changes):
    return t5s.tiny_config(variant, tasks, **{"recipe": "default", **changes})


def tiny_model(variant="hyperformer++", t5=None, **changes):
    return t5s.tiny_model(variant, t5, **{"recipe": "default", **changes})


def norm_fields(before, after):
    return {"add_layer_norm_before_adapter": before, "add_layer_norm_after_adapter": after}


# The configuration


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_is_left_open(name):
    config, recipe = HyperFormerConfig(tasks=["a"], recipe=name), RECIPES[name]
    said = (config.init_weights, config.zero_delta, config.normalize_embeddings)
    assert said == (recipe.init_weights, recipe.zero_delta, recipe.normalize_embeddings)
    other = HyperFormerConfig(tasks=["a"], recipe=name, init_weights="hyperfan_out", zero_delta=not recipe.zero_delta)
    assert (other.init_weights, other.zero_delta) == ("hyperfan_out", not recipe.zero_delta)
    assert other.normalize_embeddings == recipe.normalize_embeddings
    assert HyperFormerConfig.from_dict(other.to_dict()) == other == other.replace()


def test_changing_the_recipe_changes_what_it_sets():
    config = HyperFormerConfig(tasks=["a"])
    assert config.recipe == "default" and config.replace(recipe="authors").init_weights == "authors"
    assert config.replace(recipe="authors").replace(recipe="default") == config
    assert config.replace(recipe="authors", zero_delta=True).zero_delta


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"recipe": "best"}, ["recipe", "'best'", *RECIPES]),
        ({"recipe": None}, ["recipe", "None"]),
        ({"init_weights": "xavier"}, ["init_weights", "'xavier'", "hyperfan_in"]),
        ({"zero_delta": "yes"}, ["zero_delta", "'yes'"]),
        ({"normalize_embeddings": 1}, ["normalize_embeddings", "1"]),
    ],
)
def test_wrong_values_are_named(fields, names):
    with pytest.raises((ValueError, TypeError)) as error:
        HyperFormerConfig(tasks=["a"], **fields)
    assert all(name in str(error.value) for name in names)


def test_a_configuration_that_was_saved_without_a_recipe_is_the_authors(tmp_path):
    fields = HyperFormerConfig(tasks=["a"], recipe="authors").to_dict()
    for name in ("recipe", "init_weights", "zero_delta", "normalize_embeddings"):
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = HyperFormerConfig.load(tmp_path / "config.json")
    assert config == HyperFormerConfig(tasks=["a"], recipe="authors") == HyperFormerConfig.from_dict(fields)
    assert HyperFormerConfig(tasks=["a"]).recipe == "default"


def test_the_authors_files_have_their_recipe():
    theirs = {"tasks": ["a"], "efficient_unique_hyper_net": True}
    config = HyperFormerConfig.from_official(theirs)
    assert config.recipe == config.init_weights == "authors" and not config.normalize_embeddings
    assert HyperFormerConfig.from_official(theirs, recipe="default").init_weights == RECIPES["default"].init_weights


def test_a_checkpoint_without_a_recipe_computes_what_it_did(tmp_path):
    model = tiny_model(recipe="authors").eval()
    expected = model(**batch(), task="cola").logits
    model.save_pretrained(tmp_path)
    without_recipe(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    assert loaded.hyperformer_config == model.hyperformer_config
    assert torch.equal(loaded.eval()(**batch(), task="cola").logits, expected)


# How weights start


def authors_draws(config, d, layers):
    """The weights that a HyperFormer++ of the authors starts with, one call after the other."""

    def linear(inputs, outputs):
        layer = nn.Linear(inputs, outputs)
        return [nn.init.normal_(layer.weight, std=1e-2), nn.init.zeros_(layer.bias)]

    dim, hidden, k = config.task_embedding_dim, config.task_hidden_dim, config.projected_task_embedding_dim
    rows = AdapterLayout(d, config.bottleneck(d)).numel
    drawn = [nn.Embedding(layers, dim).weight, nn.Embedding(2, dim).weight]
    drawn += [*linear(3 * dim, hidden), *linear(hidden, k), torch.ones(k), torch.zeros(k)]
    return [*drawn, torch.empty(1, rows, k).normal_(std=1e-2), torch.zeros(1, rows)]


def test_the_authors_recipe_draws_as_before_there_were_recipes():
    config = tiny_config(recipe="authors")
    torch.manual_seed(5)
    net, embeddings = HyperNetwork(config, 32, 3), TaskEmbeddings(config)
    torch.manual_seed(5)
    expected = authors_draws(config, 32, 3) + [torch.randn(6) for _ in TASKS]
    found = [*net.parameters(), *embeddings.parameters()]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
@pytest.mark.parametrize(("before", "after"), NORMS)
@pytest.mark.parametrize("variant", WITH_ADAPTERS)
def test_generated_weights_have_the_variance_of_plain_ones(variant, before, after, init):
    torch.manual_seed(0)
    sizes = {"task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 96, "reduction_factor": 4}
    config = tiny_config(
        variant, [f"task{i}" for i in range(40)], init_weights=init, **norm_fields(before, after), **sizes
    )
    model = get_hyperformer_model(tiny_t5(d_model=64, dtype=torch.float32), config, fuse=False)
    net = model.hypernetworks["encoder"]
    parts = net.layout.unpack(net(model.task_embeddings()).detach())
    d, b = 64, 16
    expected = {"hyperfan_in": ((2 / d) ** 0.5, (1 / b) ** 0.5), "hyperfan_out": ((2 / b) ** 0.5, (1 / d) ** 0.5)}[init]
    down, up = parts["down_weight"], parts["up_weight"]
    torch.testing.assert_close(down.std().item(), expected[0], rtol=0.1, atol=0)
    torch.testing.assert_close(up.std().item(), expected[1] * UP_SHARE, rtol=0.1, atol=0)
    assert not parts["down_bias"].any() and not parts["up_bias"].any()
    for norm, gamma in (("pre", 1.0), ("post", POST_GAMMA)):
        if f"{norm}_gamma" in parts:
            share = 0.0 if variant == "adapters" else TASK_SHARE * gamma
            for part, mean in ((f"{norm}_gamma", gamma), (f"{norm}_beta", 0.0)):
                torch.testing.assert_close(parts[part].mean().item(), mean, rtol=1e-5, atol=share / 2)
                torch.testing.assert_close(parts[part].std().item(), share, rtol=0.3, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "mean_square"),
    [
        ({}, 1.0),
        ({"unique_hyper_net_layer_norm": False}, 1.0),
        ({"task_projector": False, "unique_hyper_net_layer_norm": False}, 3.0),
        ({"task_projector": False}, 1.0),
        ({"train_task_embeddings": True, "variant": "hyperformer"}, 1.0),
        ({"normalize_embeddings": False}, 1.0),
    ],
)
def test_generators_read_what_their_start_assumes(fields, mean_square):
    torch.manual_seed(0)
    sizes = {"task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 256}
    config = tiny_config(tasks=[f"task{i}" for i in range(40)], **{**sizes, **fields})
    embeddings, net = TaskEmbeddings(config), HyperNetwork(config, 32, 6)
    e = net.embeddings(embeddings())
    torch.testing.assert_close(e.square().mean().item(), mean_square, rtol=0.15, atol=0)
    down = net.layout.unpack(net(embeddings()))["down_weight"]
    torch.testing.assert_close(down.square().mean().item(), 2 / 32, rtol=0.15, atol=0)


@pytest.mark.parametrize("variant", ["hyperformer++", "hyperformer-shared"])
@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out", "authors"])
def test_what_projectors_read_is_the_task_s_for_the_most_part(variant, init):
    torch.manual_seed(0)
    config = tiny_config(variant, init_weights=init, task_embedding_dim=256, task_hidden_dim=512)
    first = HyperNetwork(config, 32, 6).projector[0]
    parts = 3 if variant == "hyperformer++" else 2
    sizes = [part.square().sum().item() for part in first.weight.detach().chunk(parts, 1)]
    expected = [1 / parts] * parts if init == "authors" else [TASK_PART] + [(1 - TASK_PART) / (parts - 1)] * (parts - 1)
    for size, share in zip(sizes, expected, strict=True):
        assert size / sum(sizes) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
def test_a_plain_adapter_keeps_the_size_of_what_passes(init):
    """Forward for fan-in, backward for fan-out, through ReLU, whose halving the factor 2 is for."""
    torch.manual_seed(0)
    layout = AdapterLayout(256, 64, post_norm=False)
    stds = {name: start.std for name, start in plain_starts(layout, Initialisation(init)).items()}
    down, up = torch.randn(64, 256) * stds["down_weight"], torch.randn(256, 64) * stds["up_weight"] / UP_SHARE
    x = torch.randn(4096, 256, requires_grad=True)
    y = torch.relu(x @ down.T) @ up.T
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    kept = y if init == "hyperfan_in" else gradient
    torch.testing.assert_close(kept.square().mean().item(), 1.0, rtol=0.1, atol=0)


# Adapters that start as the identity


@pytest.mark.parametrize("fuse", [False, "auto"])
@pytest.mark.parametrize("init", ["authors", "hyperfan_in"])
@pytest.mark.parametrize(("before", "after"), NORMS)
@pytest.mark.parametrize("variant", [*WITH_ADAPTERS, "plain norms", "only norms"])
def test_zero_delta_starts_as_the_frozen_t5(variant, before, after, init, fuse):
    fields = {"plain norms": {"conditional_layer_norm": False}, "only norms": {"train_adapters_blocks": False}}
    if variant == "only norms" and not (before or after):
        pytest.skip("leaves nothing of the adapters")
    config = tiny_config(
        variant if variant in WITH_ADAPTERS else "hyperformer",
        init_weights=init,
        zero_delta=True,
        **norm_fields(before, after),
        **fields.get(variant, {}),
    )
    model = get_hyperformer_model(tiny_t5(dtype=torch.float32), config, fuse)
    ids = batch()
    with torch.no_grad():
        for task in ("cola", ["mnli", "stsb", "cola", "mnli"]):
            assert torch.equal(model(**ids, task=task).logits, model(**ids, task_index=torch.full((4,), -1)).logits)
        if not fuse:
            assert torch.equal(model(**ids, task="cola").logits, tiny_t5(dtype=torch.float32)(**ids).logits)
    model.train()
    before_training = trained(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(**ids, task=["mnli", "stsb", "cola", "mnli"]).loss.backward()
        optimizer.step()
    for name, value in trained(model).items():
        assert value.isfinite().all() and not torch.equal(value, before_training[name]), f"{name} does not learn"


def trained(model):
    return {name: value for name, value in bits(model).items() if model.get_parameter(name).requires_grad}


def test_zero_delta_zeroes_the_last_factor_alone():
    for before, after in NORMS:
        layout = AdapterLayout(8, 2, before, after)
        plain, zero = (plain_starts(layout, Initialisation("hyperfan_in", flag)) for flag in (False, True))
        differ = {name for name in plain if plain[name] != zero[name]}
        assert differ == {last_parts(layout)[0]} and not any(zero[last_parts(layout)[1]])


# Normalised embeddings


def test_no_embedding_can_drown_another():
    model = tiny_model(normalize_embeddings=True).eval()
    embeddings, net = model.task_embeddings, model.hypernetworks["encoder"]
    expected = net(embeddings())
    with torch.no_grad():
        net.layer_embeddings.weight[1] *= 100
        net.position_embeddings.weight *= 0.5
        embeddings.task_to_embeddings["mnli"] *= 7
    torch.testing.assert_close(net(embeddings()), expected, rtol=1e-4, atol=1e-5)
    plain = tiny_model(normalize_embeddings=False)
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        changed.hypernetworks["encoder"].layer_embeddings.weight[1] *= 100
    nets = (each.hypernetworks["encoder"](each.task_embeddings()) for each in (plain, changed))
    assert (next(nets) - next(nets)).abs().max() > 0.1


@pytest.mark.parametrize("variant", HYPERNETWORK_VARIANTS)
@pytest.mark.parametrize("projected", [False, True])
def test_what_is_read_has_a_root_mean_square_of_1(variant, projected, monkeypatch):
    config = tiny_config(variant, train_task_embeddings=projected, normalize_embeddings=True)
    embeddings, net = TaskEmbeddings(config), HyperNetwork(config, 32, 3)
    read = []
    for module in (embeddings, net):
        projector = getattr(module, "projector", None)
        if projector is not None:
            projector.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    net.generator.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    net(embeddings())
    assert len(read) == 1 + projected + (variant != "hyperformer")
    for each in read if variant == "hyperformer" else read[:-1]:
        parts = each.unflatten(-1, (-1, 6))
        torch.testing.assert_close(parts.square().mean(-1), torch.ones(parts.shape[:-1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", HYPERNETWORK_VARIANTS)
def test_normalised_embeddings_have_gradients_even_where_they_are_zero(variant):
    model = tiny_model(variant, normalize_embeddings=True)
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["mnli"].zero_()
        for net in model.hypernetworks.values():
            if variant != "hyperformer":
                net.layer_embeddings.weight[0].zero_()
    out = model(**batch(), task=["mnli", "stsb", "cola", "mnli"])
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    net, task = model.hypernetworks["encoder"], torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (task,), fast_mode=True)


@pytest.mark.parametrize("variant", HYPERNETWORK_VARIANTS)
def test_kept_weights_are_those_of_a_forward(variant):
    model = tiny_model(variant, normalize_embeddings=True).eval()
    expected = [model(**batch(), task=task).logits.detach() for task in TASKS]  # with gradients: nothing is kept
    model.prepare()
    with torch.no_grad():
        for task, wanted in zip(TASKS, expected):
            torch.testing.assert_close(model(**batch(), task=task).logits, wanted, rtol=1e-9, atol=1e-9)


def test_added_tasks_are_normalised_and_saved(tmp_path):
    model = tiny_model(normalize_embeddings=True).eval()
    model.add_task("new", "cola")
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["new"] *= 3
    inputs = batch()
    out = model(**inputs, task="new").logits
    torch.testing.assert_close(out, model(**inputs, task="cola").logits, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5()).eval()
    assert loaded.hyperformer_config.normalize_embeddings
    assert torch.equal(loaded(**inputs, task="new").logits, out)


def test_normalised_embeddings_have_no_official_names():
    model = tiny_model(normalize_embeddings=True)
    with pytest.raises(ValueError, match="normalize_embeddings=True has no official counterpart"):
        official.export(model)
