"""The command: whole runs, what it refuses and how it says so, and that nothing good is lost by it.

test_flags.py tests how its flags are read, without a run.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.runs import data_folder, rows, saved_t5, small_t5
from torch.testing import assert_close
from transformers import Trainer

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.checkpoint import WEIGHTS_NAME
from hyperformer_fast.cli import main
from hyperformer_fast.training.arguments import RunArguments

QUICK = "--max_steps 4 --per_device_train_batch_size 4 --per_device_eval_batch_size 64 --eval_steps 2 --save_steps 2"
QUICK = f"{QUICK} --logging_steps 1 --learning_rate 1e-3 --warmup_steps 2 --max_eval_samples 100".split()
QUICK += "--task_embedding_dim 4 --projected_task_embedding_dim 4 --task_hidden_dim 5 --reduction_factor 4".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return ["--model_name_or_path", saved_t5(folder / "t5"), "--data_dir", data_folder(folder / "data")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *inputs, *QUICK, "--output_dir", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_what_it_should(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "run.json",
        WEIGHTS_NAME,
        "metrics.json",
        "history.json",
        "curves.png",
        "checkpoint-4",
    }
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["cola", "stsb"] and metrics["steps"] == 4
    assert set(metrics["tasks"]["stsb"]["metrics"]) == {"pearson", "spearman", "score"}
    steps = [
        entry["step"]
        for entry in json.loads((finished / "history.json").read_text())
        if "eval_average_metrics" in entry
    ]
    assert steps == [2, 4]
    assert HyperFormerModel.from_pretrained(finished, small_t5()).hyperformer_config.reduction_factor == 4


def test_evaluate_finds_what_training_reported(finished, capsys):
    assert main(["evaluate", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "majority class" in out and "reported on validation" in out
    metrics, again = (json.loads((finished / f"{name}.json").read_text()) for name in ("metrics", "evaluation"))
    assert again["tasks"] == metrics["tasks"]
    assert main(["evaluate", str(finished), "--tasks", "stsb", "--split", "train"]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    assert list(again["tasks"]) == ["stsb"] and again["tasks"]["stsb"]["rows"] == 24


def test_predict_labels_rows_and_texts(finished, tmp_path, capsys):
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    unlabelled = [{"sentence1": row["sentence1"], "sentence2": row["sentence2"], "id": 7} for row in rows("stsb", 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
    assert main(["predict", str(finished), "--task", "stsb", "--input", str(file), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: line[name] for name in ("sentence1", "sentence2", "id")} for line in lines] == unlabelled
    assert all(line["prediction"] is None or isinstance(line["prediction"], float) for line in lines)
    capsys.readouterr()
    assert main(["predict", str(finished), "--task", "stsb", "--text", "s000", "s000"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["prediction_text"] == lines[0]["prediction_text"]
    assert main(["predict", str(finished), "--task", "stsb", "--text", "s000"]) == 1
    assert "stsb has 2 texts (sentence1, sentence2), got 1" in capsys.readouterr().err


def test_an_unfinished_run_is_taken_at_its_newest_checkpoint(finished, tmp_path, capsys):
    copy(finished, tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    assert main(["evaluate", str(tmp_path)]) == 0
    assert "using checkpoint-4" in capsys.readouterr().out
    same = [json.loads((tmp_path / f"{name}.json").read_text())["tasks"] for name in ("metrics", "evaluation")]
    assert same[0] == same[1]


def copy(source: Path, target: Path) -> None:
    for name, content in contents(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def test_another_run_is_kept_unless_told(finished, inputs, tmp_path, capsys):
    copy(finished, tmp_path)
    (tmp_path / "mine.txt").write_text("not the run's")
    before = contents(tmp_path)
    train = ["train", *inputs, *QUICK, "--output_dir", str(tmp_path)]
    assert main(train) == 1
    assert "holds another run: continue it (--resume_from_checkpoint true)" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert main([*train, "--overwrite_output_dir", "--max_steps", "1", "--tasks", "cola"]) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] and (
        tmp_path / "mine.txt"
    ).exists()
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["tasks"] == ["cola"]


def test_a_failed_start_keeps_the_run_that_was_to_be_replaced(finished, inputs, tmp_path):
    copy(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    (tmp_path / "t5").mkdir()
    for wrong in (["--tasks", "rte"], ["--reduction_factor", "99"], ["--model_name_or_path", str(tmp_path / "t5")]):
        assert main(
            ["train", *inputs, *QUICK, "--output_dir", str(tmp_path / "run"), "--overwrite_output_dir", *wrong]
        ) in (1, 2)
        assert contents(tmp_path / "run") == before


def test_resume_goes_on_as_if_nothing_had_been(finished, inputs, tmp_path, capsys):
    copy(finished, tmp_path)
    checkpoint, weights = tmp_path / "checkpoint-4", load_file(tmp_path / WEIGHTS_NAME)
    for path in (*checkpoint.iterdir(), tmp_path / WEIGHTS_NAME, tmp_path / "metrics.json"):
        path.unlink()
    checkpoint.rmdir()
    assert main(["train", "--resume_from_checkpoint", "--output_dir", str(tmp_path), "--save_steps", "1"]) == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert_close(load_file(tmp_path / WEIGHTS_NAME), weights, rtol=0, atol=0)
    before, after = (json.loads((folder / "metrics.json").read_text())["tasks"] for folder in (finished, tmp_path))
    assert before == after and [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_resume_refuses_another_run(finished, tmp_path, capsys):
    copy(finished, tmp_path)
    before = contents(tmp_path)
    for changes, message in (
        (["--learning_rate", "0.5"], "learning_rate was 0.001 and is now 0.5"),
        (["--variant", "hyperformer"], "variant was"),
        (["--tasks", "cola"], "and is now ['cola']"),
        (["--data_dir", data_folder(tmp_path / "other", n=30)], "data_dir was"),
    ):
        assert main(["train", "--resume_from_checkpoint", "--output_dir", str(tmp_path), *changes]) == 1
        assert message in capsys.readouterr().err
    run = json.loads((tmp_path / "run.json").read_text())
    run["data"]["cola"]["train"]["sha256"] = "0"
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert main(["train", "--resume_from_checkpoint", "--output_dir", str(tmp_path)]) == 1
    assert "the training rows of 'cola' have changed since it started" in capsys.readouterr().err
    left = {name: content for name, content in contents(tmp_path).items() if not name.startswith("other")}
    assert left.keys() == before.keys() and all(left[name] == before[name] for name in left if name != "run.json")
    assert main(["train", "--resume_from_checkpoint", "--output_dir", str(tmp_path / "nowhere")]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err


REFUSED = {
    "unknown task": (["--tasks", "cola", "rte"], 2, "unknown task 'rte'"),
    "a task to evaluate that nothing trains": (
        ["--tasks", "cola", "--eval_tasks", "cola", "stsb"],
        2,
        "nothing trains",
    ),
    "no bottleneck": (["--reduction_factor", "17"], 1, "reduction_factor=17 leaves no bottleneck at width d=16"),
    "no such metric": (
        ["--metric_for_best_model", "stsb_pearsn", "--load_best_model_at_end"],
        2,
        "got 'stsb_pearsn'; did you mean 'stsb_pearson'?",
    ),
    "a report to nowhere": (["--report_to", "nosuch"], 2, "the Trainer refuses these arguments here: nosuch is not"),
    "shards of one process": (["--fsdp", "full_shard"], 2, "the Trainer refuses these arguments here: Using fsdp only"),
    "repeated task": (["--tasks", "cola,cola"], 2, "tasks must be unique"),
    "both": (["--resume_from_checkpoint", "--overwrite_output_dir"], 2, "exclude each other"),
    "no model": (["--model_name_or_path", "./nowhere"], 1, "the model './nowhere' is not a folder"),
    "no data": (["--data_dir", "./nowhere"], 2, "nowhere' is not a directory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments_are_one_message(inputs, tmp_path, capsys, what):
    arguments, code, message = REFUSED[what]
    assert main(["train", *inputs, *QUICK, "--output_dir", str(tmp_path / "run"), *arguments]) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("hyperformer-fast: error:") == 1
    assert "unexpected" not in err
    assert not (tmp_path / "run").exists()


def test_bad_data_is_named_with_its_line(inputs, tmp_path, capsys):
    folder = data_folder(tmp_path / "data")
    with open(tmp_path / "data" / "cola" / "validation.jsonl", "a") as file:
        file.write('{"sentence": "a", "label": 9}\n')
    assert main(["train", *inputs, *QUICK, "--data_dir", folder, "--output_dir", str(tmp_path / "run")]) == 1
    assert "cola/validation.jsonl:7: 'label' is out of range" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["truncated", "not safetensors", "another T5", "absent"])
def test_bad_checkpoints_are_named(finished, tmp_path, capsys, what):
    run, weights = tmp_path / "run", tmp_path / "run" / WEIGHTS_NAME
    copy(finished, run)
    message, extra = {
        "truncated": ("is not a whole safetensors file", []),
        "not safetensors": ("is not a whole safetensors file", []),
        "another T5": ("was trained on another T5: d_model was 16, this one's is 32", ["--model_name_or_path"]),
        "absent": ("has no weights and no complete checkpoint yet", []),
    }[what]
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "not safetensors":
        weights.write_bytes(b"PK\x03\x04 a pickle in a zip")
    elif what == "absent":
        weights.unlink()
        for path in run.glob("checkpoint-*/optimizer.pt"):
            path.unlink()
    else:
        extra = ["--model_name_or_path", saved_t5(tmp_path / "t5", d_model=32)]
    assert main(["evaluate", str(run), *extra]) == 1
    assert message in capsys.readouterr().err


def test_folders_that_cannot_be_written_are_named(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", *inputs, *QUICK, "--output_dir", str(tmp_path / "file" / "run")]) == 1
    assert "cannot write to the output directory" in capsys.readouterr().err
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert main(["train", *inputs, *QUICK, "--output_dir", str(tmp_path / "locked" / "run")]) == 1
        assert "Permission denied" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path, capsys, monkeypatch):
    plain, calls = Trainer.compute_loss, []

    def compute_loss(self, *arguments, **named):
        calls.append(1)
        return plain(self, *arguments, **named) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    assert main(["train", *inputs, *QUICK, "--output_dir", str(tmp_path)]) == 1
    assert "the loss is nan at step 4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "metrics.json").exists()


def test_resume_by_the_older_flags_and_a_checkpoints_path_find_the_run(finished, tmp_path, capsys):
    copy(finished, tmp_path)
    for flags in (
        ["--resume", "--output-dir", str(tmp_path)],
        ["--resume_from_checkpoint", str(tmp_path / "checkpoint-4")],
    ):
        with pytest.warns(DeprecationWarning) if flags[0] == "--resume" else contextlib.nullcontext():
            run = RunArguments.from_args(flags)
        assert (run.training.max_steps, run.adapters.task_hidden_dim) == (4, 5)
        assert run.training.output_dir == str(tmp_path) and not run.training.overwrite_output_dir
