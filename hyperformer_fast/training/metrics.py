"""The paper's metrics in percent, computed by scikit-learn, scipy, sacrebleu and rouge-score.

Correlations range from -100 to 100. There are two averages, which are never the same number where a task has several
metrics: :func:`average_metrics` is the plain mean of all metric numbers, 11 for GLUE, and the "Avg" of the paper's
tables; :func:`average_tasks` is the mean over tasks of each task's mean.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats
from sklearn import metrics as sk

from ..data.tasks import TaskSpec
from ..extras import require
from . import squad

#: What a row's label may be, and what :meth:`TaskSpec.parse` returns.
Label = float | str | list[str]
Prediction = float | str | None


def _correlation(compute: Callable[..., Any], predictions: Sequence[float], labels: Sequence[float]) -> float:
    # scipy raises for fewer than two values and returns NaN for a constant; both count as no correlation here.
    if len(set(predictions)) < 2 or len(set(labels)) < 2:
        return 0.0
    value = float(compute(predictions, labels)[0])
    return 0.0 if math.isnan(value) else value


_OF_CLASSES: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": lambda p, y: sk.accuracy_score(y, p),
    "f1": lambda p, y: sk.f1_score(y, [1 - label if v < 0 else v for v, label in zip(p, y)], zero_division=0.0),
    "matthews": lambda p, y: sk.matthews_corrcoef(y, p),
}
_OF_NUMBERS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "pearson": lambda p, y: _correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: _correlation(stats.spearmanr, p, y),
}


def _mean(compute: Callable[[str, list[str]], float]) -> Callable[[list[str], list[list[str]]], float]:
    return lambda texts, answers: sum(map(compute, texts, answers)) / len(texts)


def _bleu(texts: list[str], answers: list[list[str]]) -> float:
    """Return BLEU of the whole corpus, which is no mean over rows, with every acceptable answer as a reference."""
    require("BLEU", "sacrebleu")
    from sacrebleu import corpus_bleu

    most = max(map(len, answers))
    references: Any = [[row[i] if i < len(row) else None for row in answers] for i in range(most)]
    return corpus_bleu(texts, references, force=True).score / 100  # force: no warning about texts that look tokenised


def _rouge(names: list[str], texts: list[str], answers: list[list[str]]) -> dict[str, float]:
    require("ROUGE", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(names, use_stemmer=True)
    rows = [scorer.score_multi(row, text) for text, row in zip(texts, answers)]
    return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in names}


_OF_TEXTS: dict[str, Callable[[list[str], list[list[str]]], float]] = {
    "accuracy": _mean(lambda text, answers: float(text in [answer.strip() for answer in answers])),
    "bleu": _bleu,
    "exact_match": _mean(squad.exact_match),
    "squad_f1": _mean(squad.f1),
}


def score(spec: TaskSpec, predictions: Sequence[Prediction], labels: Sequence[Label]) -> dict[str, float]:
    """Return every metric of a task in percent, and their mean as ``score``.

    A prediction of None stands for a generated text that is no label, and counts as wrong, as in the authors' code: for
    F1 as the class that the row is not of, so that it is an error for both classes; for accuracy and Matthews'
    correlation as a class of its own; for a numeric label as a value below the range (-1 for STS-B). A correlation that
    is undefined is 0.

    Texts are compared with every acceptable answer: BLEU takes all as references, the other metrics take the best.
    ROUGE is the F-measure of stemmed words of Latin letters and digits, and ``rougeLsum`` takes lines for sentences.

    Raises:
        ValueError: there are no rows, or not one prediction for each label.
        MissingPackage: the library of a metric is not installed.
    """
    if not labels or len(predictions) != len(labels):
        raise ValueError(
            f"task {spec.name}: one prediction for each of at least one label, got {len(predictions)} predictions for "
            f"{len(labels)} labels"
        )
    if spec.target == "text":
        texts = ["" if prediction is None else str(prediction) for prediction in predictions]
        answers = [[label] if isinstance(label, str) else list(label) for label in labels]  # type: ignore[arg-type]
        rouges = [name for name in spec.metrics if name not in _OF_TEXTS]
        rouge = _rouge(rouges, texts, answers) if rouges else {}
        values = {name: rouge[name] if name in rouge else _OF_TEXTS[name](texts, answers) for name in spec.metrics}
    else:
        none = spec.low - 1 if spec.target == "number" else -1
        filled = [none if prediction is None else prediction for prediction in predictions]
        compute: Mapping[str, Callable[..., float]] = _OF_NUMBERS if spec.target == "number" else _OF_CLASSES
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single label.*")  # a small split may have only one class
            values = {name: compute[name](filled, list(labels)) for name in spec.metrics}
    return _with_score({name: 100 * float(value) for name, value in values.items()})


def majority_score(spec: TaskSpec, train_labels: Sequence[Label], labels: Sequence[Label]) -> dict[str, float]:
    """Return the metrics of always answering train's most frequent label (for a numeric label, its mean).

    Of a text target's acceptable answers the first counts, the one that is trained on.
    """
    constant: Any
    if spec.target == "number":
        constant = sum(train_labels) / len(train_labels)  # type: ignore[arg-type]
    else:
        counts = Counter(spec.target_text(label) if spec.target == "text" else label for label in train_labels)
        constant = min(counts, key=lambda label: (-counts[label], label))
    return score(spec, [constant] * len(labels), labels)


def _with_score(values: dict[str, float]) -> dict[str, float]:
    return {**values, "score": sum(values.values()) / len(values)}


def _numbers(values: Mapping[str, float]) -> list[float]:
    return [value for metric, value in values.items() if metric != "score"]


def average_metrics(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean of all metric numbers of all tasks, the "Avg" of the paper: a task with two metrics counts twice.

    Args:
        scores: for each task its metrics by name; their mean, ``score``, is left out.
    """
    numbers = [value for values in scores.values() for value in _numbers(values)]
    return sum(numbers) / len(numbers)


def average_tasks(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean over tasks of the mean of each task's metrics. The argument is :func:`average_metrics`'s."""
    means = [sum(_numbers(values)) / len(_numbers(values)) for values in scores.values()]
    return sum(means) / len(means)


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return :func:`average_tasks`, by the name that it had when there was one average."""
    warnings.warn("average is now average_tasks (the paper's Avg is average_metrics)", DeprecationWarning, stacklevel=2)
    return average_tasks(scores)
