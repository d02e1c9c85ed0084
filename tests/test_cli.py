"""The command: whole runs, what it refuses and how it says so, and that nothing good is lost by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import data_folder, rows, saved_t5, small_t5

import hyperformer_fast
from hyperformer_fast import HyperFormerModel
from hyperformer_fast.cli import main
from hyperformer_fast.training import RunConfig
from hyperformer_fast.training import trainer as trainer_module
from hyperformer_fast.training.arguments import RunConfigError

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]
ADAPTERS = ["--hyperformer", "task_embedding_dim=4", "projected_task_embedding_dim=4", "task_hidden_dim=5"]
QUICK = [
    "--steps",
    "4",
    "--batch-size",
    "4",
    "--eval-steps",
    "2",
    "--save-steps",
    "2",
    "--logging-steps",
    "1",
    *ADAPTERS,
]
QUICK += ["--reduction-factor", "4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return ["--model", saved_t5(folder / "t5"), "--data-dir", data_folder(folder / "data")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inputs):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *inputs, *QUICK, "--output-dir", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_what_it_should(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "run.json",
        "hyperformer.safetensors",
        "metrics.json",
        "history.json",
        "curves.png",
        "checkpoint-4",
    }
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["cola", "stsb"] and metrics["steps"] == 4
    assert set(metrics["tasks"]["stsb"]["metrics"]) == {"pearson", "spearman", "score"}
    steps = [entry["step"] for entry in json.loads((finished / "history.json").read_text()) if "eval_average" in entry]
    assert steps == [2, 4]
    assert HyperFormerModel.from_pretrained(small_t5(), finished).hyperformer_config.reduction_factor == 4


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
    assert alone["text"] == lines[0]["text"]
    assert main(["predict", str(finished), "--task", "stsb", "--text", "s000"]) == 1
    assert "stsb has 2 texts (sentence1, sentence2), got 1" in capsys.readouterr().err


def test_an_unfinished_run_is_taken_at_its_newest_checkpoint(finished, tmp_path, capsys):
    copy(finished, tmp_path)
    (tmp_path / "hyperformer.safetensors").unlink()
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
    train = ["train", *inputs, *QUICK, "--output-dir", str(tmp_path)]
    assert main(train) == 1
    assert "holds another run: continue it (--resume)" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert main([*train, "--overwrite", "--steps", "1", "--tasks", "cola"]) == 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] and (
        tmp_path / "mine.txt"
    ).exists()
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["tasks"] == ["cola"]


def test_a_failed_start_keeps_the_run_that_was_to_be_replaced(finished, inputs, tmp_path):
    copy(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    (tmp_path / "t5").mkdir()
    for wrong in (["--tasks", "rte"], ["--reduction-factor", "99"], ["--model", str(tmp_path / "t5")]):
        assert main(["train", *inputs, *QUICK, "--output-dir", str(tmp_path / "run"), "--overwrite", *wrong]) in (1, 2)
        assert contents(tmp_path / "run") == before


def test_resume_goes_on_as_if_nothing_had_been(finished, inputs, tmp_path, capsys):
    copy(finished, tmp_path)
    checkpoint, weights = tmp_path / "checkpoint-4", (tmp_path / "hyperformer.safetensors").read_bytes()
    for path in (*checkpoint.iterdir(), tmp_path / "hyperformer.safetensors", tmp_path / "metrics.json"):
        path.unlink()
    checkpoint.rmdir()
    assert main(["train", "--resume", "--output-dir", str(tmp_path), "--save-steps", "1"]) == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert (tmp_path / "hyperformer.safetensors").read_bytes() == weights
    before, after = (json.loads((folder / "metrics.json").read_text())["tasks"] for folder in (finished, tmp_path))
    assert before == after and [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_resume_refuses_another_run(finished, tmp_path, capsys):
    copy(finished, tmp_path)
    before = contents(tmp_path)
    for changes, message in (
        (["--learning-rate", "0.5"], "learning_rate was 0.001 and is now 0.5"),
        (["--variant", "hyperformer"], "hyperformer was"),
        (["--tasks", "cola"], r"tasks was ['cola', 'stsb'] and is now ['cola']"),
        (["--data-dir", data_folder(tmp_path / "other", n=30)], "data_dir was"),
    ):
        assert main(["train", "--resume", "--output-dir", str(tmp_path), *changes]) == 1
        assert message in capsys.readouterr().err
    run = json.loads((tmp_path / "run.json").read_text())
    run["data"]["cola"]["train"]["sha256"] = "0"
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert main(["train", "--resume", "--output-dir", str(tmp_path)]) == 1
    assert "the training rows of 'cola' have changed since it started" in capsys.readouterr().err
    left = {name: content for name, content in contents(tmp_path).items() if not name.startswith("other")}
    assert left.keys() == before.keys() and all(left[name] == before[name] for name in left if name != "run.json")
    assert main(["train", "--resume", "--output-dir", str(tmp_path / "nowhere")]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err


REFUSED = {
    "unknown task": (["--tasks", "cola", "rte"], 2, "unknown task 'rte'"),
    "unknown activation": (["--hyperformer", "non_linearity=tanh"], 2, "non_linearity"),
    "no bottleneck": (["--reduction-factor", "17"], 1, "reduction_factor=17 leaves no bottleneck at width d=16"),
    "unknown field": (["--hyperformer", "depth=3"], 2, "unknown configuration fields ['depth']"),
    "bad schedule": (["--schedule", "step"], 2, "schedule must be one of linear, cosine, constant, got 'step'"),
    "no steps": (["--steps", "0"], 2, "steps must be at least 1, got 0"),
    "repeated task": (["--tasks", "cola,cola"], 2, "tasks must be unique"),
    "both": (["--resume", "--overwrite"], 2, "exclude each other"),
    "no model": (["--model", "./nowhere"], 1, "the model './nowhere' is not a folder"),
    "no data": (["--data-dir", "./nowhere"], 1, "nowhere' is not a directory"),
    "no config": (["missing.json"], 2, "cannot read missing.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments_are_one_message(inputs, tmp_path, capsys, what):
    arguments, code, message = REFUSED[what]
    positional = [a for a in arguments if a.endswith(".json")]
    options = [a for a in arguments if a not in positional]
    assert main(["train", *positional, *inputs, *QUICK, "--output-dir", str(tmp_path / "run"), *options]) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("hyperformer-fast: error:") == 1
    assert "unexpected" not in err
    assert not (tmp_path / "run").exists()


def test_bad_data_is_named_with_its_line(inputs, tmp_path, capsys):
    folder = data_folder(tmp_path / "data")
    with open(tmp_path / "data" / "cola" / "validation.jsonl", "a") as file:
        file.write('{"sentence": "a", "label": 9}\n')
    assert main(["train", *inputs, *QUICK, "--data-dir", folder, "--output-dir", str(tmp_path / "run")]) == 1
    assert "cola/validation.jsonl:7: 'label' is out of range" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["truncated", "not safetensors", "another T5", "absent"])
def test_bad_checkpoints_are_named(finished, tmp_path, capsys, what):
    run, weights = tmp_path / "run", tmp_path / "run" / "hyperformer.safetensors"
    copy(finished, run)
    message, extra = {
        "truncated": ("is not a whole safetensors file", []),
        "not safetensors": ("is not a whole safetensors file", []),
        "another T5": ("was trained on another T5: d_model was 16, this one's is 32", ["--model"]),
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
        extra = ["--model", saved_t5(tmp_path / "t5", d_model=32)]
    assert main(["evaluate", str(run), *extra]) == 1
    assert message in capsys.readouterr().err


def test_folders_that_cannot_be_written_are_named(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", *inputs, *QUICK, "--output-dir", str(tmp_path / "file" / "run")]) == 1
    assert "cannot write to the output directory" in capsys.readouterr().err
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert main(["train", *inputs, *QUICK, "--output-dir", str(tmp_path / "locked" / "run")]) == 1
        assert "Permission denied" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path, capsys, monkeypatch):
    plain, calls = trainer_module.Trainer.compute_loss, []

    def compute_loss(self, *arguments, **named):
        calls.append(1)
        return plain(self, *arguments, **named) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(trainer_module.Trainer, "compute_loss", compute_loss)
    assert main(["train", *inputs, *QUICK, "--output-dir", str(tmp_path)]) == 1
    assert "the loss is nan at step 4" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "metrics.json").exists()


def test_names_come_one_by_one_or_with_commas():
    from hyperformer_fast.cli import _parser

    for given in (["--tasks", "a", "b", "c"], ["--tasks", "a,b", "c"], ["--tasks", "a", "--tasks", "b,c"]):
        assert _parser().parse_args(["train", *given]).tasks == ["a", "b", "c"]
    before = _parser().parse_args(["train", "x.json", "--tasks", "a", "b", "--steps", "3"])
    assert (before.config, before.tasks, before.steps) == ("x.json", ["a", "b"], 3)
    for wrong in (
        ["train", "--tasks"],
        ["train", "--tasks", "a,,b"],
        ["train", "--step", "3"],
        [],
        ["train", "--steps", "x"],
    ):
        with pytest.raises(SystemExit) as exit:
            _parser().parse_args(wrong)
        assert exit.value.code == 2


def test_configurations_are_json_and_options_override_them(tmp_path):
    run = RunConfig(tasks=["cola"], steps=7, hyperformer={"variant": "hyperformer"})
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run.to_dict()))
    assert RunConfig.load(path) == run
    changed = RunConfig.load(path, {"steps": 8, "hyperformer": {"reduction_factor": 2}})
    assert changed.steps == 8 and changed.hyperformer == {"variant": "hyperformer", "reduction_factor": 2}
    assert RunConfig.from_dict({}) == RunConfig()
    assert RunConfig.from_dict({"model": "t5-base"}).hyperformer == {}
    for content, message in (
        ({"step": 3}, r"unknown fields \['step'\]; known are .*'steps'"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"bf16": 1}, "bf16 must be true or false, got 1"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"hyperformer": {"tasks": ["a"]}}, "must not have the field 'tasks'"),
        ({"keep_best": True, "eval_steps": 0}, "keep_best needs evaluations"),
        ([], "must be a JSON object, got list"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(RunConfigError, match=f"run.json: .*{message}"):
            RunConfig.load(path)
    path.write_text("{")
    with pytest.raises(RunConfigError, match="run.json: not JSON"):
        RunConfig.load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_papers_configurations_load(path):
    config = RunConfig.load(path).hyperformer_config(["cola"])
    assert config.variant == {"demo": "hyperformer++"}.get(path.stem, path.stem)


def test_help_is_instant():
    script = "import sys; from hyperformer_fast.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not heavy, heavy"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    for command in ("train", "evaluate", "predict", "params", "doctor"):
        assert command in out
