"""How far apart the tasks are, against adapters that are generated and compared number by number, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.t5s import TASKS, tiny_config, tiny_model, tiny_t5

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.task_similarity import COLLAPSED, collapse_explained, task_similarity

STACKS = ("encoder", "decoder")


def fresh_model(variant="hyperformer++", **changes):
    """A model as it is at the start of a training."""
    torch.manual_seed(5)
    return get_hyperformer_model(tiny_t5(), tiny_config(variant, **changes))


def packed_of(model, stack):
    net = model.hypernetworks[stack]
    with torch.no_grad():
        return net, net(model.task_embeddings())


def pairs(values):
    return values[np.triu_indices(len(values), 1)]


@pytest.mark.parametrize("variant", ["hyperformer++", "hyperformer-shared", "hyperformer", "adapters"])
@pytest.mark.parametrize("recipe", ["authors", "default"])
@pytest.mark.parametrize("changes", [{}, {"conditional_layer_norm": False, "add_layer_norm_before_adapter": True}])
def test_figures_are_those_of_generated_adapters(variant, changes, recipe):
    model = tiny_model(variant, recipe=recipe, **changes)
    with torch.no_grad():
        for net in model.hypernetworks.values():
            if variant != "adapters":
                net.generator.bias.normal_(std=0.3)
    figures, similarity = task_similarity(model).figures(), task_similarity(model)
    for stack in STACKS:
        net, packed = packed_of(model, stack)
        shares_norms = variant == "adapters" or (variant == "hyperformer" and changes)
        if shares_norms:
            packed = packed[..., : -net.layout.norm_numel]
        vectors = packed.transpose(0, 1).flatten(1).numpy()
        own = vectors - vectors.mean(0)
        cosine, whole = pairs(_cosines(own)), pairs(_cosines(vectors))
        expected = {
            "weight_cosine_mean": whole.mean(),
            "weight_cosine_max": whole.max(),
            "own_weight_cosine_mean": cosine.mean(),
            "own_weight_cosine_max": cosine.max(),
            "weight_variation": (own**2).sum() / (vectors**2).sum(),
        }
        for part in ("down_weight", "up_weight"):
            numbers = packed[..., net.layout.slices[part]]
            plain = 0.01 if recipe == "authors" else {"down_weight": 2 / 32, "up_weight": 1 / 4}[part] ** 0.5
            expected[f"{part}_ratio"] = float(numbers.square().mean().sqrt()) / plain
        for name, value in expected.items():
            assert figures[f"{stack}/{name}"] == pytest.approx(value, rel=1e-9), name
        distance = ((vectors[0] - vectors[1]) ** 2).sum() / ((vectors[0] ** 2).sum() + (vectors[1] ** 2).sum()) * 2
        assert similarity.stacks[stack].weights.distances()[0, 1] == pytest.approx(distance, rel=1e-9)
        if variant == "adapters":
            assert f"{stack}/input_cosine_mean" not in figures
            continue
        with torch.no_grad():
            e = net.embeddings(model.task_embeddings()).transpose(0, 1).flatten(1).numpy()
        assert figures[f"{stack}/input_cosine_max"] == pytest.approx(pairs(_cosines(e)).max(), rel=1e-9)
    if variant != "adapters":
        raw = torch.stack(list(model.task_embeddings.task_to_embeddings.values())).detach().numpy()
        assert figures["task_embedding_cosine_mean"] == pytest.approx(pairs(_cosines(raw)).mean(), rel=1e-9)


def _cosines(vectors):
    lengths = np.linalg.norm(vectors, axis=1)
    return vectors @ vectors.T / np.outer(lengths, lengths)


@pytest.mark.parametrize("variant", ["hyperformer++", "hyperformer-shared", "hyperformer", "adapters"])
@pytest.mark.parametrize("recipe", ["authors", "default"])
def test_a_model_at_its_start_has_not_collapsed(variant, recipe):
    wide = {"task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 128}  # the paper's
    for seed in range(3):
        torch.manual_seed(seed)
        similarity = task_similarity(get_hyperformer_model(tiny_t5(), tiny_config(variant, recipe=recipe, **wide)))
        assert similarity.collapsed() == {}
        for stack in similarity.stacks.values():
            assert pairs(stack.weights.distances()).min() > 10 * COLLAPSED


@pytest.mark.parametrize("variant", ["hyperformer++", "hyperformer-shared", "hyperformer"])
@pytest.mark.parametrize("recipe", ["authors", "default"])
def test_norms_alone_have_not_collapsed_at_their_start(variant, recipe):
    torch.manual_seed(0)
    narrow = {"task_embedding_dim": 16, "projected_task_embedding_dim": 16, "task_hidden_dim": 32}
    config = tiny_config(variant, [f"task{i}" for i in range(20)], recipe=recipe, train_adapters_blocks=False, **narrow)
    model = get_hyperformer_model(tiny_t5(), config)
    assert task_similarity(model).collapsed() == {}
    with torch.no_grad():
        for net in model.hypernetworks.values():
            net.generator.weight.zero_()
            net.generator.bias.fill_(1.0)
    assert set(task_similarity(model).collapsed()) == set(STACKS)


def collapse_embeddings(model):
    table = model.task_embeddings.task_to_embeddings
    table["stsb"].copy_(table["cola"] * 1.0001)


def collapse_projectors(model):
    for net in model.hypernetworks.values():
        net.projector[0].bias.fill_(-1000.0)  # no hidden unit is above zero any more


def collapse_generators(model):
    for net in model.hypernetworks.values():
        net.generator.bias.normal_(std=100.0)


@pytest.mark.parametrize(
    ("collapse", "pair", "why"),
    [
        (collapse_embeddings, ("stsb", "cola"), "because their task embeddings are the same"),
        (collapse_projectors, ("mnli", "stsb"), "projector makes the same of their different embeddings"),
        (collapse_generators, ("mnli", "stsb"), "has outgrown the part that it makes of the task"),
    ],
)
def test_a_collapse_names_its_tasks_and_its_cause(collapse, pair, why):
    model = fresh_model()
    with torch.no_grad():
        collapse(model)
    similarity = task_similarity(model)
    collapsed = similarity.collapsed()
    assert set(collapsed) == set(STACKS) and collapsed["encoder"][0] == pair
    text = collapse_explained(similarity, 0.01, "authors")
    assert why in text and repr(pair[0]) in text and repr(pair[1]) in text and "learning_rate (now 0.01)" in text
    assert 'recipe "default"' in text and 'recipe "default"' not in collapse_explained(similarity, 0.01, "default")
    assert ("and the size of its projections is" in text) == (collapse is collapse_generators)
    assert ("and 2 more of 3 pairs" in text) == (collapse is not collapse_embeddings)


def test_tasks_that_share_an_embedding_on_purpose_are_one():
    sharing = {"mnli": "nli", "stsb": "sim", "cola": "nli"}
    similarity = task_similarity(fresh_model(task_to_embeddings=sharing))
    assert similarity.names == ["mnli", "stsb"] and similarity.collapsed() == {}
    assert "encoder/weight_variation" in similarity.figures()


def test_two_tasks_have_no_cosine_of_what_is_their_own():
    """Minus their mean two vectors are each other's negative, whatever they are."""
    similarity = task_similarity(fresh_model(tasks=["mnli", "cola"]))
    assert "encoder/weight_cosine_mean" in similarity.figures()
    assert not any("own_weight_cosine" in name for name in similarity.figures())
    assert similarity.stacks["encoder"].weights.own_cosines() == pytest.approx(-1)


