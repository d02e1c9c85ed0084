"""``hyperformer-fast predict``: whose columns are whose, labels as the rows had them, and every kind of file."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from support.runs import saved_t5

import hyperformer_fast
from hyperformer_fast.cli import main
from hyperformer_fast.data import DataError
from hyperformer_fast.training import RunError, predict_run
from hyperformer_fast.training import predict as predict_module
from hyperformer_fast.training.tables import Table, read_table, write_table

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
    """A function that sets what the model writes: texts in order, or a function of the source."""

    def set_texts(*written):
        def generated(model, tokenizer, tasks, sources, *_):
            if not callable(written[0]):
                return list(written)
            return [written[0](task, source) for task, source in zip(tasks, sources, strict=True)]

        monkeypatch.setattr(predict_module, "generate_mixed", generated)

    return set_texts


def predict(run, tmp_path, capsys, task, found):
    capsys.readouterr()
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    named = ["--task", task] if task else []
    code = main(["predict", str(run), *named, "--input", str(file), "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()] if code == 0 else None
    return lines, capsys.readouterr()


def test_no_column_of_the_user_is_replaced(run, tmp_path, capsys, writes):
    writes("3", "no label")
    found = [{"text": "Who is it ?", "prediction": "mine"}, {"text": "Where ?", "prediction_text": None, "id": 7}]
    lines, said = predict(run, tmp_path, capsys, "trec", found)
    assert lines == [
        {**found[0], "hyperformer_prediction": 3, "hyperformer_prediction_text": "3"},
        {**found[1], "hyperformer_prediction": None, "hyperformer_prediction_text": "no label"},
    ]
    assert list(lines[1])[:3] == ["text", "prediction_text", "id"]
    for column in ("prediction", "prediction_text"):
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
    assert line == {"text": "Who is it ?", "prediction": 3, "prediction_text": "3"}


@pytest.mark.parametrize(
    ("task", "written", "expected"),
    [("trec", "5", 5), ("rte", "1", "not_entailment"), ("star", "0", "9"), ("star", "1", "10"), ("stsb", "3.8", 3.8)],
)
def test_labels_come_back_as_the_training_rows_had_them(run, writes, task, written, expected):
    writes(written)
    (line,) = predict_run(run, [texts(task, 0)], task)
    assert line["prediction"] == expected and type(line["prediction"]) is type(expected)


@pytest.fixture
def trained_on_indices(run):
    """The run, as if all of its training rows had held indices."""
    path = run / "run.json"
    before = path.read_text()
    content = json.loads(before)
    for spec in content["tasks"].values():
        spec["rows_have_names"] = False
    path.write_text(json.dumps(content))
    yield run
    path.write_text(before)


@pytest.mark.parametrize(("label", "expected"), [("entailment", "not_entailment"), (0, 1)])
def test_rows_with_names_get_names_of_a_run_trained_on_indices(trained_on_indices, writes, label, expected):
    writes("1")
    (line,) = predict_run(trained_on_indices, [texts("rte", 0) | {"label": label}], "rte")
    assert (line["label"], line["prediction"]) == (label, expected)


def test_a_class_label_gives_names_too(trained_on_indices, writes):
    writes("1")
    names = ClassLabel(names=["entailment", "not_entailment"])
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": names})
    rows = Dataset.from_list([texts("rte", 0) | {"label": 0}], features=features)
    (line,) = predict_run(trained_on_indices, rows, "rte")
    assert (line["label"], line["prediction"]) == (0, "not_entailment")
    # In another order, index 1 would be "entailment" to the reader of the rows.
    (line,) = predict_run(
        trained_on_indices, rows.cast_column("label", ClassLabel(names=["not_entailment", "entailment"])), "rte"
    )
    assert line["prediction"] == "not_entailment"


def test_texts_are_decoded_as_in_the_evaluation(run, monkeypatch):
    path = run / "run.json"
    before = path.read_text()
    content = json.loads(before)
    content["arguments"] |= {"generation_num_beams": 3, "test_max_target_length": 7}
    content["tasks"]["rte"] |= {"target": "text", "labels": None, "label_names": [], "metrics": ["bleu"]}
    path.write_text(json.dumps(content))
    given = {}
    monkeypatch.setattr(predict_module, "generate_mixed", lambda *all: given.update(all[4]["rte"]) or [" a text "])
    try:
        (line,) = predict_run(run, [texts("rte", 0)], "rte")
    finally:
        path.write_text(before)
    assert (given["num_beams"], given["max_new_tokens"]) == (3, 7)
    assert (line["prediction"], line["prediction_text"]) == ("a text", " a text ")


def test_a_run_from_before_names_were_recorded_gives_names_of_inferred_tasks(run, writes):
    path = run / "run.json"
    before = path.read_text()
    content = json.loads(before)
    for spec in content["tasks"].values():
        del spec["rows_have_names"]
    path.write_text(json.dumps(content))
    try:
        for task, expected in (("rte", 1), ("star", "10")):
            writes("1")
            (line,) = predict_run(run, [texts(task, 0)], task)
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


def test_a_run_from_another_ones_weights_still_predicts_that_ones_tasks(run, tmp_path):
    train = ["train", "--init_from", str(run), "--model_name_or_path", str(run.parent / "t5"), "--tasks", "new"]
    rows = "".join(json.dumps({"words": f"word {i}", "label": i % 2}) + "\n" for i in range(4))
    for split in ("train", "validation"):
        (tmp_path / "data" / "new").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "new" / f"{split}.jsonl").write_text(rows)
    train += ["--data_dir", str(tmp_path / "data"), "--max_steps", "1", "--per_device_train_batch_size", "2"]
    for name, start in (("second", run), ("third", tmp_path / "second")):
        train[2] = str(start)
        assert main([*train, "--output_dir", str(tmp_path / name)]) == 0
    rows = [texts("star", 0) | {"task": "star"}, {"words": "word 1", "task": "new"}]
    star, new = predict_run(tmp_path / "third", rows)
    assert star["prediction"] in ("9", "10", None) and new["prediction"] in (0, 1, None)


#: Rows of four tasks in one file; each keeps the columns of the others, as in a table.
MIXED = [
    {"id": "007", "task": "trec", "text": "Who ?", "sentence1": None, "sentence2": None, "review": None},
    {
        "id": "",
        "task": "rte",
        "text": None,
        "sentence1": "It rains, again.",
        "sentence2": 'A "wet"\nday',
        "review": None,
    },
    {"id": "NA", "task": "star", "text": None, "sentence1": None, "sentence2": None, "review": "größer"},
    {"id": "1e3", "task": "trec", "text": "Where ?", "sentence1": None, "sentence2": None, "review": None},
    {"id": "x", "task": "stsb", "text": None, "sentence1": "one", "sentence2": "two", "review": None},
]
ANSWERS = [4, "not_entailment", "10", 4, 2.6]


def written_by_task(task, source):
    return {"trec": "4", "rte": "1", "star": "1", "stsb": "2.6"}[task]


def write_input(path, rows):
    dataset = Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        dataset.to_csv(path, sep="," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)


@pytest.mark.parametrize("output", ["out.jsonl", "out.json", "out.csv", "out.tsv", "out.parquet"])
@pytest.mark.parametrize("source", ["in.jsonl", "in.json", "in.csv", "in.tsv", "in.parquet", "folder"])
def test_every_kind_of_file_keeps_its_columns(run, tmp_path, writes, source, output):
    writes(written_by_task)
    write_input(tmp_path / source, MIXED)
    predict_module.predict_file(run, tmp_path / source, tmp_path / output)
    found = read_table(tmp_path / output).rows
    assert all(list(row) == [*MIXED[0], "prediction", "prediction_text"] for row in found)
    as_text = {"out.csv", "out.tsv"} & {output} or {"in.csv", "in.tsv"} & {source}
    for row, before, answer in zip(found, MIXED, ANSWERS, strict=True):
        for name, value in before.items():
            assert row[name] == (value or "" if as_text else value), name
        # One type for a column in CSV and parquet.
        assert row["prediction"] == (answer if "json" in output else str(answer))
        assert row["prediction_text"] == written_by_task(row["task"], "")


def test_tasks_may_be_mixed_or_grouped(run):
    """The model's own texts: a row's does not depend on what stands around it."""
    rows = [texts(task, i) | {"task": task} for i in range(6) for task in LABELS]
    grouped = sorted(rows, key=lambda row: row["task"])
    one_by_one = [predict_run(run, [texts(task, i)], task)[0] for i in (0, 5) for task in LABELS]
    mixed, ordered = predict_run(run, rows), predict_run(run, grouped)
    assert sorted(mixed, key=lambda row: row["task"]) == ordered
    assert [row["task"] for row in mixed] == [row["task"] for row in rows]
    for alone, among in zip(one_by_one, [*mixed[:4], *mixed[-4:]], strict=True):
        assert alone == {name: value for name, value in among.items() if name != "task"}


def test_a_task_column_may_be_a_class_label(run, writes):
    writes(written_by_task)
    features = {name: Value("string") for name in MIXED[0]} | {
        "task": ClassLabel(names=["stsb", "trec", "rte", "star"])
    }
    found = predict_run(run, Dataset.from_list(MIXED, features=Features(features)))
    assert [row["prediction"] for row in found] == ANSWERS
    assert [row["task"] for row in found] == [1, 2, 3, 1, 0]


@pytest.mark.parametrize("task", ["nothing", None, 0])
def test_a_row_of_no_task_is_refused(run, task):
    with pytest.raises(DataError, match=r"row 2: column 'task' must be the name of one of the run's tasks \(rte, "):
        predict_run(run, [MIXED[0], {**MIXED[0], "task": task}])


def test_a_row_of_another_task_is_refused(run, writes):
    with pytest.raises(DataError, match="row 2: column 'task' says 'rte', but the task given is 'trec'"):
        predict_run(run, MIXED, "trec")
    writes("3")
    (line,) = predict_run(run, [{"text": "Who ?", "task": "homework"}], "trec")
    assert line["task"] == "homework" and line["prediction"] == 3


def test_without_a_task_the_cure_is_named(run):
    with pytest.raises(RunError, match="add a column 'task' to them; this run has rte, "):
        predict_run(run, [{"text": "Who ?"}])


def test_the_order_of_version_0_1_still_works(run, writes):
    writes("3")
    with pytest.warns(DeprecationWarning, match="takes the rows before the task"):
        (line,) = predict_run(run, "trec", [{"text": "Who ?"}])
    assert line["prediction"] == 3


@pytest.mark.parametrize("link", [None, "symbolic", "hard"])
def test_the_input_is_never_overwritten(run, tmp_path, link):
    source, output = tmp_path / "in.csv", tmp_path / ("out.csv" if link else "in.csv")
    source.write_text("text\nWho ?\n")
    if link:
        (output.symlink_to if link == "symbolic" else output.hardlink_to)(source)
    with pytest.raises(RunError, match="is the input: give another name"):
        predict_module.predict_file(run, source, output, "trec")
    assert source.read_text() == "text\nWho ?\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", "text,id\na\n", "in.csv:2: a row must have 2 values"),
        ("in.csv", "text\n", "holds no rows"),
        ("in.json", '["a"]', "row 1: a row must be a JSON object, got str"),
        ("in.jsonl", '{"text": "a"}\n{"text": 1}', "in.jsonl:2: column 'text' must be text, got 1"),
        ("in.parquet", "text", "in.parquet cannot be read"),
        ("in.xlsx", "text", "the format must be one of .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_a_broken_input_is_named(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as raised:
        predict_module.predict_file(run, tmp_path / name, tmp_path / "out.csv", "trec")
    assert message in str(raised.value)
    assert not (tmp_path / "out.csv").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "load_model", None)
    for output, message in (("no/out.csv", "is not a folder"), ("out.xlsx", "written to"), (".", "is a folder")):
        with pytest.raises((RunError, DataError), match=message):
            predict_module.predict_file(run, None, tmp_path / output, "trec", texts=["Who ?"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_write_what_one_writes(run, tmp_path):
    rows = [texts(task, i) | {"task": task, "prediction": i} for i in range(5) for task in LABELS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict_module.predict_file(run, tmp_path / "in.jsonl", tmp_path / "one.jsonl")
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m hyperformer_fast.cli predict".split()
    files = [str(run), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "two.jsonl")]
    root = str(Path(hyperformer_fast.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": root, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, *files], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("20 rows in") == done.stderr.count("already have a column") == 1
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_carriage_return_is_read_back(tmp_path, kind):
    rows = [{"a": "x\ry", "b": 'q"'}, {"a": "x\r\ny", "b": ""}]
    write_table(tmp_path / f"rows.{kind}", Table(rows, ["1", "2"]))
    assert read_table(tmp_path / f"rows.{kind}").rows == rows
