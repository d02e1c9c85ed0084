from __future__ import annotations

import pytest

from hyperformer_fast.config import VARIANTS, HyperFormerConfig

TASKS = ["cola", "mnli"]


def test_defaults_are_those_of_the_published_plus_plus_config():
    config = HyperFormerConfig(tasks=TASKS)
    assert (config.variant, config.non_linearity, config.reduction_factor) == ("hyperformer++", "gelu_new", 32)
    assert (config.task_embedding_dim, config.projected_task_embedding_dim, config.task_hidden_dim) == (64, 64, 128)
    assert (config.unique_hyper_net, config.efficient_unique_hyper_net) == (False, True)


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        ((False, True), "hyperformer++"),
        ((True, True), "hyperformer++"),
        ((True, False), "hyperformer-shared"),
        ((False, False), "hyperformer"),
        ((None, True), "hyperformer++"),
        ((True, None), "hyperformer-shared"),
        ((None, False), "hyperformer"),
    ],
)
def test_flags_select_the_variant(flags, variant):
    config = HyperFormerConfig(tasks=TASKS, unique_hyper_net=flags[0], efficient_unique_hyper_net=flags[1])
    assert config.variant == variant
    assert HyperFormerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ("hyperformer", {"unique_hyper_net": True}),
        ("hyperformer", {"efficient_unique_hyper_net": True}),
        ("hyperformer-shared", {"unique_hyper_net": False}),
        ("hyperformer-shared", {"efficient_unique_hyper_net": True}),
        ("hyperformer++", {"efficient_unique_hyper_net": False}),
    ],
)
def test_variant_and_flags_that_disagree_are_an_error(variant, flags):
    (name, value), *_ = flags.items()
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        HyperFormerConfig(tasks=TASKS, variant=variant, **flags)


@pytest.mark.parametrize("variant", ["adapters", "finetuning"])
def test_the_baselines_survive_a_round_trip_and_a_change(variant):
    config = HyperFormerConfig(tasks=TASKS, variant=variant)
    assert HyperFormerConfig.from_dict(config.to_dict()) == config and not config.has_hypernetworks
    assert config.replace(tasks=["x"]).variant == variant
    assert config.replace(variant="hyperformer++") == HyperFormerConfig(tasks=TASKS)


@pytest.mark.parametrize("variant", ["hyperformer++", "hyperformer-shared"])
def test_a_switch_without_effect_is_warned_of_and_set_to_what_is_done(variant):
    with pytest.warns(UserWarning, match=f"conditional_layer_norm=False has no effect: variant '.*{variant[-5:]}") as w:
        config = HyperFormerConfig(tasks=TASKS, variant=variant, conditional_layer_norm=False)
    assert config.conditional_layer_norm and config == config.replace() and w[0].filename == __file__


