"""Every format that rows are read from, and what is said of rows that cannot be used."""

from __future__ import annotations

import csv
import hashlib
import json

import datasets
import pytest
from support.runs import rows

from hyperformer_fast.data import DataError, TaskData, TaskSpec, UnknownTask, load_tasks, read_rows
from hyperformer_fast.data.cache import content_print
from hyperformer_fast.data.infer import infer_spec

PAIRS = [{"a": f"first {i}", "b": f"second, {i}", "label": i % 3, "source_id": f"r{i}"} for i in range(6)]
COLUMNS = {"columns": ["a", "b"], "labels": ["0", "1", "2"]}


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif suffix == ".json":
        path.write_text(json.dumps(found, indent=1))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(found).to_parquet(path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, found[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(found)


def task_folder(root, suffix, found, splits=("train", "validation"), fields=None):
    for split in splits:
        write(root / "mine" / f"{split}{suffix}", found)
    if fields:
        (root / "mine" / "task.json").write_text(json.dumps(fields))
    return str(root)


def examples_of(data):
    return [(row["source"], row["target"], row["label"]) for row in data.splits["train"]]


EXPECTED = [(f"a: first {i} b: second, {i}", str(i % 3), i % 3) for i in range(6)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_examples_and_ignores_other_columns(tmp_path, suffix):
    data = load_tasks(task_folder(tmp_path, suffix, PAIRS, fields=COLUMNS))["mine"]
    assert examples_of(data) == EXPECTED
    assert data.splits["train"].cache_files, "the examples must be memory-mapped, not held in memory"
    plain = [{name: row[name] for name in ("a", "b", "label")} for row in PAIRS]
    inferred = load_tasks(task_folder(tmp_path / "plain", suffix, plain))["mine"]
    assert examples_of(inferred) == EXPECTED and inferred.fingerprint()["train"] == data.fingerprint()["train"]
    assert [row["a"] for _, row in read_rows(tmp_path / "mine" / f"train{suffix}")] == [row["a"] for row in PAIRS]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    found = datasets.Dataset.from_list(PAIRS)
    found.save_to_disk(tmp_path / "one" / "mine" / "train")
    found.save_to_disk(tmp_path / "one" / "mine" / "validation")
    datasets.DatasetDict(train=found, validation=found).save_to_disk(tmp_path / "dict" / "mine")
    for root in ("one", "dict"):
        (tmp_path / root / "mine" / "task.json").write_text(json.dumps(COLUMNS))
        data = load_tasks(str(tmp_path / root))["mine"]
        assert examples_of(data) == EXPECTED and data.report_split == "validation"


def test_datasets_in_memory_are_read():
    found = datasets.Dataset.from_list(rows("cola", 4))
    data = TaskData.from_dataset("cola", train=found.with_format("torch"), validation=rows("cola", 2))
    assert data.splits["train"][1] == {"source": "sentence: s001", "target": "1", "label": 1}
    assert data.spec.metrics == ("matthews",) and len(data.splits["validation"]) == 2
    own = TaskData.from_dataset("mine", train=[{"text": "x", "label": "no"}, {"text": "y", "label": "yes"}])
    assert own.spec.label_names == ("no", "yes") and own.splits["train"][1]["target"] == "1"
    with pytest.raises(DataError, match="cola train: expected a datasets.Dataset, got IterableDataset; .*streaming"):
        TaskData.from_dataset("cola", train=found.to_iterable_dataset())


def with_classes(found, names, column="label"):
    return datasets.Dataset.from_list(found).cast_column(column, datasets.ClassLabel(names=names))


def test_the_names_of_a_class_label_are_the_labels():
    found = [{"text": "x", "kind": 1}, {"text": "y", "kind": 0}]
    data = TaskData.from_dataset("mine", train=with_classes(found, ["zebra", "ant"], "kind"))
    assert data.spec.label_names == ("zebra", "ant") and list(data.splits["train"]["label"]) == [1, 0]
    # The order of a ClassLabel's names may differ from that of the entry: the names decide, not the integers.
    pairs = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1)]
    ours = TaskData.from_dataset("scitail", train=with_classes(pairs, ["entailment", "neutral"]))
    other = TaskData.from_dataset("scitail", train=with_classes(pairs, ["neutral", "entailment"]))
    assert list(ours.splits["train"]["label"]) == [0, 1] and list(other.splits["train"]["label"]) == [1, 0]


def test_rows_without_a_label_are_left_out_and_a_split_of_them_is_no_test_split(tmp_path):
    names = ["unacceptable", "acceptable"]
    some = [{"sentence": "a", "label": 0}, {"sentence": "b", "label": -1}, {"sentence": "c", "label": 1}]
    none = [{"sentence": "d", "label": -1}]
    splits = {"train": with_classes(some, names), "validation": with_classes(some, names)}
    datasets.DatasetDict(**splits, test=with_classes(none, names)).save_to_disk(tmp_path / "cola")
    with pytest.warns(UserWarning) as told:
        data = load_tasks(str(tmp_path))["cola"]
    assert [row["source"] for row in data.splits["train"]] == ["sentence: a", "sentence: c"]
    assert data.report_split == "validation" and set(data.splits) == {"train", "validation"}
    said = [str(warning.message) for warning in told]
    assert any("1 rows without a label are left out" in message for message in said)
    assert any("has no labels, and is not used as a test split" in message for message in said)
    splits["train"] = with_classes(none, names)
    datasets.DatasetDict(**splits).save_to_disk(tmp_path / "other" / "cola")
    with pytest.raises(DataError, match="train holds no rows with a label"):
        load_tasks(str(tmp_path / "other"))


def test_csv_keeps_texts_that_look_like_something_else(tmp_path):
    """pandas and datasets would read NA as missing, 007 as 7, and a column of dates as timestamps."""
    texts = ["NA", "007", "2020-01-02", "null", "a\nb", 'say "x"', "  1.50", ""]
    found = [{"a": text, "b": "x", "label": i % 3} for i, text in enumerate(texts)]
    for suffix in (".csv", ".tsv", ".jsonl"):
        data = load_tasks(task_folder(tmp_path / suffix[1:], suffix, found, fields=COLUMNS))["mine"]
        assert [row["source"] for row in data.splits["train"]] == [f"a: {text} b: x" for text in texts]


def test_a_long_document_in_a_csv_file_is_read(tmp_path):
    write(tmp_path / "long.csv", [{"a": "x" * 200_000}])
    assert len(read_rows(tmp_path / "long.csv")[0][1]["a"]) == 200_000


BAD_FILES = {
    "not utf-8": (".csv", b"a,b,label\nx,y,0\nx,\xff,1\n", r"train.csv:3: not UTF-8: .*save the file as UTF-8"),
    "too few values": (".csv", b"a,b,label\nx,y,0\nx,1\n", r"train.csv:3: a row must have 3 values.*got 2"),
    "too many values": (".tsv", b"a\tb\tlabel\nx\ty\t0\t1\n", r"train.tsv:2: a row must have 3 values.*got 4"),
    "rows that a quotation mark joins": (
        ".tsv",
        b'a\tb\tlabel\nx\t"he said\t0\nz\tand went"\t1\n',
        r"train.tsv:2: .*may be several rows",
    ),
    "after a row of two lines": (".csv", b'a,b,label\n"x\nx",y,0\nx,y,7\n', r"train.csv:4: 'label' is out of range"),
    "an open quote": (".csv", b'a,b,label\nx,y,0\n"x,y,1\n', r"train.csv:3: not a row of CSV: unexpected end"),
    "a column twice": (".csv", b"a,a,label\nx,y,0\n", r"train.csv:1: the column 'a' stands twice"),
    "no such column": (".csv", b"a,c,label\nx,y,0\n", r"train.csv:2: no column 'b'; there are 'a', 'c', 'label'"),
    "a label outside the map": (".csv", b"a,b,label\nx,y,3\n", r"train.csv:2: 'label' is out of range.*got 3"),
    "an empty label": (".csv", b"a,b,label\nx,y,\n", r"train.csv:2: 'label' is out of range.*got ''"),
    "no rows": (".csv", b"a,b,label\n", r"train.csv holds no rows"),
    "an empty file": (".csv", b"", r"train.csv holds no rows"),
    "not JSON": (".json", b"[{]", r"train.json: not JSON"),
    "not a list": (".json", b'{\n"a": "x"}', r"train.json: expected a list of objects, or an object per line"),
    "a list of texts": (".json", b'["x"]', r"train.json: row 1: a row must be a JSON object, got str"),
    "a name twice": (".json", b'[{"a": "x", "a": "y"}]', r"train.json: not JSON: the name 'a' stands twice"),
    "an empty list": (".json", b"[]", r"train.json holds no rows"),
    "not parquet": (".parquet", b"PAR1 and no more", r"train.parquet cannot be read: "),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_named_with_their_row(tmp_path, what):
    suffix, content, message = BAD_FILES[what]
    root = task_folder(tmp_path, suffix, PAIRS, fields=COLUMNS)
    (tmp_path / "mine" / f"train{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tasks(root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_rows_of_datasets_are_named_by_their_number(tmp_path):
    bad = [*PAIRS[:2], {**PAIRS[2], "label": 9}]
    root = task_folder(tmp_path, ".parquet", bad, fields=COLUMNS)
    with pytest.raises(DataError, match=r"mine/train.parquet:3: 'label' is out of range.*got 9"):
        load_tasks(root)
    null = [*PAIRS[:1], {**PAIRS[1], "a": None}]
    with pytest.raises(DataError, match=r"mine/train.parquet:2: column 'a' must be text, got None"):
        load_tasks(task_folder(tmp_path / "null", ".parquet", null, fields=COLUMNS))


def test_two_files_of_one_split_and_unknown_formats_are_refused(tmp_path):
    root = task_folder(tmp_path, ".csv", PAIRS, fields=COLUMNS)
    write(tmp_path / "mine" / "train.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"mine has train.jsonl and train.csv: remove all but one"):
        load_tasks(root)
    with pytest.raises(DataError, match=r"x.xlsx: the format must be one of .jsonl, .*got '.xlsx'"):
        read_rows(tmp_path / "x.xlsx")


def test_json_lines_may_be_named_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    assert read_rows(path)[1] == (f"{path}:2", PAIRS[1])
    path.write_text(json.dumps({"version": 1, "data": PAIRS}))
    assert read_rows(path)[1] == (f"{path}: row 2", PAIRS[1])


def test_the_hub_is_asked_for_what_the_entry_says(monkeypatch, tmp_path):
    asked = []

    def load_dataset(repository, configuration, cache_dir=None):
        asked.append((repository, configuration))
        found = datasets.Dataset.from_list(rows(configuration, 4))
        splits = ("train", "validation_matched", "validation_mismatched", "test_matched")
        return dict.fromkeys(splits if configuration == "mnli" else ("train", "validation", "test"), found)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_tasks("hub:glue", ["mnli", "stsb"])
    assert asked == [("nyu-mll/glue", "mnli"), ("nyu-mll/glue", "stsb")]
    assert data["mnli"].report_split == "test" and data["stsb"].report_split == "validation"
    with pytest.raises(UnknownTask, match="unknown task 'trec'; hub:glue has cola"):
        load_tasks("hub:glue", ["trec"])

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="nyu-mll/glue rte could not be fetched from the Hub: no route"):
        load_tasks("hub:glue", ["rte"])


def test_fingerprints_of_earlier_versions_are_understood(tmp_path):
    data = load_tasks(task_folder(tmp_path, ".jsonl", PAIRS, fields=COLUMNS))["mine"]
    print_ = data.fingerprint()["train"]
    assert data.unchanged("train", print_) and not data.unchanged("train", {**print_, "content": "other"})
    old = hashlib.sha256(repr([("mine", *row) for row in EXPECTED]).encode()).hexdigest()
    assert data.unchanged("train", {"rows": 6, "sha256": old})
    assert not data.unchanged("train", {"rows": 6, "sha256": "other"}) and not data.unchanged("train", None)
    assert data.unchanged("test", None) and not data.unchanged("test", print_)


def test_a_fingerprint_follows_the_rows_and_not_how_they_lie():
    rows = [{"question": f"a {i}", "answers": [str(i), "x"]} for i in range(30)]
    whole = datasets.Dataset.from_list(rows)
    prints = {
        content_print(found)
        for found in (
            whole,
            datasets.concatenate_datasets([whole.select(range(7)), whole.select(range(7, 30))]),
            datasets.concatenate_datasets([whole, whole]).select(range(30, 60)),
            datasets.concatenate_datasets([whole, whole]).select([*range(15), *range(45, 60)]),
        )
    }
    assert len(prints) == 1
    for other in (rows[::-1], rows[:29], [{**row, "answers": [*row["answers"][::-1]]} for row in rows]):
        assert content_print(datasets.Dataset.from_list(other)) not in prints
    split_elsewhere = [{"question": "a 0a", "answers": ["0", "x"]}, {"question": " 1", "answers": ["1", "x"]}]
    assert content_print(datasets.Dataset.from_list(split_elsewhere)) != content_print(whole.select(range(2)))


def test_unknown_tasks_stay_strict_about_their_columns(tmp_path):
    extra = [{"text": f"words {i}", "label": i % 2, "year": 1990 + i} for i in range(4)]
    with pytest.raises(DataError, match=r"its columns \['text', 'label', 'year'\] can't be told apart"):
        infer_spec("mine", extra, "here")
    for suffix in (".csv", ".jsonl"):
        with pytest.raises(DataError, match="can't be told apart"):
            load_tasks(task_folder(tmp_path / suffix[1:], suffix, extra))
    known = [{**row, "year": 1990} for row in rows("cola", 4)]
    data = TaskData.from_dataset("cola", train=known)
    assert data.splits["train"].column_names == ["source", "target", "label"]
    assert isinstance(data.spec, TaskSpec)
