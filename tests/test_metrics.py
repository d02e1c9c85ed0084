"""The metrics against known values, and the paper's table 1 recomputed from its own numbers."""

from __future__ import annotations

import math
import sys

import pytest

from hyperformer_fast.data import TaskSpec
from hyperformer_fast.data.registry import KNOWN, find_task
from hyperformer_fast.extras import MissingPackage
from hyperformer_fast.training.metrics import average_metrics, average_tasks, majority_score, score

#: Rows of the paper's table 1: CoLA, SST-2, MRPC (accuracy, F1), QQP (accuracy, F1), STS-B (Pearson, Spearman), MNLI,
#: QNLI, RTE, and the printed Avg.
TABLE_1 = {
    "single-task T5 small": (46.81, 90.47, 86.21, 90.67, 91.02, 87.96, 89.11, 88.70, 82.09, 90.21, 59.42, 82.06),
    "single-task Adapters small": (40.12, 89.44, 85.22, 89.29, 90.04, 86.68, 83.93, 83.62, 81.58, 89.11, 55.80, 79.53),
    "single-task T5 base": (54.85, 92.19, 88.18, 91.61, 91.46, 88.61, 89.55, 89.41, 86.49, 91.60, 67.39, 84.67),
    "single-task Adapters base": (59.49, 93.46, 88.18, 91.55, 90.94, 88.01, 87.44, 87.18, 86.38, 92.26, 68.84, 84.88),
    "multi-task T5 small": (50.67, 91.39, 84.73, 88.89, 89.53, 86.31, 88.70, 88.27, 81.04, 89.67, 59.42, 81.69),
    "Adapters-dagger small": (39.87, 90.01, 88.67, 91.81, 88.51, 84.77, 88.15, 87.89, 79.95, 89.60, 60.14, 80.85),
    "HyperFormer small": (47.64, 91.39, 90.15, 92.96, 88.68, 85.08, 87.49, 86.96, 81.24, 90.39, 65.22, 82.47),
    "HyperFormer++ small": (53.96, 90.59, 84.24, 88.81, 88.44, 84.46, 87.73, 87.26, 80.69, 90.39, 71.01, 82.51),
    "multi-task T5 base": (54.88, 92.54, 90.15, 93.01, 91.13, 88.07, 88.84, 88.53, 85.66, 92.04, 75.36, 85.47),
    "Adapters-dagger base": (61.53, 93.00, 90.15, 92.91, 90.47, 87.26, 89.86, 89.44, 86.09, 93.17, 70.29, 85.83),
    "HyperFormer base": (61.32, 93.80, 90.64, 93.33, 90.13, 87.18, 89.55, 89.03, 86.33, 92.79, 78.26, 86.58),
    "HyperFormer++ base": (63.73, 94.03, 89.66, 92.63, 90.28, 87.20, 90.00, 89.66, 85.74, 93.02, 75.36, 86.48),
}


def table_row(numbers: tuple[float, ...]) -> dict[str, dict[str, float]]:
    found = iter(numbers)
    order = "cola sst2 mrpc qqp stsb mnli qnli rte".split()
    metrics = {"mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1")}
    scores = {}
    for task in order:
        scores[task] = {name: next(found) for name in metrics.get(task, KNOWN[task].metrics)}
        assert set(scores[task]) == set(KNOWN[task].metrics)
        scores[task]["score"] = sum(scores[task].values()) / len(scores[task])
    return scores


@pytest.mark.parametrize("model", TABLE_1)
def test_table_1_of_the_paper_is_recomputed_from_its_own_numbers(model):
    *numbers, printed = TABLE_1[model]
    scores = table_row(tuple(numbers))
    assert sum(len(values) - 1 for values in scores.values()) == 11
    assert abs(average_metrics(scores) - printed) <= 0.01
    assert abs(average_tasks(scores) - printed) > 0.3  # the mean over tasks is another number in every row


