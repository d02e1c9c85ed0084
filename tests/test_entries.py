"""Tasks as their entries describe them: from files, from a data set, with texts to write."""

from __future__ import annotations

import json

import datasets
import pytest
from transformers import ByT5Tokenizer

from hyperformer_fast.data import DataError, TaskData, TaskSpec, UnknownTask, encode, load_tasks


class Arguments:
    data_dir = None

    def __init__(self, **fields):
        self.__dict__.update(fields)


def entry_file(path, **fields):
    path.write_text(json.dumps({"headline": {"source": "summarize: {article}", "target": "text", **fields}}))
    return str(path)


def lines(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path.name


ARTICLES = [{"article": f"story {i}", "title": f"title {i}", "date": "2020-01-02"} for i in range(4)]
FIELDS = {"label_columns": ["title"], "metrics": ["rouge1"]}


def test_an_entry_names_its_own_files(tmp_path):
    (tmp_path / "train.csv").write_text('article,title,year\nstory 0,title 0,1990\n"a, b",NA,1991\n')
    files = {"train_file": "train.csv", "validation_file": lines(tmp_path / "v.jsonl", ARTICLES)}
    path = entry_file(tmp_path / "tasks.json", **FIELDS, **files)
    data = load_tasks(Arguments(task_file=path))
    assert list(data) == ["headline"]
    splits = data["headline"].splits
    assert splits["train"][1] == {"source": "summarize: a, b", "target": "NA", "label": "NA"}
    assert len(splits["validation"]) == 4 and "test" not in splits
    with pytest.raises(DataError, match="task 'headline': train_file .*absent.csv' is absent"):
        load_tasks(
            Arguments(task_file=entry_file(tmp_path / "t.json", **FIELDS, **{**files, "train_file": "absent.csv"}))
        )
    lines(tmp_path / "v.jsonl", [*ARTICLES, {"article": "x"}])
    with pytest.raises(DataError, match=r"v.jsonl:5: no column 'title'; there are 'article'"):
        load_tasks(Arguments(task_file=path))


def test_a_data_set_is_found_by_its_name(tmp_path):
    """A folder stands in for a repository of the Hub: load_dataset reads both in the same way."""
    repository = tmp_path / "repository"
    found = [{"translation": {"en": f"a {i}", "de": f"b {i}"}, "id": i} for i in range(6)]
    for split in ("train", "validation", "test"):
        lines(repository / f"{split}.jsonl", found)
    spec = TaskSpec(
        name="en-de", source="{translation.en}", target="text", label_columns="translation.de", metrics=["bleu"],
        dataset=str(repository), splits={"train": "train", "validation": "test"},
    )  # fmt: skip
    cache = str(tmp_path / "cache")
    data = load_tasks(None, ["en-de"], specs={"en-de": spec}, selecting=True, cache_dir=cache)["en-de"]
    assert data.splits["train"][2] == {"source": "a 2", "target": "b 2", "label": "b 2"}
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 6, "validation": 3, "test": 3}
    missing = TaskSpec(**{**spec.to_dict(), "splits": {"train": "train", "validation": "dev"}})
    with pytest.raises(DataError, match="has no split 'dev', only .*train.*; say which of them is 'validation'"):
        load_tasks(None, ["en-de"], specs={"en-de": missing}, cache_dir=cache)


def test_a_data_set_of_which_only_train_is_named_lacks_validation(tmp_path):
    datasets.Dataset.from_list([{"a": "x", "label": i} for i in (0, 1)]).to_json(tmp_path / "set" / "train.jsonl")
    entry = {"source": "{a}", "labels": ["0", "1"], "dataset": str(tmp_path / "set"), "splits": {"train": "train"}}
    (tmp_path / "tasks.json").write_text(json.dumps({"mine": entry | {"target": "class"}}))
    with pytest.raises(DataError, match="has no split 'validation', only train"):
        load_tasks(Arguments(task_file=str(tmp_path / "tasks.json")), ["mine"], cache_dir=str(tmp_path / "cache"))


