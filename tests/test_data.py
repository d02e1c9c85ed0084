"""Tasks as text, files with faults, and how batches are drawn and made."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from support.runs import data_folder, rows

from hyperformer_fast.data import (
    DataError,
    TaskBatchSampler,
    TaskSpec,
    UnknownTask,
    load_tasks,
    read_rows,
    task_probabilities,
)
from hyperformer_fast.data.infer import infer_spec
from hyperformer_fast.data.registry import KNOWN


def test_rows_become_text_as_in_the_authors_code():
    mnli = KNOWN["mnli"]
    assert mnli.source_text({"premise": "A b.", "hypothesis": "C."}, "") == "premise: A b. hypothesis: C."
    assert [mnli.target_text(label) for label in (0, 1, 2)] == mnli.targets() == ["0", "1", "2"]
    assert KNOWN["qnli"].source_text({"sentence": "S", "question": "Q?"}, "") == "question: Q? sentence: S"
    trec = KNOWN["trec"]
    assert trec.source_text({"text": "Who ?", "label-coarse": 3}, "") == "sentence: Who ?"
    assert trec.label({"text": "Who ?", "label": 5, "label-coarse": 3}, "") == 3
    assert mnli.parse("2 ") == 2 and mnli.parse("3") is None and mnli.parse("") is None and mnli.parse("1.0") is None


def test_scitail_is_read_under_either_of_its_names():
    scitail = KNOWN["scitail"]
    for row in (
        {"sentence1": "a", "sentence2": "b", "label": 1},
        {"premise": "a", "hypothesis": "b", "gold_label": "neutral"},
    ):
        assert scitail.source_text(row, "") == "sentence1: a sentence2: b" and scitail.label(row, "") == 1


def test_similarity_is_text_in_steps_of_a_fifth():
    stsb = KNOWN["stsb"]
    assert [stsb.target_text(value) for value in (0, 2.75, 3.79, 5.0, 0.1)] == ["0.0", "2.8", "3.8", "5.0", "0.0"]
    assert len(stsb.targets()) == 26 and {stsb.target_text(i / 100) for i in range(501)} == set(stsb.targets())
    assert all(abs(stsb.parse(stsb.target_text(i / 100)) - i / 100) <= 0.1 + 1e-9 for i in range(501))
    assert stsb.parse("3.8") == 3.8 and stsb.parse("-.5") == -0.5
    assert [stsb.parse(text) for text in ("three", "nan", "inf", "1e9", "", "3.", "٣")] == [None] * 5 + [3.0, None]


BAD_LINES = {
    "not json": ("cola", "{", "not a line of JSON"),
    "not utf-8": ("cola", b"\xff\xfe", "not a line of JSON"),
    "not an object": ("cola", "[1]", "must be a JSON object, got list"),
    "missing column": ("cola", '{"label": 0}', "no column 'sentence'; there are 'label'"),
    "missing label": ("cola", '{"sentence": "a"}', "no column 'label'; there are 'sentence'"),
    "text is a number": ("cola", '{"sentence": 3, "label": 0}', "'sentence' must be text, got 3"),
    "label too high": ("cola", '{"sentence": "a", "label": 2}', "out of range.* from 0 to 1 .*got 2"),
    "label negative": ("cola", '{"sentence": "a", "label": -1}', "out of range.* from 0 to 1 .*got -1"),
    "label a fraction": ("cola", '{"sentence": "a", "label": 0.5}', "an integer from 0 to 1 .*got 0.5"),
    "label a bool": ("cola", '{"sentence": "a", "label": true}', "an integer from 0 to 1 .*got True"),
    "label text": ("cola", '{"sentence": "a", "label": "yes"}', "or one of unacceptable, acceptable.*got 'yes'"),
    "similarity too high": ("stsb", '{"sentence1": "a", "sentence2": "b", "label": 5.1}', "from 0 to 5, got 5.1"),
    "similarity nan": ("stsb", '{"sentence1": "a", "sentence2": "b", "label": NaN}', "from 0 to 5, got nan"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_lines_are_named_with_file_and_line(tmp_path, what):
    task, line, message = BAD_LINES[what]
    folder = data_folder(tmp_path, (task,))
    good = json.dumps(rows(task, 1)[0]).encode()
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / task / "train.jsonl").write_bytes(good + b"\n\n" + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"{task}/train.jsonl:3: .*{message}"):
        load_tasks(folder)


def test_bad_files_and_folders_are_named(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="empty.jsonl holds no rows"):
        read_rows(empty)
    with pytest.raises(DataError, match="nowhere' is not a directory"):
        load_tasks(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no <task>/train.jsonl"):
        load_tasks(str(tmp_path))
    with pytest.raises(DataError, match="only name of this form is 'hub:glue'; .* name it as 'dataset'"):
        load_tasks("hub:squad")
    folder = data_folder(tmp_path / "data")
    with pytest.raises(UnknownTask, match="unknown task 'rte'; .*data has cola, stsb"):
        load_tasks(folder, ["cola", "rte"])
    with pytest.raises(UnknownTask, match="unknown task 'colour'; the built-in data has"):
        load_tasks(None, ["colour"])
    (tmp_path / "data" / "cola" / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match="validation.jsonl holds no rows"):
        load_tasks(folder)
    (tmp_path / "data" / "cola" / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="validation.jsonl is absent"):
        load_tasks(folder)


def test_folders_are_read_and_test_is_optional(tmp_path):
    folder = data_folder(tmp_path)
    data = load_tasks(folder)
    assert list(data) == ["cola", "stsb"] and data["cola"].report_split == "validation"
    assert data["cola"].splits["train"][1] == {"source": "sentence: s001", "target": "1", "label": 1}
    (tmp_path / "cola" / "test.jsonl").write_text(json.dumps(rows("cola", 1)[0]) + "\n")
    again = load_tasks(folder, ["cola"])["cola"]
    assert again.report_split == "test" and again.fingerprint()["train"] == data["cola"].fingerprint()["train"]
    train = tmp_path / "cola" / "train.jsonl"
    train.write_text(train.read_text().replace("s001", "s01!"))
    assert load_tasks(folder)["cola"].fingerprint()["train"] != again.fingerprint()["train"]


def test_a_task_of_ones_own_is_told_from_its_columns(tmp_path):
    spec = infer_spec("mine", [{"claim": "a", "source": "b", "label": i} for i in (0, 2, 1, 2)], "")
    assert list(spec.columns) == ["claim", "source"] and spec.labels == ("0", "1", "2")
    named = infer_spec("mine", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}], "")
    assert named.label({"text": "a", "label": "yes"}, "") == 1 and named.label_names == ("no", "yes")
    number = infer_spec("mine", [{"text": "a", "score": 0.5}, {"text": "b", "score": 4}], "")
    assert number.labels is None and number.label({"score": 4}, "") == 4.0
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for bad in (
        [{"label": 1}],
        [{"text": "a"}],
        [{"text": "a", "label": 0, "id": 3}],
        [{"a": "a", "b": "b", "c": "c", "label": 0}],
        [{"text": "a", "label": 0}, {"text": "b", "label": 2}],
        [{"text": "a", "label": 0.5}, {"text": "b", "label": 9.0}],
        [{"text": "a", "label": None}, {"text": "b", "label": 1}],
    ):
        with pytest.raises(DataError, match="here: .*mine"):
            infer_spec("mine", bad, "here")


def test_specs_that_cannot_be_are_refused():
    columns = {"text": ("text",)}
    for fields, message in (
        ({"labels": None, "metrics": ["accuracy"]}, "'accuracy' does not fit"),
        ({"labels": ["0", "1"], "metrics": ["bleu"]}, "accuracy, f1.*got 'bleu'"),
        ({"labels": ["0", "1", "2"], "metrics": ["f1"]}, "f1 needs two classes"),
        ({"labels": ["0", "0"]}, "two different texts"),
        ({"labels": ["0", "1"], "label_names": ["a"]}, "label_names must have one name per label"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskSpec(name="mine", columns=columns, **fields)


def test_temperature():
    sizes = [100, 10_000]
    np.testing.assert_allclose(task_probabilities(sizes, 1), [1 / 101, 100 / 101])
    np.testing.assert_allclose(task_probabilities(sizes, 1e9), [0.5, 0.5], atol=1e-6)
    ten = task_probabilities(sizes, 10)
    np.testing.assert_allclose(ten[1] / ten[0], 100**0.1)
    batches = list(TaskBatchSampler([5, 500], 2, 2000, temperature=1, seed=0))
    assert 0.003 < sum(batch[0] < 5 for batch in batches) / len(batches) < 0.02
    batches = list(TaskBatchSampler([5, 500], 2, 2000, temperature=10, seed=0))
    assert abs(sum(batch[0] < 5 for batch in batches) / len(batches) - task_probabilities([5, 500], 10)[0]) < 0.04


def test_batches_hold_one_task_and_every_example_comes_round():
    sampler = TaskBatchSampler([10, 7], 4, 200, seed=1)
    batches = list(sampler)
    assert batches == list(sampler) and len(batches) == len(sampler) == 200
    assert batches != list(TaskBatchSampler([10, 7], 4, 200, seed=2))
    assert batches == list(TaskBatchSampler([10, 7], 4, 900, seed=1))[:200]
    assert all(len(batch) == 4 and len({index < 10 for index in batch}) == 1 for batch in batches)
    counts = collections.Counter(index for batch in batches for index in batch)
    for task in (range(10), range(10, 17)):
        seen = [counts[index] for index in task]
        assert max(seen) - min(seen) <= 1


@pytest.mark.parametrize(("accumulation", "world"), [(4, 1), (1, 4), (2, 2)])
def test_shares_of_a_step_make_up_the_whole(accumulation, world):
    whole = list(TaskBatchSampler([30, 50], 8, 20, seed=5))
    ranks = [
        list(TaskBatchSampler([30, 50], 2, 20, seed=5, accumulation=accumulation, rank=rank, world_size=world))
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        assert [index for part in parts for index in part] == batch


@pytest.mark.parametrize(("accumulation", "world"), [(4, 1), (1, 4), (2, 2)])
def test_shares_of_a_mixed_step_make_up_the_whole(accumulation, world):
    """Each example of a step draws its own task, and the steps do not depend on how they are shared out."""
    sizes = [30, 50, 7]
    whole = list(TaskBatchSampler(sizes, 8, 20, seed=5, mixed=True))
    ranks = [
        list(TaskBatchSampler(sizes, 2, 20, seed=5, accumulation=accumulation, rank=rank, world_size=world, mixed=True))
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        assert [index for part in parts for index in part] == batch


def test_mixed_batches_draw_each_example_by_temperature():
    sizes, p = [5, 500], task_probabilities([5, 500], 10)
    batches = list(TaskBatchSampler(sizes, 8, 500, temperature=10, seed=0, mixed=True))
    assert batches == list(TaskBatchSampler(sizes, 8, 900, temperature=10, seed=0, mixed=True))[:500]
    share = np.mean([index < 5 for batch in batches for index in batch])
    assert abs(share - p[0]) < 0.02
    assert sum(len({index < 5 for index in batch}) == 2 for batch in batches) > 450
    counts = collections.Counter(index for batch in batches for index in batch)
    for task in (range(5), range(5, 505)):
        seen = [counts[index] for index in task]
        assert max(seen) - min(seen) <= 1


def test_samplers_that_cannot_be_are_refused():
    for arguments, message in (
        ({"sizes": [3, 0]}, r"\[3, 0\]"),
        ({"sizes": [3], "temperature": 0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskBatchSampler(batch_size=2, steps=1, **arguments)


def test_real_data_reads(shared):
    data = load_tasks(str(shared("data")))
    assert len(data["stsb"].splits["train"]) == 5700 and set(data) <= set(KNOWN)
    for task in data.values():
        first = task.splits["validation"][0]
        assert (
            first["source"].startswith(next(iter(task.spec.columns)) + ": ") and first["target"] in task.spec.targets()
        )
