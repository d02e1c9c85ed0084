from __future__ import annotations

import hashlib
import json
import random

import pytest

from hyperformer_fast.data import load_tasks
from hyperformer_fast.data.builtin import (
    BUILTIN_SPECS,
    BUILTIN_TASKS,
    SIZES,
    TRANSFER_TASKS,
    load_builtin,
    sentences_of,
    unlabelled_text,
)
from hyperformer_fast.data.builtin_prose import PROSE_KINDS, Prose
from hyperformer_fast.data.builtin_words import BAD, COLOURS, GOOD, PEOPLE, PLACES
from hyperformer_fast.data.registry import builtin_spec
from hyperformer_fast.data.sources import available_tasks

SPECS = {task: builtin_spec(task) for task in BUILTIN_SPECS}
TEXT = {task: list(spec.columns) for task, spec in SPECS.items()}


@pytest.mark.parametrize("task", BUILTIN_SPECS)
def test_rows_are_sound_and_splits_disjoint(task):
    seen, firsts = set(), {}
    for split, size in SIZES.items():
        rows = load_builtin(task, split)
        assert len(rows) == size and rows == load_builtin(task, split)
        for row in rows:
            assert SPECS[task].source_text(row, "") and SPECS[task].target_text(SPECS[task].label(row, ""))
            text = tuple(row[column] for column in TEXT[task])
            assert text not in seen and sum(map(len, text)) < 100
            seen.add(text)
            assert firsts.setdefault(text[0], split) == split
    assert load_builtin(task, "train", seed=1) != load_builtin(task, "train")


def test_formats_and_balance():
    kinds = {(len(spec.columns), spec.target) for spec in SPECS.values()}
    assert kinds == {(1, "class"), (2, "class"), (2, "number"), (2, "text")}
    for task, spec in SPECS.items():
        for split in SIZES:
            labels = [row["label"] for row in load_builtin(task, split)]
            most = max(labels.count(label) for label in set(labels)) / len(labels)
            assert (0.3 <= most <= 0.65) if spec.target == "class" else most < 0.2


def test_rows_never_change():
    """Results in the README rest on these very rows."""
    digest = hashlib.sha256(json.dumps([load_builtin(task, "test") for task in BUILTIN_SPECS]).encode()).hexdigest()
    assert digest[:16] == GOLDEN


GOLDEN = "9621584b64c4fb1d"


def test_labels_follow_from_the_text():
    for row in load_builtin("sentiment", "test"):
        words = row["sentence"].split()
        assert words[-1] in GOOD + BAD
        assert row["label"] == int((words[-1] in GOOD) != ("not" in words or "neither" in words))
    for row in load_builtin("entailment", "test"):
        extra = [word for word in row["sentence2"].split() if word not in row["sentence1"].split()]
        assert bool(extra) == bool(row["label"])
    for row in load_builtin("paraphrase", "test"):
        assert row["sentence1"] != row["sentence2"]
        told = set(row["sentence2"].split()) - {"was", "by"}
        assert row["label"] == int(told == set(row["sentence1"].split()))


def test_answers_are_in_the_context_and_fit_the_question():
    for row in load_builtin("question", "test"):
        assert f" {row['label']} " in f" {row['context']} "
        first, second, *_ = row["question"].split()
        kind = {"who": PEOPLE, "where": PLACES}.get(first, COLOURS if second == "colour" else None)
        assert row["label"] in kind if kind else row["label"].startswith("a ")


def test_the_transfer_task_is_loaded_by_its_name_alone():
    assert len(BUILTIN_TASKS) == 7 and TRANSFER_TASKS == ("paraphrase",)
    assert available_tasks() == list(BUILTIN_TASKS)
    (task,) = load_tasks(None, ["paraphrase"]).values()
    assert len(task.splits["train"]) == SIZES["train"]


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown built-in task 'x'.*sentiment.*paraphrase"):
        load_builtin("x", "train")
    with pytest.raises(ValueError, match="train, validation, test, got 'dev'"):
        load_builtin("topic", "dev")


def _held():
    return {s for task in BUILTIN_SPECS for split in ("validation", "test") for s in sentences_of(task, split)}


def test_unlabelled_text_is_of_train_only():
    text = list(unlabelled_text())
    train = {sentence for task in BUILTIN_TASKS for sentence in sentences_of(task, "train")}
    assert set(text) == train - _held() and 14_000 < len(text) <= 10 * SIZES["train"]


@pytest.mark.parametrize("kind", PROSE_KINDS)
def test_prose_holds_no_sentence_of_a_validation_or_test_row(kind):
    prose, draw, held = Prose(), random.Random(0), _held()
    passages = [prose.passage_of(draw, kind) for _ in range(3000)]
    assert not any(sentence in held for passage in passages for sentence in passage)
    assert {len(passage) for passage in passages} <= {1, 2}
    assert passages[:5] == [prose.passage_of(d, kind) for d in [random.Random(0)] for _ in range(5)]


def test_the_sense_of_a_review_shows_by_what_follows():
    """A clause is good if its last word is, unless a negation turns it; the other clause says the same."""
    prose, draw = Prose(), random.Random(1)
    counts = {"good": 0, "bad": 0}
    for _ in range(2000):
        passage = prose.passage_of(draw, "review")
        if len(passage) != 2 or not any(end in passage[1] for end in ("to the end", "left early")):
            continue
        words = passage[0].split()
        last = words[-1] in GOOD
        turned = ("not" in words and "but" not in words) or "neither" in words
        # what followed may be two things, of one sense
        ends = [("clapped", "complained"), ("everybody smiled", "nobody smiled"), ("was happy", "was angry")]
        ends += [("stayed to the end", "left early"), ("will come", "will never come"), ("friends to go", "stay away")]
        said = {way for pair in ends for way, end in zip(("good", "bad"), pair, strict=True) if end in passage[1]}
        assert said == {"good" if last != turned else "bad"}, passage
        counts[said.pop()] += 1
    assert min(counts.values()) > 20
