"""Dropout as the other kernels apply it: its mask is computed where it is needed, and never stored.

``hyperformer_fast/philox.py`` defines the bits. A tensor counts as N rows of n numbers. One call of Philox4x32-10 gives
eight numbers of 16 bits, for eight neighbouring columns of a row; its counter is made of the row, of a column's eighth
and of the stream, and its key is the seed. So every kernel finds the same mask, however it divides the tensor, and so
does a backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import philox
from ..layout import Dropout


@triton.jit
def kept(SEED, stream, threshold, row, first, BM: tl.constexpr, BK: tl.constexpr):
    """Return whether dropout keeps each number of a tile, as [BM, BK].

    SEED points to one int64. ``row`` [BM] are the tile's rows among all N, as int64, and ``first`` is its first
    column, a multiple of 8. A number is kept where its 16 random bits are at least ``threshold``."""
    # Scalars and sides until the rounds mix them: the first rounds need not be computed for every number.
    column = (first // 8 + tl.arange(0, BK // 8)).to(tl.uint32)[None, :]
    wide = tl.cast(stream, tl.int64)
    low = (wide & 0xFFFFFFFF).to(tl.uint32)
    high = ((wide >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(SEED), column, row.to(tl.uint32)[:, None], low, high)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [BM, BK / 8, 2, 2] in their order
    low_half = (words & 0xFFFF).to(tl.int32) >= threshold
    high_half = (words >> 16).to(tl.int32) >= threshold
    return tl.reshape(tl.join(low_half, high_half), (BM, BK))


@triton.jit
def dropped_out(value, SEED, stream, threshold, scale, row, first, BM: tl.constexpr, BK: tl.constexpr):
    """Return dropout of ``value`` [BM, BK] in float32: ``scale`` times it where it is kept, and 0 elsewhere, whatever
    it holds. The other arguments are those of ``kept``."""
    return tl.where(kept(SEED, stream, threshold, row, first, BM, BK), value * scale, 0.0)


class DropoutArguments(NamedTuple):
    """A ``Dropout`` as the kernels take it; they compile without it where ``on`` is False."""

    seed: Tensor | None  #: int64 [1]; None unless ``on``
    stream: int
    threshold: int
    scale: float
    on: bool

    @property
    def run_time(self) -> tuple[Any, ...]:
        """The arguments SEED, stream, threshold and scale of a kernel."""
        return self[:4]


def dropout_arguments(dropout: Dropout) -> DropoutArguments:
    """What a kernel takes for ``dropout``."""
    if dropout.p == 0:
        return DropoutArguments(None, 0, 0, 1.0, False)
    return DropoutArguments(dropout.seed, dropout.stream, philox.threshold(dropout.p), philox.scale(dropout.p), True)
