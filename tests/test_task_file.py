"""Tasks of one's own: read where there is one way to read them, else asked for in their task.json."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hyperformer_fast.data import DataError, TaskSpec, load_tasks
from hyperformer_fast.data.infer import infer_spec
from hyperformer_fast.data.task_fields import ALLOWED


def folder(root, found, name="mine", fields=None):
    (root / name).mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    if fields is not None:
        (root / name / "task.json").write_text(json.dumps(fields))
    return str(root)


def texts(labels, **columns):
    return [{"text": f"some words {i}", "label": label, **columns} for i, label in enumerate(labels)]


def labels_of(root, name="mine"):
    data = load_tasks(str(root))[name]
    return list(data.splits["train"]["label"]), data.spec


def test_numbers_written_as_text_keep_their_order_and_come_back_as_they_were(tmp_path):
    named = [str(n) for n in (12, 2, 1, 10, 3, 4, 5, 6, 7, 8, 9, 11)]
    found, spec = labels_of(folder(tmp_path, texts(named)))
    assert found == [int(name) - 1 for name in named]
    assert [spec.answer(index, spec.rows_have_names) for index in found] == named
    assert spec.label({"label": 2}, "") == 1 and spec.label({"label": 2.0}, "") == 1
    with pytest.raises(DataError, match=r"must be one of 1, 2, .*, 12, got 0"):
        spec.label({"label": 0}, "here")
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


TWO_READINGS = {
    "0.0 and 1.0": ([0.0, 1.0] * 2, {"labels": ["0", "1"]}, [0, 1, 0, 1]),
    "whole floats": ([1.0, 3.0, 5.0], {"label_names": [1, 3, 5]}, [0, 1, 2]),
    "whole floats and integers": ([0, 1.0, 2], {"labels": ["0", "1", "2"]}, [0, 1, 2]),
    "integers from 1": ([1, 2, 3], {"label_names": [1, 2, 3]}, [0, 1, 2]),
    "integers with a gap": ([-1, 1, -1], {"label_names": [-1, 1]}, [0, 1, 0]),
    "fractions as text": (["2.5", "0.5"], {"label_names": ["0.5", "2.5"]}, [1, 0]),
    "one number twice": (["1", "01", "2"], {"label_names": [1, 2]}, None),
    "huge integers": ([10**400, 1], {"label_names": [1, 10**400]}, [1, 0]),
}


@pytest.mark.parametrize("what", TWO_READINGS)
def test_where_labels_have_two_readings_both_are_named_and_either_can_be_said(tmp_path, what):
    labels, as_classes, classes = TWO_READINGS[what]
    root = folder(tmp_path, texts(labels))
    with pytest.raises(DataError, match="can be read as .* classes or as a number") as asked:
        load_tasks(root)
    said = str(asked.value)
    assert f"{root}/mine/task.json: {json.dumps(as_classes)} for classes" in said
    if classes is not None:
        folder(tmp_path, texts(labels), fields=as_classes)
        found, spec = labels_of(tmp_path)
        assert found == classes and spec.labels is not None and spec.metrics == ("accuracy",)
        if "label_names" in as_classes:
            assert [str(spec.answer(index, spec.rows_have_names)) for index in found] == [
                str(label).removesuffix(".0") for label in labels
            ]
    if what != "huge integers":
        as_number = json.loads(said.split(" for classes, ")[1].removesuffix(" for a number"))
        folder(tmp_path, texts(labels), fields=as_number)
        found, spec = labels_of(tmp_path)
        assert found == [float(label) for label in labels] and spec.metrics == ("pearson", "spearman")


def test_labels_with_one_reading_are_still_read():
    for labels, expected in (
        ([0, 1, 2, 1], ("0", "1", "2")),
        (["b", "a"], ("0", "1")),
        ([0.5, 4, 1.0], None),
    ):
        assert infer_spec("mine", texts(labels), "").labels == expected


def test_labels_that_no_two_rows_share(tmp_path):
    """Ratings may all differ. Integers and texts that do seem to name the row, unless task.json says otherwise."""
    ratings = [i / 10 + 0.05 for i in range(30)]
    assert infer_spec("mine", texts([*ratings, 5]), "here").labels is None
    with pytest.raises(DataError, match="can be read as .* classes or as a number"):
        infer_spec("mine", texts([str(rating) for rating in ratings]), "here")
    named = [f"name {i}" for i in range(30)]
    with pytest.raises(DataError, match="no two rows .*label_columns"):
        infer_spec("mine", texts(named), "here")
    found, _ = labels_of(folder(tmp_path, texts(named), fields={"label_columns": ["label"]}))
    assert sorted(found) == list(range(30))


@pytest.mark.parametrize("column", ["id", "ID", "idx", "guid", "pair_id", "pairID", "uuid", "index"])
def test_a_text_column_that_names_the_row_is_not_fed_to_the_model(tmp_path, column):
    found = [{column: f"train-{i}", "text": f"some words {i}", "label": i % 2} for i in range(4)]
    root = folder(tmp_path, found)
    with pytest.raises(DataError, match=rf"'{column}' of 'mine' seems to identify the row.*task.json: .*\[\"text\"\]"):
        load_tasks(root)
    folder(tmp_path, found, fields={"columns": ["text"]})
    assert load_tasks(root)["mine"].splits["train"][1]["source"] == "text: some words 1"
    folder(tmp_path, found, fields={"columns": {"document": "text", "name": [column]}})
    assert load_tasks(root)["mine"].splits["train"][1]["source"] == "document: some words 1 name: train-1"


def test_columns_that_name_rows_are_known_by_their_values_too():
    many = [{"doc": f"a{i:03d}", "text": f"some words {i}", "label": i % 2} for i in range(30)]
    with pytest.raises(DataError, match="column 'doc' of 'mine' seems to identify the row"):
        infer_spec("mine", many, "here")
    words = [{"word": f"word{i}", "label": i % 2} for i in range(30)]
    assert list(infer_spec("mine", words, "here").columns) == ["word"]
    for row in many:
        row["doc"] = "d1"
    assert list(infer_spec("mine", many, "here").columns) == ["doc", "text"]


def test_an_index_is_not_taken_for_the_label():
    by_name = [{"text": "a b", "kind": "x", "idx": i} for i in range(3)]
    with pytest.raises(DataError, match="label of 'mine' would be its column 'idx'.*label_columns"):
        infer_spec("mine", by_name, "here")
    for labels in (list(range(30)), [f"r{i}" for i in range(30)]):
        with pytest.raises(DataError, match="no two rows of 'mine' have the same label"):
            infer_spec("mine", texts(labels), "here")


def test_a_task_file_says_what_the_rows_do_not(tmp_path):
    found = [{"a": "x", "b": "y", "c": "z", "n": 3, "kind": kind} for kind in ("good", "bad")]
    fields = {"columns": ["a", "b", "c"], "label_columns": ["kind"]}
    data = load_tasks(folder(tmp_path, found, fields=fields))["mine"]
    assert data.splits["train"][0]["source"] == "a: x b: y c: z" and data.spec.label_names == ("bad", "good")
    known = [{"sentence": "x", "verdict": 1}, {"sentence": "y", "verdict": 0}]
    data = load_tasks(folder(tmp_path, known, "cola", {"label_columns": ["verdict"]}), ["cola"])["cola"]
    assert data.splits["train"][0]["label"] == 1 and data.spec.metrics == ("matthews",)


def test_a_wrong_task_file_is_named(tmp_path):
    for fields, message in (
        ({"column": ["text"]}, "unknown field 'column'; did you mean 'columns'.; known are source, columns"),
        ({"columns": []}, r"columns must be a list of text columns, .*got \[\]"),
        ({"labels": "01"}, "labels must be a list of texts, or null .*got '01'"),
        ({"label_names": [True, False]}, "label_names must be a list of texts or whole numbers"),
        ({"labels": ["0", "1"], "metrics": ["pearson"]}, "metric 'pearson' does not fit"),
        ({"label_names": ["a", "a"]}, "label_names must be unique"),
        ({"labels": None, "low": 5, "high": 0}, "low must be below high"),
        ({"labels": None, "step": 0}, "step positive with at most six decimals, .*step=0"),
        ({"labels": None, "high": float("inf")}, "high must be a number, got inf"),
        ({"name": "yours"}, "remove the field 'name'"),
        ({"columns": ["t\ud800"]}, "columns is not text"),
        ([], "expected a JSON object"),
    ):
        root = folder(tmp_path, texts([0, 1]), fields=fields)
        with pytest.raises(DataError, match=f"mine/task.json: .*{message}"):
            load_tasks(root)


def test_a_task_file_can_give_every_field_of_a_spec():
    assert {field.name for field in dataclasses.fields(TaskSpec)} == {*ALLOWED, "name", "rows_have_names"}
