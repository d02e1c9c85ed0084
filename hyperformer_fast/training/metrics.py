"""The paper's metrics in percent, computed by scikit-learn and scipy. Correlations range from -100 to 100.

A task's ``score`` is the mean of its metrics, and the average over tasks is the mean of their scores, as in the
paper's table 1.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats
from sklearn import metrics as sk

from ..data.tasks import TaskSpec


def _correlation(compute: Callable[..., Any], predictions: Sequence[float], labels: Sequence[float]) -> float:
    # scipy raises for fewer than two values and returns NaN for a constant; both count as no correlation here.
    if len(set(predictions)) < 2 or len(set(labels)) < 2:
        return 0.0
    return float(compute(predictions, labels)[0])


_COMPUTE: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "accuracy": lambda p, y: sk.accuracy_score(y, p),
    "f1": lambda p, y: sk.f1_score([v == 1 for v in y], [v == 1 for v in p], zero_division=0.0),
    "matthews": lambda p, y: sk.matthews_corrcoef(y, p),
    "pearson": lambda p, y: _correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: _correlation(stats.spearmanr, p, y),
}


def score(spec: TaskSpec, predictions: Sequence[float | None], labels: Sequence[float]) -> dict[str, float]:
    """Return every metric of a task, and their mean as ``score``.

    A prediction of None stands for a generated text that is no label, and counts as wrong: as a class of its own (which
    is not the positive class of F1), or for a numeric label as a value below the range (-1 for STS-B, as in the
    authors' code).
    """
    none = spec.low - 1 if spec.labels is None else -1
    filled = [none if p is None else p for p in predictions]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single label.*")  # a small split may have only one class
        values = {name: 100 * float(_COMPUTE[name](filled, list(labels))) for name in spec.metrics}
    return {**values, "score": sum(values.values()) / len(values)}


def majority_score(spec: TaskSpec, train_labels: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the metrics of always answering train's most frequent label (for a numeric label, its mean)."""
    if spec.labels is None:
        constant = sum(train_labels) / len(train_labels)
    else:
        counts = Counter(train_labels)
        constant = min(counts, key=lambda label: (-counts[label], label))
    return score(spec, [constant] * len(labels), labels)


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean of the tasks' scores."""
    return sum(values["score"] for values in scores.values()) / len(scores)