def test_the_two_averages():
    scores = {"a": {"accuracy": 10.0, "score": 10.0}, "b": {"accuracy": 40.0, "f1": 100.0, "score": 70.0}}
    assert average_metrics(scores) == 50 and average_tasks(scores) == 40
    without = {task: {m: v for m, v in values.items() if m != "score"} for task, values in scores.items()}
    assert average_metrics(without) == 50 and average_tasks(without) == 40


def test_an_unparsable_text_is_an_error_for_both_classes():
    """With labels 1 1 0 0: an invalid text of a positive row is a miss, one of a negative row a false alarm."""
    mrpc = KNOWN["mrpc"]
    for predictions, f1, accuracy in (
        ([1, None, 0, 0], 2 / 3, 3 / 4),  # one hit, one miss
        ([1, 1, None, 0], 4 / 5, 3 / 4),  # two hits, one false alarm
        ([1, None, None, 0], 1 / 2, 2 / 4),  # one hit, one miss, one false alarm
        ([None] * 4, 0, 0),
        ([1, 1, 0, 0], 1, 1),
    ):
        found = score(mrpc, predictions, [1, 1, 0, 0])
        assert found["f1"] == pytest.approx(100 * f1) and found["accuracy"] == pytest.approx(100 * accuracy)
        assert found["score"] == pytest.approx(50 * (f1 + accuracy))


def test_matthews_takes_an_unparsable_text_for_a_third_class():
    cola = KNOWN["cola"]
    assert score(cola, [1, 0, 1, 0], [1, 0, 1, 0])["matthews"] == pytest.approx(100)
    assert score(cola, [0, 1, 0, 1], [1, 0, 1, 0])["matthews"] == pytest.approx(-100)
    assert score(cola, [1, 1, 1, 1], [1, 0, 1, 0])["matthews"] == 0
    # With 3 of 4 right, predicted 1 2 1 times and true 0 2 2 times: (3 n - sum of products) over the root of both
    expected = (3 * 4 - (2 * 2 + 1 * 2)) / math.sqrt((16 - 6) * (16 - 8))
    assert score(cola, [1, None, 1, 0], [1, 0, 1, 0])["matthews"] == pytest.approx(100 * expected)


def test_correlations():
    stsb = KNOWN["stsb"]
    exact = score(stsb, [0.0, 1.0, 2.0, 4.0], [0.0, 1.0, 2.0, 4.0])
    assert exact == pytest.approx({"pearson": 100, "spearman": 100, "score": 100})
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15) = 0.8
    assert score(stsb, [0.0, 2.0, 1.0, 4.0], [0.0, 1.0, 2.0, 4.0])["spearman"] == pytest.approx(80)
    # An unparsable text counts as -1, below every label.
    assert score(stsb, [None, 1.0, 2.0], [0.0, 1.0, 2.0]) == score(stsb, [-1.0, 1.0, 2.0], [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),
        ([None, None], [1.0, 2.0]),
        ([1.0], [1.0]),
        ([float("nan"), 1.0, 2.0], [0.0, 1.0, 2.0]),
    ],
)
def test_a_correlation_that_is_undefined_is_0(predictions, labels):
    found = score(KNOWN["stsb"], predictions, labels)
    assert found["pearson"] == 0 and not math.isnan(found["spearman"])


def free_text(*metrics: str) -> TaskSpec:
    return TaskSpec(name="free", source="{question}", target="text", label_columns="answer", metrics=metrics)


