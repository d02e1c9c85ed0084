"""SQuAD's exact match and F1 of one answer, by the normalisation of the official evaluation script."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return the text in lower case, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: list[str]) -> float:
    """Return 1.0 if the prediction equals one of the acceptable answers once both are normalised, else 0.0."""
    return float(normalised(prediction) in map(normalised, answers))


def f1(prediction: str, answers: list[str]) -> float:
    """Return the F1 of the prediction's words against those of the acceptable answer that it fits best."""
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in answers)


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))
