from __future__ import annotations

import hashlib
import json

import pytest

from hyperformer_fast.data.builtin import BUILTIN_TASKS, SIZES, load_builtin, unlabelled_text
from hyperformer_fast.data.registry import builtin_spec

SPECS = {task: builtin_spec(task) for task in BUILTIN_TASKS}
TEXT = {task: list(spec.columns) for task, spec in SPECS.items()}


@pytest.mark.parametrize("task", BUILTIN_TASKS)
def test_rows_are_sound_and_splits_disjoint(task):
    seen, firsts = set(), {}
    for split, size in SIZES.items():
        rows = load_builtin(task, split)
        assert len(rows) == size and rows == load_builtin(task, split)
        for row in rows:
            assert SPECS[task].source_text(row, "") and SPECS[task].target_text(SPECS[task].label(row, ""))
            text = tuple(row[column] for column in TEXT[task])
            assert text not in seen and sum(map(len, text)) < 90
            seen.add(text)
            assert firsts.setdefault(text[0], split) == split
    assert load_builtin(task, "train", seed=1) != load_builtin(task, "train")


def test_formats_and_balance():
    kinds = {(len(spec.columns), spec.labels is None) for spec in SPECS.values()}
    assert kinds == {(1, False), (2, False), (2, True)}
    for task in BUILTIN_TASKS:
        labels = [row["label"] for row in load_builtin(task, "train")]
        most = max(labels.count(label) for label in set(labels)) / len(labels)
        assert 0.15 < most < 0.7


def test_rows_never_change():
    """Results in the README rest on these very rows."""
    digest = hashlib.sha256(json.dumps([load_builtin(task, "test") for task in BUILTIN_TASKS]).encode()).hexdigest()
    assert digest[:16] == GOLDEN


GOLDEN = "823beb3ceeb5f73e"


def test_labels_follow_from_the_text():
    good = set("great lovely superb delightful brilliant charming excellent wonderful pleasant splendid".split())
    for row in load_builtin("sentiment", "test"):
        words = row["sentence"].split()
        assert row["label"] == int((words[-1] in good) != ("not" in words))
    for row in load_builtin("entailment", "test"):
        extra = [word for word in row["sentence2"].split() if word not in row["sentence1"].split()]
        assert bool(extra) == bool(row["label"])


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown built-in task 'x'.*sentiment"):
        load_builtin("x", "train")
    with pytest.raises(ValueError, match="train, validation, test, got 'dev'"):
        load_builtin("topic", "dev")


def test_unlabelled_text_is_of_train_only():
    text = list(unlabelled_text())
    train, held = set(), set()
    for task in BUILTIN_TASKS:
        for split in SIZES:
            for row in load_builtin(task, split):
                (train if split == "train" else held).update(row[column] for column in TEXT[task])
    assert set(text) == train - held and 13_000 < len(text) <= 7 * SIZES["train"]
