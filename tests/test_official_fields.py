"""The authors' JSON files: every field of each, as a run and as a model; and what else a configuration file may be."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from support.t5s import tiny_model, tiny_t5

import hyperformer_fast
from hyperformer_fast import HyperFormerConfig, official_fields
from hyperformer_fast import official as official_checkpoints
from hyperformer_fast.training import RunArguments
from hyperformer_fast.training.arguments import RunConfigError

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
TASKS = ["rte", "sst2"]
FOLDER = ROOT / "configs" / "official"

#: The fields of all of the authors' files (github.com/rabeehk/hyperformer, hyperformer/configs), and what each adds.
COMMON = set(
    """
    model_name_or_path tokenizer_name learning_rate output_dir max_source_length max_target_length
    val_max_target_length test_max_target_length num_train_epochs warmup_steps eval_steps overwrite_output_dir
    label_smoothing per_device_train_batch_size per_device_eval_batch_size save_steps logging_first_step logging_steps
    save_total_limit temperature do_train do_test do_eval predict_with_generate task_embedding_dim
    split_validation_test non_linearity load_best_model_at_end evaluation_strategy metric_for_best_model
    greater_is_better max_steps tasks eval_tasks
    """.split()
)
ADAPTERS = {"train_adapters", "reduction_factor", "unfreeze_lm_head", "unfreeze_layer_norms", "adapter_config_name"}
HYPER = ADAPTERS | {"projected_task_embedding_dim", "conditional_layer_norm"}
ADDED = {
    "finetune": set(),
    "finetune_single_task": set(),
    "adapters": ADAPTERS,
    "adapter_dagger": ADAPTERS,
    "hyperformer": HYPER | {"unique_hyper_net"},
    "hyperformer++": HYPER | {"efficient_unique_hyper_net"},
}
VARIANTS = {
    "finetune": "finetuning", "finetune_single_task": "finetuning", "adapters": "adapters",
    "adapter_dagger": "adapters", "hyperformer": "hyperformer-shared", "hyperformer++": "hyperformer++",
}  # fmt: skip


def fields_of(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def silently(fields, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return HyperFormerConfig.from_official(fields, **changes)


@pytest.mark.parametrize("name", ADDED)
def test_every_field_of_a_file_is_accepted_and_none_is_lost(name):
    fields, path = fields_of(name), str(FOLDER / f"{name}.json")
    assert fields.keys() == COMMON | ADDED[name]
    with pytest.warns(UserWarning) as caught:
        run = RunArguments.from_args([path, "--output_dir", "elsewhere"])
    (said,) = {str(warning.message) for warning in caught}
    assert said.startswith(f'this is a configuration of the authors\' code: the method is variant "{VARIANTS[name]}"')
    for field, value in fields.items():
        now = official_fields.RENAMED.get(field, field)
        if field in ("train_adapters", "adapter_config_name", "unique_hyper_net", "efficient_unique_hyper_net"):
            assert run.given["variant"] == VARIANTS[name]  # they select the method
        elif field == "tokenizer_name":
            assert field not in run.given and value == run.given["model_name_or_path"]  # the T5's own
        elif field == "output_dir":
            assert run.given[field] == "elsewhere"
        elif now not in run.given:
            assert field in said.split("; ")[-1] and said.endswith("this method does not read them")
        else:
            assert run.given[now] == value
            assert now == field or f"{field} is now {now}" in said
    assert (run.data.text_style, run.training.loss_reduction) == ("official", "sum")
    assert run.hyperformer_config(run.data.tasks).variant == VARIANTS[name]


def test_what_their_file_leaves_out_is_as_their_code_has_it_and_said():
    theirs = {"model_name_or_path": "embedded", "train_adapters": True, "per_gpu_train_batch_size": None}
    with pytest.warns(UserWarning, match="absent fields have their defaults .*temperature 1.0"):
        training = RunArguments.from_dict(theirs).training
    assert (training.temperature, training.learning_rate) == (1.0, 5e-5)
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (8, 8)


def test_of_two_equal_keys_the_later_wins():
    for name in ("hyperformer", "hyperformer++"):
        assert (FOLDER / f"{name}.json").read_text().count('"task_embedding_dim"') == 2
        with pytest.warns(UserWarning):
            assert RunArguments.from_args([str(FOLDER / f"{name}.json")]).adapters.task_embedding_dim == 64


def test_another_t5_brings_its_own_tokenizer_and_the_user_has_the_last_word():
    with pytest.warns(UserWarning):
        run = RunArguments.from_args(
            [str(FOLDER / "hyperformer++.json"), "--model_name_or_path", "embedded", "--text_style", "default"]
            + ["--variant", "hyperformer", "--loss_reduction", "mean"]
        )
    assert (run.model.model_name_or_path, run.model.tokenizer_name) == (None, None)
    assert (run.data.text_style, run.training.loss_reduction) == ("default", "mean")
    assert run.hyperformer_config(["a"]).variant == "hyperformer" and run.training.overwrite_output_dir


def official(**fields):
    with pytest.warns(UserWarning) as caught:
        run = RunArguments.from_dict({"do_test": True, "train_adapters": True, "tasks": TASKS, **fields})
    return run, str(caught[0].message)


def test_the_other_fields_of_their_runs_are_translated_and_named():
    run, said = official(n_train=5, n_val=-1, n_test=7, eval_beams=4, lr_scheduler="constant_w_warmup", adafactor=True)
    assert (run.data.max_train_samples, run.data.max_eval_samples, run.data.max_predict_samples) == (5, None, 7)
    assert (run.training.generation_num_beams, run.training.optim) == (4, "adafactor")
    assert run.training.lr_scheduler_type == "constant_with_warmup" and run.training.loss_reduction == "mean"
    for note in ("n_train is now max_train_samples", "eval_beams is now generation_num_beams", 'now optim "adafactor"'):
        assert note in said
    run, said = official(print_num_parameters=True, compute_memory=True, hidden_dim=3, compute_time=False)
    assert "print_num_parameters is ignored (" in said and "compute_memory is ignored (" in said
    assert "hidden_dim: this method does not read them" in said and "compute_time" not in said
    run, said = official(model_name_or_path="a/run", optimize_from_scratch_with_loading_model=True)
    assert (run.model.init_from, run.model.model_name_or_path) == ("a/run", None) and "is now init_from" in said
    run, said = official(task_embeddings=["mnli", "mnli"])
    assert run.hyperformer_config(TASKS).task_to_embeddings == {"rte": "mnli", "sst2": "mnli"}
    run, said = official(
        task_embeddings=["mnli", "mnli"], adapter_config_name="adapter", adapters=["x", "y"], freeze_embeds=True
    )
    assert run.given["task_to_embeddings"] == {"rte": "x", "sst2": "y"}
    assert official()[0].hyperformer_config(TASKS).reduction_factor == 16  # the authors' default
    assert official(train_adapters_blocks=True)[0].given["variant"] == "hyperformer"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction_facter": 16}, "unknown field 'reduction_facter'; did you mean 'reduction_factor'"),
        ({"evaluation_stratgy": "no"}, "unknown field 'evaluation_stratgy'; did you mean 'evaluation_strategy'"),
        ({"unfreeze_model": True}, "unfreeze_model=True is not supported: it trains the whole T5 beside"),
        ({"config_name": "t5-base"}, "config_name='t5-base' is not supported"),
        ({"adapter_config_name": "prefix"}, "adapter_config_name must be 'adapter' or 'meta-adapter', got 'prefix'"),
        (
            {"label_smoothing": 0.1, "label_smoothing_factor": 0.2},
            "label_smoothing is now label_smoothing_factor, which",
        ),
        ({"max_steps": "many"}, "max_steps must be a whole number"),
        ({"task_embeddings": ["rte"]}, r"an embedding for each of tasks, got \['rte'\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:this is a configuration of the authors")
def test_what_is_wrong_in_their_runs_is_an_error(fields, message):
    with pytest.raises(RunConfigError, match=message):
        RunArguments.from_dict({"do_test": True, "train_adapters": True, "tasks": TASKS, **fields})


@pytest.mark.parametrize("name", ADDED)
def test_their_files_are_read_as_configurations_of_the_model(name):
    path = FOLDER / f"{name}.json"
    with pytest.warns(
        UserWarning, match="eval_tasks, evaluation_strategy, .*tokenizer_name, .*: they configure"
    ) as caught:
        configs = [HyperFormerConfig.from_official(given) for given in (fields_of(name), path, str(path))]
    assert {warning.filename for warning in caught} == {__file__}
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0].variant, configs[0].tasks) == (VARIANTS[name], fields_of(name)["tasks"])
    if name.startswith("hyperformer"):
        assert (configs[0].task_embedding_dim, configs[0].non_linearity) == (64, "gelu_new")
    said = str(caught[0].message)
    assert not [field for field in HYPER if field in said] and "adapter_config_name" not in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_adapters": "yes"}, "train_adapters must be true or false, got 'yes'"),
        ({"adapter_config_name": "prefix"}, "adapter_config_name must be 'adapter' or 'meta-adapter', got 'prefix'"),
        ({"unfreeze_model": True}, "unfreeze_model=True is not supported: it trains the whole T5"),
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
    for path in (tmp_path / "config.json", str(tmp_path)):
        assert HyperFormerConfig.load(path) == model.hyperformer_config


def test_what_else_a_file_is_is_said(tmp_path):
    path = tmp_path / "some.json"
    for content, message in (
        ({"model_type": "t5", "d_model": 3}, "transformers' configuration of a t5"),
        ({"arguments": {}, "tasks": {"cola": {}}, "data": {}}, "describes a run.*config.json beside it"),
        ({"hyperformer": {"variant": "hyperformer"}, "steps": 3}, "configures a run"),
        (fields_of("finetune"), "HyperFormerConfig.from_official reads it"),
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
    return trained, fresh, official_checkpoints.export(trained)


def test_a_trained_head_that_is_tied_to_the_embeddings_is_loaded():
    trained, fresh, state = tied_checkpoint()
    assert {"shared.weight", "lm_head.weight", "encoder.embed_tokens.weight"} <= state.keys()
    official_checkpoints.load_state_dict(fresh, state)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)


def test_one_of_a_tied_tensors_names_is_enough_and_two_values_are_refused():
    trained, fresh, state = tied_checkpoint()
    alone = {name: value for name, value in state.items() if "embed_tokens" not in name and name != "shared.weight"}
    official_checkpoints.load_state_dict(fresh, alone)
    torch.testing.assert_close(fresh.t5.shared.weight, trained.t5.shared.weight, rtol=0, atol=0)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="shared.weight and lm_head.weight are the same tensor .* differ"):
        official_checkpoints.load_state_dict(fresh, {**state, "lm_head.weight": state["lm_head.weight"] + 1})
    del alone["lm_head.weight"]
    with pytest.raises(ValueError, match="lacks .*weight, which this configuration trains"):
        official_checkpoints.load_state_dict(fresh, alone)
    for name, value in before.items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)
