"""What arguments of a run do, or that they are refused: none is accepted and has no effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.runs import SMALL, data_folder, saved_t5, small_run, small_trainer

from hyperformer_fast.training import RunArguments, RunError, evaluate_run, train_run
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training import start as start_module
from hyperformer_fast.training.arguments import RunConfigError
from hyperformer_fast.training.presets import with_preset
from hyperformer_fast.training.settle import overridden


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {"model_name_or_path": saved_t5(folder / "t5"), "data_dir": data_folder(folder / "data")}


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: None)


def run(inputs, folder, **changes):
    return train_run(small_run(folder, **{"max_steps": 1, "tasks": ["cola"], **inputs, **changes}), Console(quiet=True))


def test_an_evaluation_leaves_out_no_row_and_rounds_no_weight_that_is_saved(inputs, tmp_path):
    results = run(inputs, tmp_path / "whole", dataloader_drop_last=True, per_device_eval_batch_size=4)
    assert results["tasks"]["cola"]["rows"] == 6
    run(inputs, tmp_path / "rounded", bf16_full_eval=True)
    exact, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rounded"))
    assert torch.bfloat16 not in {value.dtype for value in saved.values()}
    assert all(torch.equal(saved[name], value) for name, value in exact.items())


def test_the_evaluation_before_the_first_step_needs_no_other(inputs, tmp_path):
    run(inputs, tmp_path / "run", eval_on_start=True)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_average_metrics" in entry] == [0]


def test_texts_cannot_be_scored_in_parts(tmp_path):
    with pytest.raises(RunConfigError, match="eval_do_concat_batches"), run_module.refusals_named():
        small_trainer(tmp_path, eval_do_concat_batches=False)


def test_what_has_no_effect_is_refused_or_said():
    with pytest.raises(RunConfigError, match="ignore_pad_token_for_loss must be true"):
        RunArguments.from_dict({"ignore_pad_token_for_loss": False})
    with pytest.raises(RunConfigError, match="leave eval_tasks out"):
        RunArguments.from_dict({"single_task": True, "tasks": ["cola", "rte"], "eval_tasks": ["cola"]})
    with pytest.warns(UserWarning, match="do_predict false is ignored"):
        RunArguments.from_dict({"do_predict": False})
    with pytest.raises(RunConfigError, match="'evaluation_strategy'; it is now 'eval_strategy'"):
        RunArguments.from_dict({"evaluation_strategy": "steps"})


def test_a_share_of_warm_up_is_not_overridden_by_steps_that_nobody_gave():
    assert "warmup_steps" not in with_preset({"preset": "demo", "warmup_ratio": 0.1})
    assert "warmup_steps" not in overridden({"warmup_steps": 500}, {"warmup_ratio": 0.1})


def test_a_run_from_other_weights_has_the_rate_of_their_recipe(inputs, tmp_path):
    def rates(**given):
        return with_preset({"preset": "demo", **given})["learning_rate"], RunArguments.from_dict(
            given
        ).training.learning_rate

    divided, undivided = (3e-3, 3e-3), (1e-3, 3e-4)
    for name, fields in (
        ("default", {"recipe": "default"}),
        ("authors", {"recipe": "authors"}),
        ("finetuning", {"variant": "finetuning", **dict.fromkeys(SMALL)}),
    ):
        run(inputs, tmp_path / name, **fields)
        assert rates(init_from=str(tmp_path / name)) == (divided if name == "default" else undivided)
    # where the weights do not say it yet, the rate is the one that is too low at the worst
    for elsewhere in ("someone/model", str(tmp_path)):
        assert rates(init_from=elsewhere) == undivided
        assert rates(init_from=elsewhere, recipe="default") == divided
        assert rates(init_from=elsewhere, learning_rate_rule="fan_in") == divided


def test_an_early_stop_selects_on_validation():
    fields = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 1}
    assert RunArguments.from_dict(fields).selects and not RunArguments.from_dict({}).selects


def test_a_run_that_starts_from_full_fine_tuning_names_the_task_in_its_sources(inputs, tmp_path):
    no_adapters = dict.fromkeys(SMALL)
    run(inputs, tmp_path / "first", variant="finetuning", **no_adapters)
    run(inputs, tmp_path / "second", init_from=str(tmp_path / "first"), **no_adapters)
    assert json.loads((tmp_path / "second" / "run.json").read_text())["arguments"]["add_prefix"] is True


def test_the_last_single_task_is_checked_before_the_first_is_trained(inputs, tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        run(inputs, tmp_path / "run", single_task=True, tasks=["cola", "nowhere"])
    assert not (tmp_path / "run").exists()


def test_runs_of_single_tasks_replace_an_earlier_run_and_are_not_replaced_unseen(inputs, tmp_path):
    folder = tmp_path / "run"
    run(inputs, folder)
    run(inputs, folder, single_task=True, tasks=["stsb"], overwrite_output_dir=True)
    assert not (folder / "model.safetensors").exists() and (folder / "stsb" / "model.safetensors").exists()
    with pytest.raises(RunError, match="holds another run"):
        run(inputs, folder)
    assert list(json.loads((folder / "metrics.json").read_text())["tasks"]) == ["stsb"]
    with pytest.raises(RunError, match="holds runs of single tasks"):
        evaluate_run(folder, console=Console(quiet=True))


def test_a_finished_run_without_a_checkpoint_is_not_begun_again_unseen(inputs, tmp_path):
    run(inputs, tmp_path / "run")
    with pytest.raises(RunError, match="no checkpoint. Start another run from them with --init_from"):
        run(inputs, tmp_path / "run", resume_from_checkpoint="true", max_steps=2)
    run(inputs, tmp_path / "runs", single_task=True)
    again = run(inputs, tmp_path / "runs", single_task=True, resume_from_checkpoint="true", max_steps=2)
    assert again["steps"] == 2


def test_the_hub_is_asked_with_the_token_for_the_weights_that_a_run_starts_from(inputs, tmp_path, monkeypatch):
    asked = []

    def from_pretrained(*_, **options):
        asked.append(options["token"])
        raise OSError("no such repository")

    for kind in (start_module.HyperFormerConfig, start_module.HyperFormerModel):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="no such repository"):
        run(inputs, tmp_path / "run", init_from="someone/model", token="secret", **dict.fromkeys(SMALL))
    assert asked == ["secret", "secret"]


def test_a_run_that_replaces_another_leaves_a_readme_and_the_t5_alone(inputs, tmp_path):
    (tmp_path / "README.md").write_text("somebody's own", encoding="utf-8")
    for _ in range(2):
        run(inputs, tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "somebody's own"
    with pytest.raises(RunConfigError, match="is the folder of the T5"):
        run(inputs, Path(inputs["model_name_or_path"]), overwrite_output_dir=True)