def test_efficient_flag_wins_over_the_other():
    config = HyperFormerConfig(
        tasks=TASKS, variant="hyperformer++", unique_hyper_net=True, efficient_unique_hyper_net=True
    )
    assert config.variant == "hyperformer++"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tasks": []}, ["tasks", "[]"]),
        ({"tasks": "cola"}, ["tasks", "cola"]),
        ({"tasks": ["a", "a"]}, ["tasks", "'a'"]),
        ({"tasks": ["\udc80"]}, ["udc80", "surrogate"]),
        ({"tasks": [3]}, ["3"]),
        ({"variant": "hyper"}, ["variant", "'hyper'", *VARIANTS]),
        ({"non_linearity": "tanh"}, ["non_linearity", "'tanh'", "gelu_new"]),
        ({"non_linearity": None}, ["non_linearity", "None"]),
        ({"reduction_factor": 0}, ["reduction_factor", "0", "at least 1"]),
        ({"reduction_factor": 2.0}, ["reduction_factor", "2.0", "integer"]),
        ({"task_hidden_dim": True}, ["task_hidden_dim", "True"]),
        ({"conditional_layer_norm": "yes"}, ["conditional_layer_norm", "'yes'"]),
        ({"unique_hyper_net": 1}, ["unique_hyper_net", "1"]),
        ({"task_to_embeddings": {"cola": "x"}}, ["task_to_embeddings", "mnli"]),
        ({"task_to_embeddings": ["x", "y"]}, ["task_to_embeddings"]),
        ({"train_task_embeddings": True, "task_embedding_dim": 32}, ["train_task_embeddings", "64", "32"]),
        ({"train_task_embeddings": True, "task_projector": False}, ["train_task_embeddings=True", "task_projector"]),
        ({"variant": "adapters", "task_projector": False}, ["task_projector=False", "'adapters'", "hyperformer++"]),
        ({"variant": "finetuning", "train_adapters_blocks": False}, ["train_adapters_blocks=False", "'finetuning'"]),
        ({"variant": "adapters", "freeze_model_but_task_embeddings": True}, ["embeddings=True", "'adapters'"]),
        ({"train_adapters_blocks": False, "add_layer_norm_after_adapter": False}, ["train_adapters_blocks", "norm"]),
        (
            {"variant": "hyperformer", "train_adapters_blocks": False, "conditional_layer_norm": False},
            ["train_adapters_blocks=False", "conditional_layer_norm=False"],
        ),
        ({"variant": "adapters", "unique_hyper_net": True}, ["variant='adapters'", "unique_hyper_net=True"]),
    ],
)
def test_every_message_names_field_and_value(fields, names):
    with pytest.raises((ValueError, TypeError)) as error:
        HyperFormerConfig(**{"tasks": TASKS, **fields})
    for name in names:
        assert name in str(error.value)


def test_no_bottleneck_left_is_an_error():
    config = HyperFormerConfig(tasks=TASKS, reduction_factor=32)
    assert config.bottleneck(768) == 24
    assert config.bottleneck(63) == 1
    with pytest.raises(ValueError, match="reduction_factor=32.*d=31"):
        config.bottleneck(31)


def test_json_round_trip(tmp_path):
    config = HyperFormerConfig(
        tasks=TASKS, variant="hyperformer", task_to_embeddings={"cola": "e", "mnli": "e"}, non_linearity="swish"
    )
    config.save(tmp_path / "config.json")
    assert HyperFormerConfig.load(tmp_path / "config.json") == config
    assert config.non_linearity == "silu" and config.embedding_names == ["e"]


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    for text in ("{", "[]", '{"tasks": ["a"], "reduction": 3}', "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            HyperFormerConfig.load(path)


def test_instances_share_no_state():
    tasks = ["a", "b"]
    mapping = {"a": "x", "b": "y"}
    one, two = (HyperFormerConfig(tasks=tasks, task_to_embeddings=mapping) for _ in range(2))
    one.tasks.append("c")
    one.task_to_embeddings["c"] = "z"
    one.reduction_factor = 8
    assert two.tasks == tasks == ["a", "b"] and two.task_to_embeddings == mapping == {"a": "x", "b": "y"}
    assert two.reduction_factor == 32
    copied = two.to_dict()
    copied["tasks"].append("c")
    assert two.tasks == ["a", "b"]


def test_official_dicts_keep_their_meaning():
    config = HyperFormerConfig.from_official({"tasks": TASKS})
    assert (config.variant, config.non_linearity, config.reduction_factor) == ("hyperformer", "silu", 16)
    assert not config.generates_norms
    plus = HyperFormerConfig.from_official({"tasks": TASKS, "efficient_unique_hyper_net": True})
    assert plus.variant == "hyperformer++" and plus.generates_norms


def test_replace():
    config = HyperFormerConfig(tasks=TASKS)
    assert config.replace(variant="hyperformer").variant == "hyperformer"
    assert config.replace(efficient_unique_hyper_net=False).variant == "hyperformer"
    assert config.replace(reduction_factor=8).variant == "hyperformer++"
    with pytest.raises(ValueError, match="unknown task 'x'.*cola, mnli"):
        config.task_id("x")