def test_one_task_has_no_pairs():
    similarity = task_similarity(fresh_model(tasks=["mnli"]))
    assert set(similarity.figures()) == {f"{s}/{p}_weight_ratio" for s in STACKS for p in ("down", "up")}
    assert similarity.collapsed() == {}


def test_models_without_projections_or_adapters_have_what_there_is():
    figures = task_similarity(fresh_model(train_adapters_blocks=False)).figures()
    assert "encoder/weight_cosine_mean" in figures and "encoder/down_weight_ratio" not in figures
    assert task_similarity(fresh_model("finetuning")).figures() == {}


@pytest.mark.parametrize("init_weights", ["authors", "hyperfan_in", "hyperfan_out"])
@pytest.mark.parametrize("variant", ["adapters", "hyperformer++"])
def test_sizes_are_multiples_of_a_plain_layers(init_weights, variant):
    """The up-projection starts at a tenth of it, but with the authors' weights, whose plain size is their 1e-2."""
    changes = {"task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 128}
    figures = task_similarity(fresh_model(variant, init_weights=init_weights, **changes)).figures()
    authors = init_weights == "authors"
    # the authors' generators, which read 64 numbers of mean square 1, make weights with eight times this deviation
    generated = 8 if authors and variant == "hyperformer++" else 1
    assert figures["encoder/down_weight_ratio"] == pytest.approx(generated, rel=0.15)
    assert figures["encoder/up_weight_ratio"] == pytest.approx(generated if authors else 0.1, rel=0.15)


def test_the_up_projection_has_its_size_with_a_post_norm_that_starts_at_zero():
    assert "encoder/up_weight_ratio" in task_similarity(fresh_model(zero_delta=True)).figures()


@pytest.mark.parametrize(
    ("init_weights", "multiple"),
    [("authors", "the standard deviation 1e-2 of the authors' plain layers"), ("hyperfan_in", "a plain layer's")],
)
def test_the_warning_says_what_large_projections_are_a_multiple_of(init_weights, multiple):
    for times in (5, 15):
        model = fresh_model("adapters", init_weights=init_weights)
        std = 0.01 if init_weights == "authors" else (1 / 4) ** 0.5
        with torch.no_grad():
            for net in model.hypernetworks.values():
                for adapters in net.adapters.values():
                    adapters[:, net.layout.slices["down_weight"]] = 0
                    adapters[:, net.layout.slices["up_weight"]] = times * std
        text = collapse_explained(task_similarity(model), 0.01, "default")
        assert (f"and the size of its projections is 15 times {multiple}" in text) == (times == 15)
        assert ("projections" in text) == (times == 15)


def test_a_projection_that_starts_at_zero_has_no_size():
    figures = task_similarity(fresh_model(zero_delta=True, add_layer_norm_after_adapter=False)).figures()
    assert "encoder/up_weight_ratio" not in figures and figures["encoder/down_weight_ratio"] > 0


def test_a_common_part_that_dwarfs_what_differs_hides_no_collapse():
    """In float32 the inner products of whole weights would be all rounding."""
    model = fresh_model().float()
    with torch.no_grad():
        for net in model.hypernetworks.values():
            net.generator.bias.fill_(1e4)
    assert TASKS[:2] == ["mnli", "stsb"]
    weights = task_similarity(model).stacks["encoder"].weights
    net, packed = packed_of(model.double(), "encoder")
    vectors = packed.transpose(0, 1).flatten(1).numpy()
    expected = ((vectors[0] - vectors[1]) ** 2).sum() / ((vectors[:2] ** 2).sum() / 2)
    assert 0 < expected < 1e-8
    assert weights.distances()[0, 1] == pytest.approx(expected, rel=1e-3)
