"""``hyperformer-fast tasks``, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import data_folder, rows, saved_t5

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.cli import main
from hyperformer_fast.training.predict import predict_run

QUICK = "--max_steps 2 --per_device_train_batch_size 4 --eval_strategy no --save_strategy no --logging_steps 1".split()
QUICK += "--task_embedding_dim 4 --projected_task_embedding_dim 4 --task_hidden_dim 5 --reduction_factor 4".split()
QUICK += "--max_predict_samples 4".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    inputs = ["--model_name_or_path", saved_t5(folder / "t5"), "--data_dir", data_folder(folder / "data")]
    assert main(["train", *inputs, *QUICK, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def tasks(*arguments: object) -> int:
    return main(["tasks", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def predicted(folder: Path, task: str) -> list[str]:
    return [row["prediction_text"] for row in predict_run(folder, rows("cola", 5), task)]


def test_the_tasks_are_listed_with_their_bytes(run, capsys):
    assert tasks("list", run) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[:2]] == [["cola", "16", "bytes"], ["stsb", "16", "bytes"]]
    assert said[2].startswith("and ") and "bytes each while its weights are kept" in said[2]


def test_a_task_goes_to_a_file_and_into_another_run(run, tmp_path, capsys):
    before, file = contents(run), tmp_path / "cola.safetensors"
    assert tasks("export", run, "cola", file) == 0
    assert tasks("export", run, "cola", file) == 1
    assert "exists" in capsys.readouterr().err
    assert tasks("export", run, "cola", file, "--overwrite") == 0
    imported = tmp_path / "imported"
    assert tasks("import", run, file, "--name", "ours", "--output", imported) == 1
    assert "no task is known as 'ours'" in capsys.readouterr().err and not imported.exists()
    assert tasks("import", run, file, "--name", "ours", "--like", "cola", "--output", imported) == 0
    assert "imported ours: 3 tasks in" in capsys.readouterr().out
    assert predicted(imported, "ours") == predicted(imported, "cola") == predicted(run, "cola")
    assert main(["evaluate", str(imported)]) == 0
    assert contents(run) == before


def test_a_task_is_removed_and_renamed(run, tmp_path, capsys):
    smaller, renamed = tmp_path / "smaller", tmp_path / "renamed"
    assert tasks("remove", run, "stsb", "--output", smaller) == 0
    assert list(json.loads((smaller / "run.json").read_text())["tasks"]) == ["cola"]
    assert main(["evaluate", str(smaller)]) == 0
    assert predicted(smaller, None) == predicted(run, "cola")
    assert tasks("rename", run, "cola", "acceptability", "--output", renamed) == 0
    assert predicted(renamed, "acceptability") == predicted(run, "cola")
    assert main(["evaluate", str(renamed)]) == 0  # of the others
    one, other = (HyperFormerModel.from_pretrained(folder) for folder in (run, renamed))
    assert other.hyperformer_config.tasks == ["acceptability", "stsb"]
    for mine, theirs in zip(one.hypernetworks.parameters(), other.hypernetworks.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    capsys.readouterr()
    for action in (
        ["remove", run, "nothing"],
        ["rename", run, "nothing", "x"],
        ["export", run, "nothing", tmp_path / "x"],
    ):
        output = [] if action[0] == "export" else ["--output", tmp_path / "x"]
        assert tasks(*action, *output) == 1
        assert "unknown task 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten_unasked_and_no_trained_run_at_all(run, tmp_path, capsys):
    before, output = contents(run), tmp_path / "run"
    remove = ["remove", run, "stsb", "--output"]
    assert tasks(*remove, run, "--overwrite") == 1
    assert "is the run itself, which stays as it is" in capsys.readouterr().err
    assert tasks(*remove, run / "checkpoint-9") == 1
    assert "lies in the run, which stays as it is" in capsys.readouterr().err
    assert tasks(*remove, output) == 0
    assert tasks(*remove, output) == 1
    assert "there is a run in" in capsys.readouterr().err
    assert tasks(*remove, output, "--overwrite") == 0
    (output / "checkpoint-2").mkdir()
    assert tasks(*remove, output, "--overwrite") == 1
    assert "checkpoint-2 for one" in capsys.readouterr().err
    assert (output / "checkpoint-2").is_dir() and contents(run) == before


def test_a_trained_run_without_its_results_is_not_replaced(run, tmp_path, capsys):
    """What is left of a run whose last evaluation failed has the files of one that the command makes."""
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("run.json", "model.safetensors", "config.json", "README.md"):
        shutil.copy(run / name, trained)
    before = contents(trained)
    assert tasks("remove", run, "stsb", "--output", trained, "--overwrite") == 1
    assert "that was trained, which is never replaced" in capsys.readouterr().err
    assert contents(trained) == before


def test_a_card_that_somebody_wrote_is_not_lost(run, tmp_path, capsys):
    remove = ["remove", run, "stsb", "--output", tmp_path / "smaller", "--overwrite"]
    assert tasks(*remove) == 0
    (tmp_path / "smaller" / "README.md").write_text("My notes.")
    assert tasks(*remove) == 1
    assert "README.md was written by somebody else" in capsys.readouterr().err
    assert (tmp_path / "smaller" / "README.md").read_text() == "My notes."


def test_a_file_that_is_no_task_is_not_replaced(run, tmp_path, capsys):
    before = contents(run)
    assert tasks("export", run, "cola", run / "model.safetensors", "--overwrite") == 1
    assert "it is the checkpoint of a whole model" in capsys.readouterr().err
    assert tasks("export", run, "cola", run / "run.json", "--overwrite") == 1
    assert contents(run) == before


def test_a_run_of_renamed_tasks_says_why_it_cannot_be_evaluated(run, tmp_path, capsys):
    assert tasks("remove", run, "stsb", "--output", tmp_path / "one") == 0
    assert tasks("rename", tmp_path / "one", "cola", "ours", "--output", tmp_path / "ours") == 0
    assert main(["evaluate", str(tmp_path / "ours")]) == 1
    assert "all were renamed or imported" in capsys.readouterr().err
    assert predicted(tmp_path / "ours", None) == predicted(run, "cola")


def test_a_task_is_renamed_whose_columns_nobody_knows(run, tmp_path):
    """Those of weights that a run started from have no entry in its run.json where the weights came without one."""
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    content = json.loads((bare / "run.json").read_text())
    del content["tasks"]["stsb"], content["data"]["stsb"]
    (bare / "run.json").write_text(json.dumps(content))
    assert tasks("rename", bare, "stsb", "similar", "--output", tmp_path / "renamed") == 0
    assert predicted(tmp_path / "renamed", "cola") == predicted(run, "cola")


def test_an_imported_task_has_the_prefix_of_the_runs_tasks(run, tmp_path):
    inputs = ["--model_name_or_path", str(run.parent / "t5"), "--data_dir", str(run.parent / "data")]
    assert main(["train", *inputs, *QUICK, "--add_prefix", "true", "--output_dir", str(tmp_path / "run")]) == 0
    before = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]["cola"]
    assert tasks("export", tmp_path / "run", "cola", tmp_path / "file") == 0
    assert tasks("remove", tmp_path / "run", "cola", "--output", tmp_path / "smaller") == 0
    assert tasks("import", tmp_path / "smaller", tmp_path / "file", "--output", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())["kept_tasks"]["cola"]
    assert again["prefix"] == before["prefix"] == "cola"


def test_the_tasks_of_full_fine_tuning_are_listed_too(run, tmp_path, capsys):
    inputs = ["--model_name_or_path", str(run.parent / "t5"), "--data_dir", str(run.parent / "data")]
    quick = [*QUICK[: QUICK.index("--task_embedding_dim")], "--max_predict_samples", "4", "--variant", "finetuning"]
    assert main(["train", *inputs, *quick, "--output_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert tasks("list", tmp_path / "run") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[:2]] == [["cola", "0", "bytes"], ["stsb", "0", "bytes"]]
    assert tasks("remove", tmp_path / "run", "stsb", "--output", tmp_path / "smaller") == 0
    assert tasks("export", tmp_path / "run", "cola", tmp_path / "file") == 1
    assert "has no weights of its own" in capsys.readouterr().err
