"""Rows that are JSON and yet cannot be used: each is a DataError with its file and line, never a traceback."""

from __future__ import annotations

import json

import pytest
from support.runs import data_folder, rows, saved_t5

from hyperformer_fast.cli import main
from hyperformer_fast.data import DataError, load_tasks, read_rows
from hyperformer_fast.data.infer import infer_spec
from hyperformer_fast.json_files import MAX_DEPTH

GOOD = '{"sentence": "s000", "label": 0}'
HOSTILE = {
    "half of a surrogate pair": (r'{"sentence": "a\ud800b", "label": 0}', r"'sentence' is not text: '\\ud800' at pos"),
    "half in a label": (r'{"sentence": "a", "label": "\udfff"}', r"'label' is out of range.*got '\\udfff'"),
    "deep lists": ('{"sentence": "a", "label": 0, "x": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested more than 100"),
    "deep objects": ('{"sentence": "a", "label": 0, "x": ' + '{"x":' * 200 + "1" + "}" * 201, "nested more than 100"),
    "unclosed lists": ("[" * 50_000, "nested more than 100|not a line of JSON"),
    "NUL byte": ('{"sentence": "a\0b", "label": 0}', "not a line of JSON"),
    "NUL bytes alone": ("\0" * 40, "not a line of JSON"),
    "number of 5,000 digits": ('{"sentence": "a", "label": ' + "9" * 5000 + "}", "not a line of JSON: .*4300 digits"),
    "number of 400 digits": ('{"sentence": "a", "label": ' + "9" * 400 + "}", r"out of range.*got 9{80}\.\.\. \(400"),
    "NaN": ('{"sentence": "a", "label": NaN}', "out of range.*got nan"),
    "Infinity": ('{"sentence": "a", "label": -Infinity}', "out of range.*got -inf"),
    "number that overflows": ('{"sentence": "a", "label": 1e999}', "out of range.*got inf"),
    "column twice": ('{"sentence": "a", "label": 0, "label": 1}', "the name 'label' stands twice"),
    "long wrong value": ('{"sentence": [' + "1," * 5000 + '1], "label": 0}', r"must be text, got .*characters\)"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_rows_are_named_with_file_and_line(tmp_path, what):
    line, message = HOSTILE[what]
    folder = data_folder(tmp_path, ("cola",))
    (tmp_path / "cola" / "train.jsonl").write_bytes(f"{GOOD}\n{line}\n{GOOD}\n".encode())
    with pytest.raises(DataError, match=rf"cola/train.jsonl:2: .*({message})") as caught:
        load_tasks(folder)
    assert len(str(caught.value)) < 500


def test_what_is_odd_but_means_one_thing_is_read(tmp_path):
    folder = data_folder(tmp_path, ("cola",))
    path = tmp_path / "cola" / "train.jsonl"
    nested = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    odd = [r'{"sentence": "a\u0000b", "label": 1}', r'{"sentence": "\ud83d\ude00", "label": 1.0}']
    odd += [r'{"sentence": "a", "label": 0, "unread": ["\ud800", NaN, ' + nested + "]}"]
    path.write_text("\ufeff" + "\r\n".join(odd), encoding="utf-8")
    sources = [(example["source"], example["label"]) for example in load_tasks(folder)["cola"].splits["train"]]
    assert sources == [("sentence: a\0b", 1), ("sentence: \U0001f600", 1), ("sentence: a", 0)]
    assert type(sources[1][1]) is int
    assert read_rows(path)[2][1]["unread"][0] == "\ud800"


def test_names_of_columns_and_labels_must_be_text_too():
    for found in ([{"t\ud800": "a", "label": 0}, {"t\ud800": "b", "label": 1}],
                  [{"text": "a", "label": "x\ud800"}, {"text": "b", "label": "y"}]):  # fmt: skip
        with pytest.raises(DataError, match=r"here: .*\\ud800.* is not text"):
            infer_spec("mine", found, "here")


def test_the_command_says_so_before_it_trains(tmp_path, capsys):
    folder = data_folder(tmp_path / "data", ("cola",))
    for split, line in (("train", HOSTILE["half of a surrogate pair"][0]), ("validation", HOSTILE["deep lists"][0])):
        path = tmp_path / "data" / "cola" / f"{split}.jsonl"
        whole = path.read_text()
        path.write_text(whole + line + "\n")
        train = ["train", "--model", saved_t5(tmp_path / "t5"), "--data-dir", folder]
        assert main([*train, "--output-dir", str(tmp_path / "run")]) == 1
        err = capsys.readouterr().err
        assert f"cola/{split}.jsonl:{len(whole.splitlines()) + 1}: " in err and "unexpected" not in err
        assert not (tmp_path / "run").exists()
        path.write_text(whole)
    assert json.loads(whole.splitlines()[0]) == rows("cola", 1)[0]


def test_a_runs_configuration_that_is_nested_too_deeply_is_named(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text('{"tasks": ' + "[" * 50_000 + "]" * 50_000 + "}")
    assert main(["train", str(path), "--output-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "run.json: not JSON: lists or objects are nested more than 100 deep" in err and "unexpected" not in err
