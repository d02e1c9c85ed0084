"""Recipes of runs: of a new one, of the authors' files, and of what an earlier version left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from support.old_files import without_recipe
from support.runs import SMALL, data_folder, same_weights, saved_t5

from hyperformer_fast import HyperFormerConfig
from hyperformer_fast.cli import main
from hyperformer_fast.training import RunArguments, RunError, train_run
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training.evaluate import load_data
from hyperformer_fast.training.folder import check_same, read_run, write_run
from hyperformer_fast.training.presets import PRESETS

OPEN = {name: value for name, value in SMALL.items() if name != "recipe"}


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {"model_name_or_path": saved_t5(folder / "t5"), "data_dir": data_folder(folder / "data"), **OPEN}


def command(inputs, folder, *flags: str) -> list[str]:
    fields = {**inputs, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "output_dir": folder}
    return ["train", *(part for name, value in fields.items() for part in (f"--{name}", str(value))), *flags]


def groups_of(folder: Path) -> int:
    import torch

    return len(torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"])


def as_before_recipes(folder: Path) -> None:
    """Make a run's folder what an earlier version would have written."""
    content = json.loads((folder / "run.json").read_text())
    del content["arguments"]["recipe"]
    (folder / "run.json").write_text(json.dumps(content))
    for weights in [folder, *folder.glob("checkpoint-*")]:
        without_recipe(weights)


