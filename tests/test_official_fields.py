"""The authors' JSON files: which are read, which are refused and how, and what is said of their other fields."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from support.t5s import tiny_model, tiny_t5

from hyperformer_fast import HyperFormerConfig, official
from hyperformer_fast.training import RunConfig

TASKS = ["rte", "sst2"]
#: What all of the authors' files hold, and what each adds (github.com/rabeehk/hyperformer, hyperformer/configs).
COMMON = {
    "model_name_or_path": "t5-base", "tokenizer_name": "t5-base", "learning_rate": 3e-4, "max_source_length": 128,
    "label_smoothing": 0.1, "task_embedding_dim": 512, "non_linearity": "gelu_new", "max_steps": 65536,
    "evaluation_strategy": "steps", "tasks": TASKS, "eval_tasks": TASKS,
}  # fmt: skip
ADAPTERS = {"train_adapters": True, "reduction_factor": 32, "unfreeze_lm_head": False, "unfreeze_layer_norms": True}
HYPER = ADAPTERS | {"projected_task_embedding_dim": 64, "task_embedding_dim": 64, "conditional_layer_norm": True}
FILES = {
    "finetune": {},
    "adapters": ADAPTERS | {"adapter_config_name": "adapter"},
    "hyperformer": HYPER | {"unique_hyper_net": True, "adapter_config_name": "meta-adapter"},
    "hyperformer++": HYPER | {"efficient_unique_hyper_net": True, "adapter_config_name": "meta-adapter"},
}


def silently(fields, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return HyperFormerConfig.from_official(fields, **changes)


@pytest.mark.parametrize(("name", "variant"), [("hyperformer", "hyperformer-shared"), ("hyperformer++",) * 2])
def test_their_hyperformers_are_read_from_a_mapping_or_a_path(tmp_path, name, variant):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(COMMON | FILES[name]))
    with pytest.warns(
        UserWarning, match="eval_tasks, evaluation_strategy, .*tokenizer_name: they configure the authors"
    ) as w:
        configs = [HyperFormerConfig.from_official(given) for given in (COMMON | FILES[name], path, str(path))]
    assert {warning.filename for warning in w} == {__file__}
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0].variant, configs[0].task_embedding_dim, configs[0].non_linearity) == (variant, 64, "gelu_new")
    said = str(w[0].message)
    assert not [name for name in HYPER if name in said] and "adapter_config_name" not in said


@pytest.mark.parametrize("name", ["finetune", "adapters"])
def test_their_other_methods_are_refused_by_name(tmp_path, name):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(COMMON | FILES[name]))
    method = {"finetune": "fine-tuning of the whole T5", "adapters": "plain adapters"}[name]
    with pytest.raises(ValueError, match=f"{name}.json: .*another method.*{method}.*hyperformer-shared"):
        HyperFormerConfig.from_official(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_adapters": False}, r"fine-tuning of the whole T5 \(train_adapters=False\)"),
        ({"train_adapters": "yes"}, "train_adapters must be true or false, got 'yes'"),
        ({"adapter_config_name": "prefix"}, "adapter_config_name='prefix'"),
        ({"train_adapters_blocks": False}, "training without adapters"),
        ({"unfreeze_model": True}, "unfreeze_model=True is not supported: it trains the whole T5"),
        ({"freeze_model_but_task_embeddings": True}, r"model.hypernetworks.requires_grad_\(False\)"),
        ({"freeze_encoder": True}, "freeze_encoder=True is not supported"),
        ({"generate_classifier_weights": True}, "generates the output head"),
        ({"dropout": 0.2}, "dropout=0.2 is not supported: it belongs to the T5"),
        ({"task_embeddings": ["rte"]}, r"an embedding for each of tasks, got \['rte'\]"),
        ({"task_embeddings": TASKS, "task_to_embeddings": dict(zip(TASKS, TASKS[::-1]))}, "disagree"),
        ({"variant": "hyperformer"}, "HyperFormerConfig.load"),
        ({"hyperformer": {"variant": "hyperformer++"}}, "a run's configuration of this library"),
    ],
)
def test_what_would_be_another_model_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        HyperFormerConfig.from_official({"tasks": TASKS, **fields})


def test_fields_that_change_nothing_are_read_silently_and_task_embeddings_are_honoured():
    quiet = {"train_adapters": True, "adapter_config_name": "meta-adapter", "train_adapters_blocks": True}
    quiet |= {"unfreeze_model": False, "freeze_model": False, "dropout": None, "freeze_embeds": True}
    assert silently({"tasks": TASKS, **quiet}) == silently({"tasks": TASKS})
    config = silently({"tasks": TASKS, "task_embeddings": ["mnli", "mnli"]})
    assert config.task_to_embeddings == {"rte": "mnli", "sst2": "mnli"} and config.embedding_names == ["mnli"]
    assert silently({"tasks": TASKS, "task_embeddings": None}).task_to_embeddings is None
    assert silently({"tasks": TASKS}, variant="hyperformer++").variant == "hyperformer++"


def test_fields_without_effect_and_unknown_ones_are_told_apart():
    with pytest.warns(UserWarning) as found:
        HyperFormerConfig.from_official({"tasks": TASKS, "hidden_dim": 3, "seed": 1, "reduction_facter": 16})
    (said,) = map(str, (warning.message for warning in found))
    assert "seed: they configure the authors' training" in said
    assert "hidden_dim: no hypernetwork" in said and "reduction_facter: unknown to the authors' code" in said


def test_a_saved_models_description_loads_as_a_configuration(tmp_path):
    model = tiny_model(variant="hyperformer-shared")
    model.save_pretrained(tmp_path)
    for path in (tmp_path / "hyperformer_config.json", str(tmp_path)):
        assert HyperFormerConfig.load(path) == model.hyperformer_config


def test_what_else_a_file_is_is_said(tmp_path):
    path = tmp_path / "some.json"
    for content, message in (
        ({"model_type": "t5", "d_model": 3}, "transformers' configuration of a t5"),
        ({"arguments": {}, "tasks": {"cola": {}}, "data": {}}, "describes a run.*hyperformer_config.json beside it"),
        (RunConfig().to_dict(), "configures a run"),
        (COMMON, "HyperFormerConfig.from_official reads it"),
        ({"config": {"tasks": ["a"], "reduction": 3}, "format_version": 1}, r"unknown .* \['reduction'\]"),
        ([1], "expected a JSON object, got list"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"some.json: .*{message}"):
            HyperFormerConfig.load(path)
    path.write_text("[" * 100_000)
    for read in (HyperFormerConfig.load, HyperFormerConfig.from_official):
        with pytest.raises(ValueError, match="some.json: not JSON: .*nested more than 100 deep"):
            read(path)


def tied_checkpoint():
    """A checkpoint of a model whose trained head is tied to the embeddings, and another model of its kind."""
    trained, fresh = (tiny_model(t5=tiny_t5(seed=seed), unfreeze_lm_head=True) for seed in (0, 0))
    with torch.no_grad():
        trained.t5.shared.weight.add_(1)
        for parameter in trained.hypernetworks.parameters():
            parameter.add_(1)
    return trained, fresh, official.export(trained)


def test_a_trained_head_that_is_tied_to_the_embeddings_is_loaded():
    trained, fresh, state = tied_checkpoint()
    assert {"shared.weight", "lm_head.weight", "encoder.embed_tokens.weight"} <= state.keys()
    official.load_state_dict(fresh, state)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)


def test_one_of_a_tied_tensors_names_is_enough_and_two_values_are_refused():
    trained, fresh, state = tied_checkpoint()
    alone = {name: value for name, value in state.items() if "embed_tokens" not in name and name != "shared.weight"}
    official.load_state_dict(fresh, alone)
    torch.testing.assert_close(fresh.t5.shared.weight, trained.t5.shared.weight, rtol=0, atol=0)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="shared.weight and lm_head.weight are the same tensor .* differ"):
        official.load_state_dict(fresh, {**state, "lm_head.weight": state["lm_head.weight"] + 1})
    del alone["lm_head.weight"]
    with pytest.raises(ValueError, match="lacks .*weight, which this configuration trains"):
        official.load_state_dict(fresh, alone)
    for name, value in before.items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)
