"""Whole runs: other runs' weights, other tasks to evaluate, one run per task, arguments that contradict the run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.runs import data_folder, same_weights, saved_t5, small_run
from transformers import GenerationConfig, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.cli import main
from hyperformer_fast.data import UnknownTask
from hyperformer_fast.training import RunError, evaluate_run, predict_run, train_run
from hyperformer_fast.training import run as run_module
from hyperformer_fast.training.arguments import RunConfigError
from hyperformer_fast.training.folder import read_run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model_name_or_path": saved_t5(folder / "t5"), "data_dir": data_folder(folder / "data", ("cola", "stsb", "rte"))
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: None)


def run(inputs, folder, console=None, **changes):
    fields = {"max_steps": 2, "tasks": ["cola", "stsb"], **inputs, **changes}
    return train_run(small_run(folder, **fields), console or Console(quiet=True))


@pytest.fixture(scope="module")
def earlier(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_curves", lambda *_: None)
        run(inputs, folder)
    return folder


def test_metrics_json_has_both_averages_and_the_evaluation_agrees(earlier):
    results = json.loads((earlier / "metrics.json").read_text())
    assert {"variant", "average_metrics", "average_tasks", "majority_average_metrics", "majority_average_tasks"} <= (
        results.keys()
    )
    # Nothing selected a checkpoint, so that validation need not be cut.
    assert [(task["split"], task["rows"]) for task in results["tasks"].values()] == [("validation", 6)] * 2
    assert results["tasks"]["stsb"]["majority"] == {"pearson": 0.0, "spearman": 0.0, "score": 0.0}
    again = evaluate_run(earlier, console=Console(quiet=True))
    assert again["tasks"] == results["tasks"] and again["average_metrics"] == results["average_metrics"]
    assert not (earlier / "best").exists()


def test_a_run_starts_from_anothers_weights_and_adds_a_task(inputs, earlier, tmp_path):
    started = {}

    def keep(trainer, *args, plain=run_module.HyperFormerTrainer.train, **kwargs):
        started.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return plain(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.HyperFormerTrainer, "train", keep)
        results = run(inputs, tmp_path / "new", init_from=str(earlier), tasks=["rte"], eval_tasks=["rte", "cola"])
    assert list(results["tasks"]) == ["rte", "cola"]
    before = load_file(earlier / "model.safetensors")
    kept = [name for name in before if name.startswith(("hypernetworks", "task_embeddings.task_to"))]
    assert kept and all(torch.equal(started[name], before[name]) for name in kept)
    model = HyperFormerModel.from_pretrained(tmp_path / "new")
    assert model.hyperformer_config.tasks == ["cola", "stsb", "rte"]
    # It is resumed as any other, and with the T5 that the earlier run names.
    fields = {name: value for name, value in inputs.items() if name != "model_name_or_path"}
    again = run(fields, tmp_path / "again", init_from=str(earlier), tasks=["rte"], save_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(fields, tmp_path / "cut", init_from=str(earlier), tasks=["rte"], save_steps=1)
    resumed = run(
        fields, tmp_path / "cut", init_from=str(earlier), tasks=["rte"], save_steps=1, resume_from_checkpoint="true"
    )
    assert resumed["tasks"] == again["tasks"] and same_weights(tmp_path / "again", tmp_path / "cut")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tasks": ["rte"]}, "eval_tasks has rte, which nothing trains: add it to tasks"),
        ({"init_from": "earlier", "task_hidden_dim": 9}, "task_hidden_dim=9, but init_from=.* has 5: leave it out"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint must be true or the path of a checkpoint"),
        ({"resume_from_checkpoint": "earlier"}, "is not a checkpoint of output_dir"),
        ({"init_from": "/nowhere/at/all"}, "no HyperFormer checkpoint in /nowhere/at/all"),
    ],
)
def test_what_cannot_start_leaves_nothing(inputs, earlier, tmp_path, changes, message):
    changes = {name: str(earlier) if value == "earlier" else value for name, value in changes.items()}
    with pytest.raises((RunConfigError, RunError, OSError, ValueError), match=message):
        run(inputs, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone_unless_it_is_resumed_or_replaced(inputs, earlier, tmp_path):
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="holds another run: continue it .--resume_from_checkpoint true., replace it"):
        run(inputs, earlier, tasks=["nothing of the sort"])
    with pytest.raises(RunError, match="cannot resume .*: learning_rate was 0.01 and is now 0.5"):
        run(inputs, earlier, learning_rate=0.5, resume_from_checkpoint="true")
    with pytest.raises(RunError, match="an optimizer step took 4 examples and would now take 8"):
        run(inputs, earlier, gradient_accumulation_steps=2, resume_from_checkpoint="true")
    assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_unseen(inputs, tmp_path):
    run(inputs, tmp_path, save_steps=1, save_only_model=True)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    with pytest.raises(RunError, match="cannot resume .*: checkpoint-2 lacks optimizer.pt .*; checkpoint-1 lacks"):
        run(inputs, tmp_path, save_steps=1, save_only_model=True, resume_from_checkpoint="true")


def test_a_named_checkpoint_is_gone_on_from(inputs, tmp_path):
    """Later checkpoints are replaced, and the same run comes out."""
    whole = run(inputs, tmp_path, max_steps=4, save_steps=1, save_total_limit=None)
    again = run(
        inputs, tmp_path, max_steps=4, save_steps=1, save_total_limit=None,
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
    )  # fmt: skip
    assert again["tasks"] == whole["tasks"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]


def test_each_task_has_a_run_of_its_own(inputs, tmp_path, monkeypatch):
    console = Console(width=100, record=True, file=io.StringIO())
    results = run(inputs, tmp_path / "runs", console, single_task=True)
    assert list(results["tasks"]) == ["cola", "stsb"]
    assert console.export_text().count("of tasks") == 3  # each run's table, and that of all
    for task in ("cola", "stsb"):
        own = json.loads((tmp_path / "runs" / task / "metrics.json").read_text())
        assert own["tasks"] == {task: results["tasks"][task]}
        assert HyperFormerModel.from_pretrained(tmp_path / "runs" / task).hyperformer_config.tasks == [task]
    assert json.loads((tmp_path / "runs" / "metrics.json").read_text()) == results
    with pytest.raises(RunError, match="holds another run"):
        run(inputs, tmp_path / "runs", single_task=True)


def test_runs_of_single_tasks_are_resumed_together(inputs, earlier, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="holds another run"):
        run(inputs, earlier, single_task=True)
    with pytest.raises(UnknownTask, match="unknown task 'rubbish'"):
        run(inputs, tmp_path / "never", single_task=True, tasks=["rubbish"])
    assert not (tmp_path / "never").exists()
    whole = run(inputs, tmp_path / "whole", single_task=True, save_steps=1)
    with monkeypatch.context() as patch:
        plain = run_module._report
        patch.setattr(run_module, "_report", lambda arguments, *rest: (
            1 / 0 if arguments.data.tasks == ["stsb"] else plain(arguments, *rest)
        ))  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            run(inputs, tmp_path / "cut", single_task=True, save_steps=1)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    assert main(["train", "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "cut")]) == 0
    results = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert results["tasks"] == whole["tasks"]
    assert all(same_weights(tmp_path / "whole" / task, tmp_path / "cut" / task) for task in ("cola", "stsb"))


def test_what_was_trained_is_saved_before_the_final_evaluation(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "evaluate_tasks", lambda *arguments, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(inputs, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_run_config_of_the_first_release_still_trains(inputs, tmp_path):
    from hyperformer_fast.training import RunConfig

    with pytest.warns(DeprecationWarning, match="RunConfig is now RunArguments"):
        old = RunConfig(
            model=inputs["model_name_or_path"], data_dir=inputs["data_dir"], tasks=["cola"], output_dir=str(tmp_path),
            hyperformer={"reduction_factor": 4}, steps=1, warmup_steps=0, eval_steps=0, save_steps=0, batch_size=2,
        )  # fmt: skip
    assert train_run(old, Console(quiet=True))["steps"] == 1
    with pytest.warns(DeprecationWarning, match="set training.overwrite_output_dir .* in place of overwrite"):
        assert train_run(old, Console(quiet=True), overwrite=True)["steps"] == 1
    with pytest.raises(TypeError, match="unexpected argument 'restart'"):
        train_run(old, Console(quiet=True), restart=True)


def test_a_run_from_full_fine_tuning_keeps_the_prefix_of_the_sources(inputs, earlier, tmp_path):
    run(inputs, tmp_path / "t5", variant="finetuning", max_steps=1)
    for start, expected in ((tmp_path / "t5", "rte"), (earlier, None)):
        folder = tmp_path / f"from {start.name}"
        run(inputs, folder, init_from=str(start), tasks=["rte"], max_steps=1)
        assert json.loads((folder / "run.json").read_text())["tasks"]["rte"]["prefix"] == expected
        again = tmp_path / f"again from {start.name}"
        run(inputs, again, init_from=str(folder), tasks=["rte"], max_steps=1)
        assert json.loads((again / "run.json").read_text())["tasks"]["rte"]["prefix"] == expected


def test_other_texts_than_those_of_the_weights_are_said(inputs, earlier, tmp_path):
    for style, said in (("official", True), ("default", False)):
        console = Console(file=io.StringIO(), width=400)
        run(inputs, tmp_path / style, console, init_from=str(earlier), text_style=style, max_steps=1)
        assert ("warning: stsb has another step than in" in console.file.getvalue()) == said
        assert "warning: cola" not in console.file.getvalue()


def test_weights_that_are_of_no_run_are_not_replaced(inputs, earlier, tmp_path):
    """A model that somebody saved is no run, whatever flag is given."""
    HyperFormerModel.from_pretrained(earlier).save_pretrained(tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    for single in (False, True):
        with pytest.raises(RunError, match="has model.safetensors, but no run.json, so that it is not a run"):
            run(inputs, tmp_path / "mine", overwrite_output_dir=True, single_task=single)
    assert {name: (tmp_path / "mine" / name).read_bytes() for name in before} == before


def test_decoding_that_a_folder_says_is_the_runs(inputs, tmp_path, monkeypatch):
    """Given as a flag, which the parser makes a path of, from where the command runs."""
    monkeypatch.chdir(tmp_path)
    fields = {"num_beams": 3, "max_new_tokens": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    GenerationConfig(**fields).save_pretrained(tmp_path / "decoding")
    run(inputs, tmp_path / "run", generation_config=Path("decoding"))
    read, _, _ = read_run(tmp_path / "run")
    assert read.training.generation_config == str(tmp_path / "decoding")
    beams, search = [], T5ForConditionalGeneration._beam_search
    monkeypatch.setattr(
        T5ForConditionalGeneration,
        "_beam_search",
        lambda *given, **named: beams.append(named["generation_config"].num_beams) or search(*given, **named),
    )
    predict_run(tmp_path / "run", [{"sentence": "some words"}], "cola")
    assert set(beams) == {3}
    beams.clear()
    evaluate_run(tmp_path / "run", console=Console(quiet=True))
    assert set(beams) == {3}


def test_a_run_is_evaluated_where_its_task_file_and_data_are_elsewhere(inputs, tmp_path):
    data = Path(data_folder(tmp_path / "data", ("cola",)))
    fields = {"source": "{sentence}", "labels": ["no", "yes"], "metrics": ["accuracy"]}
    fields |= {f"{split}_file": str(data / "cola" / f"{split}.jsonl") for split in ("train", "validation")}
    (tmp_path / "tasks.json").write_text(json.dumps({"mine": fields}))
    of_run = {"model_name_or_path": inputs["model_name_or_path"], "task_file": str(tmp_path / "tasks.json")}
    found = run(of_run, tmp_path / "run", tasks=["mine"])
    (tmp_path / "tasks.json").unlink()
    again = evaluate_run(tmp_path / "run", console=Console(quiet=True))
    assert again["tasks"]["mine"]["metrics"] == found["tasks"]["mine"]["metrics"]
    (tmp_path / "tasks.json").write_text(json.dumps({"mine": fields}))
    moved = tmp_path / "elsewhere" / "mine"
    shutil.copytree(data / "cola", moved)
    lines = (moved / "validation.jsonl").read_text().splitlines(True)
    (moved / "validation.jsonl").write_text("".join(lines[:4]))
    there = evaluate_run(tmp_path / "run", data_dir=str(moved.parent), console=Console(quiet=True))
    assert there["tasks"]["mine"]["rows"] == 4


def test_names_of_a_task_file_are_checked_before_the_first_is_trained(inputs, tmp_path):
    data = Path(data_folder(tmp_path / "data", ("cola",)))
    fields = {"source": "{sentence}", "labels": ["no", "yes"], "metrics": ["accuracy"]}
    fields |= {f"{split}_file": str(data / "cola" / f"{split}.jsonl") for split in ("train", "validation")}
    (tmp_path / "tasks.json").write_text(json.dumps({"good": fields, "wmt:en-de": fields}))
    of_run = {"model_name_or_path": inputs["model_name_or_path"], "task_file": str(tmp_path / "tasks.json")}
    with pytest.raises(RunConfigError, match="the name 'wmt:en-de' has ':', which no task may have"):
        run(of_run, tmp_path / "run", tasks=None, single_task=True)
    assert not (tmp_path / "run" / "good").exists()