def test_bleu_is_of_the_corpus_and_takes_every_acceptable_answer():
    spec = find_task("wmt16-en-ro")
    assert score(spec, ["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100)
    # Precisions 4/5, 2/4, 1/3 and, smoothed, 1/(2*2); as long as its reference, so no brevity penalty.
    four = score(spec, ["the cat sat down here"], ["the cat sat up here"])["bleu"]
    assert four == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    # Of two rows: (5 + 4)/(5 + 5), (4 + 2)/8, (3 + 1)/6, 2/4. The mean of the rows' own scores would be another number.
    both = score(
        spec, ["one two three four five", "the cat sat down here"], ["one two three four five", "the cat sat up here"]
    )
    assert both["bleu"] == pytest.approx(100 * (9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)
    assert abs(both["bleu"] - (100 + four) / 2) > 1
    several = [["a dog stood there", "the cat sat up here", "the cat sat down here"], ["one two three four five"]]
    assert score(spec, ["the cat sat down here", "one two three four five"], several)["bleu"] == pytest.approx(100)
    assert score(spec, ["", ""], ["the cat", "a dog"])["bleu"] == 0


def test_rouge():
    spec = free_text("rouge1", "rouge2", "rougeL", "rougeLsum")
    found = score(spec, ["the cats sat", "nothing"], ["the cat was sitting", "a dog barked"])
    # "cats" is stemmed to "cat"; "sat" and "sitting" differ. First row: 2 of 3 words, 2 of 4; 1 of 2 pairs, 1 of 3.
    one, two = 2 * 2 / (3 + 4), 2 * 1 / (2 + 3)
    assert found["rouge1"] == found["rougeL"] == found["rougeLsum"] == pytest.approx(50 * one)
    assert found["rouge2"] == pytest.approx(50 * two)
    # The best of the acceptable answers counts.
    assert score(spec, ["the cats sat"], [["a dog", "the cat sat"]])["rouge2"] == pytest.approx(100)
    # Of lines in another order rougeLsum sees each, and rougeL the longest common subsequence.
    lines = score(spec, ["one two\nthree four"], ["three four\none two"])
    assert lines["rougeLsum"] == pytest.approx(100) and lines["rougeL"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("an  apple", "Apple.", 1, 1),
        ("U.S.", ["us", "America"], 1, 1),
        ("the big red house", ["red house", "a hut"], 0, 2 * 2 / (3 + 2)),  # "the" is dropped
        ("red red", ["red"], 0, 2 * 1 / (2 + 1)),
        ("blue", ["red"], 0, 0),
        ("", ["red"], 0, 0),
        ("the", ["a"], 1, 1),
        ("theory", ["ory"], 0, 0),  # an article within a word stays
    ],
)
def test_squad(prediction, answers, exact, f1):
    found = score(free_text("exact_match", "squad_f1"), [prediction], [answers])
    assert found == pytest.approx({"exact_match": 100 * exact, "squad_f1": 100 * f1, "score": 50 * (exact + f1)})


def test_accuracy_of_free_text_is_literal():
    found = score(free_text("accuracy"), ["Yes", "no", "b"], ["yes", "no ", ["a", "b"]])
    assert found["accuracy"] == pytest.approx(200 / 3)


def test_majority():
    assert majority_score(KNOWN["sst2"], [1, 1, 0], [1, 0, 0, 0])["accuracy"] == 25
    assert majority_score(KNOWN["stsb"], [1.0, 2.0], [1.0, 2.0]) == {"pearson": 0, "spearman": 0, "score": 0}
    answers = [["red", "crimson"], "blue", "red"]
    assert majority_score(free_text("exact_match"), answers, ["red", ["blue", "red"], "blue"])[
        "score"
    ] == pytest.approx(200 / 3)


def test_rows_must_be_there_and_of_one_number():
    for predictions, labels in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match=r"task sst2: one prediction for each of at least one label"):
            score(KNOWN["sst2"], predictions, labels)


@pytest.mark.parametrize(
    ("metric", "module", "message"),
    [
        ("bleu", "sacrebleu", "BLEU needs sacrebleu, which is not installed"),
        ("rougeL", "rouge_score", "ROUGE needs rouge-score, which is not installed"),
    ],
)
def test_a_library_that_is_absent_is_named(monkeypatch, metric, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=message):
        score(free_text(metric), ["a"], ["a"])


def test_the_old_name_of_the_average_still_works():
    from hyperformer_fast.training.metrics import average

    with pytest.warns(DeprecationWarning, match="average_tasks"):
        assert average({"a": {"accuracy": 10.0, "score": 10.0}}) == 10
