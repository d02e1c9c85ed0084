"""Cut a task without a labelled test split by the rule of the authors' code, and choose subsets of rows.

Two things differ from theirs. Rows of train that become validation are not trained on (they train on them). A limit on
the number of rows has no default of -1, which drops the last row of every split there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .tasks import DataError

if TYPE_CHECKING:
    from datasets import Dataset

#: Tasks whose validation split is cut in half.
HALVED = frozenset("cola wnli rte trec superglue-cb sick mrpc stsb imdb commonsense_qa superglue-boolq".split())

#: Tasks whose train split gives the first rows of a permutation to validation, while validation becomes the test split.
HELD_OUT = frozenset("yelp_polarity qqp qnli social_i_qa cosmos_qa winogrande hellaswag sst2".split())

#: Rows of train that become validation.
HELD_OUT_ROWS = 1000

#: A task in neither list is halved if it has fewer rows of train than this.
SMALL_TRAIN = 10_000


def permutation(rows: int, seed: int) -> list[int]:
    """Return the permutation that the authors' code draws for a split of so many rows."""
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def holds_out(name: str, train_rows: int) -> bool:
    """Return whether the rule takes validation from train (True), or halves the validation split (False).

    Where train is too small to give :data:`HELD_OUT_ROWS` and keep as many, validation is halved.
    """
    if name in HALVED or train_rows < 2 * HELD_OUT_ROWS:
        return False
    return name in HELD_OUT or train_rows >= SMALL_TRAIN


def cut(name: str, splits: dict[str, Dataset], seed: int, max_train_samples: int | None = None) -> dict[str, Dataset]:
    """Return train, validation and test of a task that has only train and validation.

    Args:
        name: name of the task, which decides by which of the two rules it is cut.
        splits: ``train`` and ``validation``.
        seed: seed of the permutation (the authors' ``data_seed``).
        max_train_samples: see :func:`sample_train`. Where validation is taken from train, the rows of train are those
            that follow it in the same permutation.

    Raises:
        DataError: validation has one row only, which cannot be halved.
    """
    train, validation = splits["train"], splits["validation"]
    if holds_out(name, len(train)):
        order = permutation(len(train), seed)
        rest = order[HELD_OUT_ROWS:]
        few = max_train_samples is not None and max_train_samples < len(rest)
        return {
            "train": train.select(rest[:max_train_samples] if few else sorted(rest)),
            "validation": train.select(order[:HELD_OUT_ROWS]),
            "test": validation,
        }
    half = len(validation) // 2
    if half == 0:
        raise DataError(
            f"task {name!r}: validation has 1 row, which cannot be cut into validation and test; give it a test split "
            "or set split_validation_test to false"
        )
    order = permutation(len(validation), seed)
    return {
        "train": sample_train(train, max_train_samples, seed),
        "validation": validation.select(order[:half]),
        "test": validation.select(order[half:]),
    }


def sample_train(train: Dataset, rows: int | None, seed: int) -> Dataset:
    """Return the first ``rows`` rows of a permutation of train, which is the authors' few-shot sample; None for all."""
    if rows is None or rows >= len(train):
        return train
    return train.select(permutation(len(train), seed)[:rows])
