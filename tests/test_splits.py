"""The authors' rule of splits, against index sets that are worked out here from torch.randperm."""

from __future__ import annotations

import datasets
import pytest
import torch
from support.runs import data_folder

from hyperformer_fast.data import DataError, load_tasks
from hyperformer_fast.data.splits import HALVED, HELD_OUT, cut, holds_out, sample_train


def numbered(rows, start=0):
    return datasets.Dataset.from_dict({"n": list(range(start, start + rows))})


def numbers(dataset):
    return list(dataset["n"])


def randperm(rows, seed):
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()


def test_the_lists_are_the_authors():
    small = "cola, wnli, rte, trec, superglue-cb, sick, mrpc, stsb, imdb, commonsense_qa, superglue-boolq"
    large = "yelp_polarity, qqp, qnli, social_i_qa, cosmos_qa, winogrande, hellaswag, sst2"
    assert set(small.split(", ")) == HALVED and set(large.split(", ")) == HELD_OUT


@pytest.mark.parametrize("rows", [7, 12])
def test_validation_of_the_small_tasks_is_halved(rows):
    train = numbered(20_000)
    for name in HALVED:
        found = cut(name, {"train": train, "validation": numbered(rows, 50_000)}, 42)
        order = [50_000 + index for index in randperm(rows, 42)]
        assert numbers(found["validation"]) == order[: rows // 2] and numbers(found["test"]) == order[rows // 2 :]
        assert found["train"] is train


def test_the_large_tasks_take_1000_rows_of_train_and_never_train_on_them():
    train, order = numbered(5000), randperm(5000, 42)
    for name in HELD_OUT:
        found = cut(name, {"train": train, "validation": numbered(300, 50_000)}, 42)
        assert numbers(found["validation"]) == order[:1000]
        assert numbers(found["train"]) == sorted(order[1000:])
        assert numbers(found["test"]) == list(range(50_000, 50_300))


def test_the_seed_decides_and_tasks_in_neither_list_go_by_size():
    splits = {"train": numbered(2000), "validation": numbered(10)}
    assert numbers(cut("rte", splits, 1)["test"]) == randperm(10, 1)[5:] != randperm(10, 2)[5:]
    assert not holds_out("mine", 9_999) and holds_out("mine", 10_000)
    assert not holds_out("rte", 100_000) and holds_out("qnli", 2000) and not holds_out("qnli", 1999)


def test_few_rows_are_the_first_of_the_permutation():
    train = numbered(5000)
    assert numbers(sample_train(train, 16, 7)) == randperm(5000, 7)[:16]
    assert sample_train(train, 5000, 7) is train and sample_train(train, None, 7) is train
    found = cut("qnli", {"train": train, "validation": numbered(5)}, 42, 16)
    assert numbers(found["train"]) == randperm(5000, 42)[1000:1016]
    found = cut("rte", {"train": train, "validation": numbered(5)}, 42, 16)
    assert numbers(found["train"]) == randperm(5000, 42)[:16]


def test_one_row_cannot_be_halved():
    with pytest.raises(DataError, match="'rte': validation has 1 row, which cannot be cut"):
        cut("rte", {"train": numbered(5), "validation": numbered(1)}, 42)


class Arguments:
    def __init__(self, data_dir, **fields):
        self.data_dir = data_dir
        self.__dict__.update(fields)


def sizes(data):
    return {split: len(found) for split, found in data["cola"].splits.items()}


def test_a_run_that_selects_does_not_report_on_the_rows_that_selected(tmp_path):
    folder = data_folder(tmp_path, ("cola",), n=8)
    assert sizes(load_tasks(folder)) == {"train": 8, "validation": 6}
    assert sizes(load_tasks(folder, selecting=True)) == {"train": 8, "validation": 3, "test": 3}
    assert sizes(load_tasks(Arguments(folder, split_validation_test=True))) == {"train": 8, "validation": 3, "test": 3}
    never = Arguments(folder, split_validation_test=False)
    with pytest.warns(UserWarning, match="cola: a checkpoint is selected, and results are reported, on the same rows"):
        assert sizes(load_tasks(never, selecting=True)) == {"train": 8, "validation": 6}
    (tmp_path / "cola" / "test.jsonl").write_bytes((tmp_path / "cola" / "validation.jsonl").read_bytes())
    assert sizes(load_tasks(folder, selecting=True)) == {"train": 8, "validation": 6, "test": 6}


def test_the_limit_on_train_is_applied_when_tasks_are_loaded(tmp_path):
    folder = data_folder(tmp_path, ("cola",), n=8)
    found = load_tasks(Arguments(folder, max_train_samples=3, data_seed=5))["cola"].splits["train"]
    assert list(found["source"]) == [f"sentence: s{index:03d}" for index in randperm(8, 5)[:3]]


def test_it_is_said_that_rows_of_train_become_validation(tmp_path):
    found = data_folder(tmp_path, ("sst2",), n=2100)
    with pytest.warns(UserWarning, match="sst2: 1,000 rows of train are validation, and are not trained on"):
        data = load_tasks(found, selecting=True)["sst2"].splits
    assert {split: len(rows) for split, rows in data.items()} == {"train": 1100, "validation": 1000, "test": 6}
    assert not set(data["train"]["source"]) & set(data["validation"]["source"])
