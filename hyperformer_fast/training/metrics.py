"""The paper's metrics, computed by scikit-learn and scipy, in percent: 0 to 100, correlations -100 to 100.

A task's ``score`` is the mean of its metrics, and the average over tasks is the mean of their scores, as in the
paper's table 1.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

from scipy import stats
from sklearn import metrics as sk

from ..data.tasks import TaskSpec


def _correlation(compute, predictions: Sequence[float], labels: Sequence[float]) -> float:
    # scipy refuses fewer than two; a constant correlates with nothing, which is 0 here and NaN there
    if len(set(predictions)) < 2 or len(set(labels)) < 2:
        return 0.0
    return float(compute(predictions, labels)[0])


_COMPUTE = {
    "accuracy": lambda p, y: sk.accuracy_score(y, p),
    "f1": lambda p, y: sk.f1_score([v == 1 for v in y], [v == 1 for v in p], zero_division=0.0),
    "matthews": lambda p, y: sk.matthews_corrcoef(y, p),
    "pearson": lambda p, y: _correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: _correlation(stats.spearmanr, p, y),
}


def score(spec: TaskSpec, predictions: Sequence[float | None], labels: Sequence[float]) -> dict[str, float]:
    """Every metric of a task, and their mean as ``score``.

    A prediction of None, a generated text that is no label, counts as wrong: as a class of its own (so neither as the
    positive one of F1), or, for a number, as one below the range (-1 for STS-B, as in the authors' code).
    """
    none = spec.low - 1 if spec.labels is None else -1
    filled = [none if p is None else p for p in predictions]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single label.*")  # a small split may hold one class only
        values = {name: 100 * float(_COMPUTE[name](filled, list(labels))) for name in spec.metrics}
    return {**values, "score": sum(values.values()) / len(values)}


def majority_score(spec: TaskSpec, train_labels: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """The metrics of always answering train's most frequent label (its mean, for a number)."""
    if spec.labels is None:
        constant = sum(train_labels) / len(train_labels)
    else:
        counts = Counter(train_labels)
        constant = min(counts, key=lambda label: (-counts[label], label))
    return score(spec, [constant] * len(labels), labels)


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """The mean of the tasks' scores."""
    return sum(values["score"] for values in scores.values()) / len(scores)