def test_one_file_for_two_splits_is_seen(tmp_path):
    (tmp_path / "rows.csv").write_text("a,label\n" + "".join(f"x{i},{i % 2}\n" for i in range(6)))
    (tmp_path / "more.csv").write_text("a,label\ny,0\nz,1\n")
    entry = {"source": "{a}", "target": "class", "labels": ["no", "yes"], "validation_file": "rows.csv"}
    arguments = Arguments(task_file=str(tmp_path / "tasks.json"))
    for files, message in (
        ({"train_file": "rows.csv"}, "mine: validation has the rows of train"),
        ({"train_file": "more.csv", "test_file": "more.csv"}, "mine: test has the rows of train"),
    ):
        (tmp_path / "tasks.json").write_text(json.dumps({"mine": entry | files}))
        with pytest.warns(UserWarning, match=message):
            load_tasks(arguments, ["mine"], cache_dir=str(tmp_path / "cache"))
    (tmp_path / "tasks.json").write_text(
        json.dumps({"mine": entry | {"train_file": "more.csv", "test_file": "rows.csv"}})
    )
    found = load_tasks(arguments, ["mine"], selecting=True, cache_dir=str(tmp_path / "cache"))["mine"].splits
    assert not {*found["validation"]["source"]} & {*found["test"]["source"]} and len(found["test"]) == 3


def test_a_saved_runs_task_is_read_from_where_data_dir_is_now(tmp_path):
    for place, text in (("then", "old"), ("now", "new")):
        folder = tmp_path / place / "mine"
        lines(folder / "rows.jsonl", [{"a": text, "label": 0}])
        files = {"train_file": "rows.jsonl", "validation_file": lines(folder / "dev.jsonl", [{"a": text, "label": 1}])}
        (folder / "task.json").write_text(json.dumps({"columns": ["a"], "labels": ["0", "1"], **files}))
    saved = load_tasks(str(tmp_path / "then"), cache_dir=str(tmp_path / "cache"))["mine"].spec
    data = load_tasks(str(tmp_path / "now"), specs={"mine": saved}, cache_dir=str(tmp_path / "cache"))["mine"]
    assert data.splits["validation"]["source"][:] == ["a: new"]


def test_acceptable_answers_are_lists_even_where_a_row_has_one():
    spec = TaskSpec(name="qa", source="{question}", target="text", label_columns="answers", metrics=["squad_f1"])
    rows = [{"question": "a", "answers": "one"}, {"question": "b", "answers": ["two", "2"]}]
    data = TaskData.from_dataset(spec, train=rows)
    assert list(data.splits["train"]["label"]) == [["one"], ["two", "2"]]
    assert list(data.splits["train"]["target"]) == ["one", "two"]
    assert list(TaskData.from_dataset(spec, train=rows[:1]).splits["train"]["label"]) == ["one"]


def test_tasks_whose_validation_is_the_test_split_are_halved(monkeypatch):
    found = datasets.Dataset.from_dict({"text": [f"x {i}" for i in range(10)], "label": [0, 1] * 5})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: {"train": found, "test": found, "unsupervised": found}
    )
    data = load_tasks(None, ["imdb"], selecting=True)["imdb"].splits
    assert {split: len(rows) for split, rows in data.items()} == {"train": 10, "validation": 5, "test": 5}
    assert set(load_tasks(None, ["imdb"])["imdb"].splits) == {"train", "validation"}


def test_long_texts_are_truncated_to_the_entrys_length(tmp_path):
    spec = TaskSpec(name="headline", source="{article}", target="text", max_target_length=6, **FIELDS)
    data = TaskData.from_dataset(spec, train=ARTICLES)
    with pytest.warns(UserWarning, match="headline train: 4 of 4 targets have more than max_target_length=6 tokens"):
        encoded = encode(data, "train", ByT5Tokenizer(), 64)
    assert encoded["labels"][0] == ByT5Tokenizer()("title").input_ids


