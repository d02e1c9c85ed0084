"""``hyperformer-fast predict``: whose columns are whose, and labels as the rows had them."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from support.runs import saved_t5

from hyperformer_fast.cli import main
from hyperformer_fast.training import predict as predict_module

#: Labels of the rows of each task: indices, names, numbers as text, a number.
LABELS = {"trec": [0, 5], "rte": ["not_entailment", "entailment"], "star": ["10", "9"], "stsb": [0.5, 4.0]}
COLUMNS = {"trec": ["text"], "rte": ["sentence1", "sentence2"], "star": ["review"], "stsb": ["sentence1", "sentence2"]}


def texts(task: str, i: int) -> dict[str, str]:
    return {column: f"some words {i}" for column in COLUMNS[task]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    for task, labels in LABELS.items():
        (root / "data" / task).mkdir(parents=True)
        found = [texts(task, i) | {"label": label} for i, label in enumerate(labels * 2)]
        for split in ("train", "validation"):
            (root / "data" / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    train = ["train", "--model", saved_t5(root / "t5"), "--data-dir", str(root / "data"), "--steps", "1"]
    train += ["--reduction-factor", "4", "--eval-steps", "0", "--save-steps", "0", "--batch-size", "2"]
    assert main([*train, "--output-dir", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def writes(monkeypatch):
    """A function that sets what the model writes."""

    def set_texts(*written):
        monkeypatch.setattr(predict_module, "generate_texts", lambda *_: list(written))

    return set_texts


def predict(run, tmp_path, capsys, task, found):
    capsys.readouterr()
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    code = main(["predict", str(run), "--task", task, "--input", str(file), "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()] if code == 0 else None
    return lines, capsys.readouterr()


def test_no_column_of_the_user_is_replaced(run, tmp_path, capsys, writes):
    writes("3", "no label")
    found = [{"text": "Who is it ?", "prediction": "mine"}, {"text": "Where is it ?"}]
    lines, said = predict(run, tmp_path, capsys, "trec", found)
    assert lines == [
        {**found[0], "hyperformer_prediction": 3, "hyperformer_text": "3"},
        {**found[1], "hyperformer_prediction": None, "hyperformer_text": "no label"},
    ]
    for column in ("text", "prediction"):
        assert f"the rows already have a column '{column}': the new one is named 'hyperformer_{column}'" in said.err
    assert not said.out
    again, said = predict(run, tmp_path, capsys, "trec", lines)
    assert again is None and "rename one of them, so that none is replaced" in said.err
    assert "unexpected" not in said.err


def test_a_text_on_the_command_line_is_kept_too(run, capsys, writes):
    writes("3")
    capsys.readouterr()
    assert main(["predict", str(run), "--task", "trec", "--text", "Who is it ?"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {"text": "Who is it ?", "prediction": 3, "hyperformer_text": "3"}


@pytest.mark.parametrize(
    ("task", "written", "expected"),
    [("trec", "5", 5), ("rte", "1", "not_entailment"), ("star", "0", "9"), ("star", "1", "10"), ("stsb", "3.8", 3.8)],
)
def test_labels_come_back_as_the_training_rows_had_them(run, tmp_path, capsys, writes, task, written, expected):
    writes(written)
    ((line,), said) = predict(run, tmp_path, capsys, task, [texts(task, 0)])
    assert line["prediction"] == expected and type(line["prediction"]) is type(expected)


def test_rows_with_names_get_names_of_a_run_trained_on_indices(run, tmp_path, capsys, writes):
    path = run / "run.json"
    before = path.read_text()
    content = json.loads(before)
    content["tasks"]["rte"]["rows_have_names"] = False
    path.write_text(json.dumps(content))
    try:
        for label, expected in (("entailment", "not_entailment"), (0, 1)):
            writes("1")
            ((line,), _) = predict(run, tmp_path, capsys, "rte", [texts("rte", 0) | {"label": label}])
            assert (line["label"], line["prediction"]) == (label, expected)
    finally:
        path.write_text(before)


def test_a_run_from_before_names_were_recorded_gives_names_of_inferred_tasks(run, tmp_path, capsys, writes):
    path = run / "run.json"
    before = path.read_text()
    content = json.loads(before)
    for spec in content["tasks"].values():
        del spec["rows_have_names"]
    path.write_text(json.dumps(content))
    try:
        for task, expected in (("rte", 1), ("star", "10")):
            writes("1")
            ((line,), _) = predict(run, tmp_path, capsys, task, [texts(task, 0)])
            assert line["prediction"] == expected
    finally:
        path.write_text(before)


def test_what_utf8_lacks_is_escaped_in_columns_and_refused_in_texts(run, tmp_path, capsys, writes, monkeypatch):
    writes("1")
    found = [{"text": "Wer ist das größte ?", "note": "a\ud800"}]
    ((line,), _) = predict(run, tmp_path, capsys, "trec", found)
    assert line["note"] == "a\ud800" and line["text"] == found[0]["text"]
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["predict", str(run), "--task", "trec", "--text", "größte"]) == 0
    monkeypatch.undo()
    ascii_only.seek(0)
    assert json.loads(ascii_only.read())["text"] == "größte"
    none, said = predict(run, tmp_path, capsys, "trec", [{"text": "a\ud800"}])
    assert none is None and "in.jsonl:1: column 'text' is not text" in said.err


def test_a_pipe_is_written_to(run, tmp_path, writes):
    """As /dev/stdout is, which a file must not replace."""
    writes("3")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(["predict", str(run), "--task", "trec", "--text", "Who is it ?", "--output", str(pipe)]) == 0
        assert json.loads(os.read(reader, 1 << 16))["text"] == "Who is it ?"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