def test_a_run_of_an_earlier_version_goes_on_and_is_trained_further_as_the_authors(inputs, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(command(inputs, whole, "--recipe", "authors")) == 0
    shutil.copytree(whole, folder)
    as_before_recipes(folder)
    shutil.copytree(folder, tmp_path / "first")
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    assert read_run(folder)[0].adapters.recipe == "authors" and groups_of(folder) == 2
    arguments = RunArguments.from_dict({**json.loads((whole / "run.json").read_text())["arguments"],
                                        "output_dir": str(folder), "recipe": None,
                                        "resume_from_checkpoint": "true"})  # fmt: skip
    with pytest.raises(RunError, match="recipe was 'authors' and is now 'default'"):
        train_run(arguments, Console(quiet=True))
    assert main(command(inputs, folder, "--resume_from_checkpoint", "true")) == 0
    assert same_weights(folder, whole)
    further = tmp_path / "further"
    flags = "--init_from", str(tmp_path / "first"), "--max_steps", "2"
    assert main(command({n: v for n, v in inputs.items() if n not in OPEN}, further, *flags)) == 0
    assert HyperFormerConfig.load(further).recipe == "authors" and groups_of(further) == 2


def test_a_new_run_has_the_default_recipe_and_its_rates(inputs, tmp_path):
    assert main(command(inputs, tmp_path / "run")) == 0
    assert HyperFormerConfig.load(tmp_path / "run").recipe == "default" and groups_of(tmp_path / "run") > 2
    flags = "--zero_delta", "true", "--init_weights", "authors", "--learning_rate_rule", "uniform"
    assert main(command(inputs, tmp_path / "other", *flags, "--embedding_warmup_steps", "2")) == 0
    config = HyperFormerConfig.load(tmp_path / "other")
    assert (config.recipe, config.zero_delta, config.init_weights) == ("default", True, "authors")


@pytest.mark.parametrize(
    "fields",
    [
        {"tasks": ["cola"], "efficient_unique_hyper_net": True, "train_adapters": True},  # the authors'
        {"model": "t5-small", "steps": 5, "hyperformer": {"reduction_factor": 8}},  # of the first release
    ],
)
@pytest.mark.filterwarnings("ignore:this is a configuration of the authors", "ignore:arguments have new names")
def test_older_files_of_runs_have_the_authors_recipe(fields):
    assert RunArguments.from_dict({**fields, "output_dir": "out"}).adapters.recipe == "authors"
    assert RunArguments.from_dict({**fields, "output_dir": "out", "recipe": "default"}).adapters.recipe == "default"
    assert RunArguments.from_dict({"output_dir": "out"}).adapters.recipe is None


def test_a_run_goes_on_without_what_its_preset_has_gained_since(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", {"max_steps": 7, "reduction_factor": 4})
    write_run(tmp_path, RunArguments.from_dict({"preset": "demo", "output_dir": str(tmp_path)}), {})
    monkeypatch.setitem(PRESETS, "demo", {"max_steps": 9, "reduction_factor": 8, "mixed_batches": True, "bf16": True})
    resumed = RunArguments.from_args(["--resume_from_checkpoint", "true", "--output_dir", str(tmp_path)])
    assert (resumed.training.max_steps, resumed.adapters.reduction_factor) == (7, 4)
    assert not resumed.training.mixed_batches and not resumed.training.bf16


def resumed(inputs, folder, **changes) -> RunArguments:
    fields = {**inputs, "tasks": ["cola", "stsb"], "max_steps": 4, "per_device_train_batch_size": 4}
    return RunArguments.from_dict({**fields, "output_dir": str(folder), **changes})


@pytest.fixture
def saved(inputs, tmp_path):
    """Say what a run's arguments are, as its folder has them."""

    def save(**fields):
        run = resumed(inputs, tmp_path, **fields)
        write_run(tmp_path, run, load_data(run, None, None))
        return tmp_path

    return save


#: Arguments that a run has, others that mean the same, and one of them with another value.
SAME = [
    ({"recipe": "authors"}, {"learning_rate_rule": "uniform"}, {"learning_rate_rule": "fan_in"}),
    ({}, {"learning_rate_rule": "fan_in"}, {"learning_rate_rule": "uniform"}),
    ({}, {"recipe": "default", "init_weights": "hyperfan_in"}, {"recipe": "authors"}),
    ({}, {"zero_delta": False, "normalize_embeddings": True}, {"zero_delta": True}),
    ({}, {"variant": "hyperformer++", "non_linearity": "gelu_new"}, {"non_linearity": "relu"}),
    (
        {"unique_hyper_net": True},
        {"variant": "hyperformer-shared", "unique_hyper_net": None},
        {"efficient_unique_hyper_net": True},
    ),
    ({}, {"add_prefix": False}, {"add_prefix": True}),
    ({}, {"split_validation_test": False}, {"split_validation_test": True}),
    ({"tasks": None}, {"tasks": ["cola", "stsb"]}, {"tasks": ["stsb", "cola"]}),
]


@pytest.mark.parametrize(("before", "same", "other"), SAME)
def test_a_value_that_a_run_had_already_may_be_given_when_it_is_resumed(inputs, saved, before, same, other):
    folder = saved(**before)
    first = resumed(inputs, folder, **before)
    data = load_data(first, None, None)
    for run in (first, resumed(inputs, folder, **{**before, **same})):
        check_same(folder, run, data, 1)
    (name,) = other
    with pytest.raises(RunError, match=f"cannot resume .*: {name} was .* and is now {other[name]!r}".replace("[", ".")):
        check_same(folder, resumed(inputs, folder, **{**before, **other}), data, 1)


@pytest.mark.parametrize(("before", "same", "other"), SAME)
def test_and_may_be_left_out_again(inputs, saved, before, same, other):
    folder = saved(**{**before, **same})
    run = resumed(inputs, folder, **before)
    check_same(folder, run, load_data(run, None, None), 1)


def test_the_command_resumes_with_the_rule_that_the_recipe_had_set(inputs, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(command(inputs, whole, "--recipe", "authors")) == 0
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    again = "--resume_from_checkpoint", "true", "--learning_rate_rule", "uniform"
    assert main(command(inputs, folder, *again)) == 0
    assert same_weights(folder, whole)


def test_a_run_that_starts_from_another_has_its_adapters(inputs, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(command(inputs, first, "--recipe", "authors")) == 0
    plain = {name: value for name, value in inputs.items() if name not in OPEN}
    assert main(command(plain, second, "--init_from", str(first))) == 0
    again = "--init_from", str(first), "--resume_from_checkpoint", "true", "--recipe", "authors"
    assert main(command(plain, second, *again, "--learning_rate_rule", "uniform", "--reduction_factor", "4")) == 0
    assert main(command(plain, second, *again, "--learning_rate_rule", "fan_in")) == 1
    assert "learning_rate_rule was 'uniform' and is now 'fan_in'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:this is a configuration of the authors")
def test_what_an_authors_file_needs_to_start_from_a_run_of_ours_can_be_done(inputs, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(command(inputs, first)) == 0
    plain = {name: value for name, value in inputs.items() if name not in OPEN}
    flags = [*command({**plain, "tasks": "cola", "eval_tasks": "cola"}, second)[1:], "--init_from", str(first)]
    flags += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_strategy", "no"]
    file = str(Path(__file__).resolve().parents[1] / "configs" / "official" / "hyperformer++.json")
    assert main(["train", file, *flags]) == 2
    said = capsys.readouterr().err
    assert f"recipe='authors', but init_from={str(first)!r} has 'default'" in said
    advice = said.split("add ")[-1].split()
    assert advice[advice.index("--recipe") + 1] == "default" and not second.exists()
    assert main(["train", file, *flags, *advice]) == 0
    assert HyperFormerConfig.load(second) == HyperFormerConfig.load(first)