def test_a_task_file_beside_the_rows_can_say_that_a_text_is_written(tmp_path):
    folder = tmp_path / "news"
    for split in ("train", "validation"):
        lines(folder / f"{split}.jsonl", ARTICLES)
    said = {"source": "summarize: {article}", "target": "text", "label_columns": ["title"], "metrics": ["rouge1"]}
    (folder / "task.json").write_text(json.dumps(said))
    data = load_tasks(str(tmp_path))["news"]
    assert data.splits["train"][1] == {"source": "summarize: story 1", "target": "title 1", "label": "title 1"}
    rated = [{"text": f"x {i}", "verdict": ["bad", "good"][i % 2], "date": "2020"} for i in range(4)]
    for split in ("train", "validation"):
        lines(tmp_path / "rated" / f"{split}.jsonl", rated)
    fields = {"source": "review: {text}", "label_columns": ["verdict"]}
    (tmp_path / "rated" / "task.json").write_text(json.dumps(fields))
    rated_task = load_tasks(str(tmp_path), ["rated"])["rated"]
    assert rated_task.spec.label_names == ("bad", "good")
    assert rated_task.splits["train"][1] == {"source": "review: x 1", "target": "1", "label": 1}


def test_a_task_file_beside_the_rows_can_name_its_files(tmp_path):
    lines(tmp_path / "news" / "all.jsonl", ARTICLES)
    said = {
        "source": "{article}",
        "target": "text",
        **FIELDS,
        "train_file": "all.jsonl",
        "validation_file": "all.jsonl",
    }
    (tmp_path / "news" / "task.json").write_text(json.dumps(said))
    assert len(load_tasks(str(tmp_path))["news"].splits["validation"]) == 4


def test_an_unknown_task_is_answered_with_what_was_meant(tmp_path):
    with pytest.raises(UnknownTask, match="unknown task 'sentimnt'; .*did you mean 'sentiment'"):
        load_tasks(None, ["sentimnt"])
    with pytest.raises(UnknownTask, match="did you mean 'wmt16-en-ro'"):
        load_tasks(None, ["wmt16-en_ro"])
    lines(tmp_path / "cola" / "train.jsonl", [{"sentence": "a", "label": 0}])
    with pytest.raises(UnknownTask, match="'rte'; .* has cola; leave data_dir out to take 'rte' from the Hub"):
        load_tasks(str(tmp_path), ["rte"])


def pairs(names, labels):
    label = datasets.ClassLabel(names=names)
    features = {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"), "label": label}
    found = [{"premise": "a", "hypothesis": "b", "label": each} for each in labels]
    return datasets.Dataset.from_list(found, features=datasets.Features(features))


def test_class_labels_go_by_their_names_in_any_case_and_others_are_warned_of(recwarn):
    names = ["Contradiction", "Neutral", "Entailment"]
    assert TaskData.from_dataset("mnli", train=pairs(names, [0, 1, 2])).splits["train"]["label"][:] == [2, 1, 0]
    spec = TaskSpec(name="cases", columns=["premise"], labels=["0", "1"], label_names=["a", "A"])
    assert TaskData.from_dataset(spec, train=pairs(["A", "a"], [0, 1])).splits["train"]["label"][:] == [1, 0]
    assert not recwarn.list
    with pytest.warns(UserWarning, match="mnli train: the classes of column 'label', no, maybe, yes, are not called"):
        TaskData.from_dataset("mnli", train=pairs(["no", "maybe", "yes"], [0]))


def test_rows_in_memory_that_are_left_out_are_said():
    rows = pairs(["entailment", "neutral", "contradiction"], [0, -1, 2])
    with pytest.warns(UserWarning, match="snli validation: 1 rows without a label are left out"):
        assert len(TaskData.from_dataset("snli", validation=rows).splits["validation"]) == 2
