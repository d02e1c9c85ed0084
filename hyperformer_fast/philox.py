"""Dropout whose mask is computed from a counter: the definition of the bits, and the draw of a seed.

The random numbers are those of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
Every backend computes them from the position of an element, so the mask does not depend on threads, instruction sets
or strides, and a backward computes it again.

A tensor [..., n] counts as rows x n, in the row-major order of its indices. Philox gets the key
``(low, high 32 bits of the seed)`` and the counter ``(column >> 3, row, low, high 32 bits of the stream)``. Its four
words are eight 16-bit numbers, the low half of word 0 first. The element in ``column`` takes number ``column & 7`` and
is dropped where this is less than ``threshold(p)``; the others are multiplied by ``scale(p)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import NO_DROPOUT, Dropout

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

#: The number of rows that the counter can tell apart, less one.
MOST_ROWS = 2**32 - 1

_WORD = 0xFFFFFFFF
_STEPS = 65536

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def threshold(p: float) -> int:
    """The 16-bit numbers below this one drop their element. ValueError unless ``0 <= p <= 1``."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"the dropout's p must be from 0 to 1, got {p}")
    return math.floor(p * _STEPS + 0.5)


def scale(p: float) -> float:
    """The factor of the elements that are kept, rounded to float32. It is 0 where all are dropped."""
    kept = _STEPS - threshold(p)
    # Rounded to float32 by arithmetic that a compiler can trace: the quotient is in 1 .. 65536, so that 2^e is exact.
    if kept == 0:
        return 0.0
    quotient = _STEPS / kept
    ulp = 2.0 ** (math.frexp(quotient)[1] - 24)
    return round(quotient / ulp) * ulp


def rounded(dropout: Dropout) -> Dropout:
    """The dropout, or ``NO_DROPOUT`` if its p rounds to 0. ValueError unless p is from 0 to 1."""
    return dropout if threshold(dropout.p) else NO_DROPOUT


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Compute Philox4x32-10. All words are int64 tensors with values from 0 to 2^32 - 1, and are broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product modulo 2^64 has all 64 bits, although int64 shows it as negative.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + INCREMENTS[0]) & _WORD, (k1 + INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def numbers(dropout: Dropout, shape: Sequence[int]) -> Tensor:
    """The 16-bit number of each element of a tensor of this shape, as int64."""
    seed = dropout.seed
    assert seed is not None
    n = shape[-1]
    rows = math.prod(shape[:-1])
    column = torch.arange((n + 7) // 8, device=seed.device).view(1, -1)
    row = torch.arange(rows, device=seed.device).view(-1, 1)
    stream = torch.full_like(column[:, :1], dropout.stream & _WORD)
    high = torch.full_like(stream, (dropout.stream >> 32) & _WORD)
    words = philox((column, row, stream, high), (seed & _WORD, (seed >> 32) & _WORD))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(1)[:, :n].reshape(shape)


def kept(dropout: Dropout, shape: Sequence[int]) -> Tensor:
    """Which elements of a tensor of this shape are kept, as bool."""
    return numbers(dropout, shape) >= threshold(dropout.p)


def apply(x: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x), which autograd can differentiate. What is dropped is exactly 0, even a NaN."""
    if dropout.p == 0:
        return x
    return torch.where(kept(dropout, x.shape), x * scale(dropout.p), 0.0)


def _draw_seed(like: Tensor) -> Tensor:
    # torch.randint, because it has rules for the randomness modes of vmap.
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=like.device)


torch.library.define(
    "hyperformer_fast::dropout_seed",
    "(Tensor like) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
torch.library.impl("hyperformer_fast::dropout_seed", "CompositeExplicitAutograd", _draw_seed)


@torch.library.register_fake("hyperformer_fast::dropout_seed")
def _(like: Tensor) -> Tensor:
    return like.new_empty(1, dtype=torch.int64)


def draw(p: float, like: Tensor) -> Dropout:
    """Draw a dropout for tensors on the device of ``like``.

    The seed is one number of torch's generator of that device. So ``torch.manual_seed``, activation checkpointing and
    resumed runs repeat it as they repeat torch's own dropout. Each process of torch.distributed gets masks of its own,
    even if all have the same seed.

    Args:
        p: the probability of dropping an element. Nothing is drawn where it rounds to 0.
        like: a tensor on the device.

    Raises:
        ValueError: p is not from 0 to 1.
    """
    if threshold(p) == 0:
        return NO_DROPOUT
    seed: Tensor
    if torch.compiler.is_compiling():
        # AOTAutograd merges equal calls of an op, even of one that draws random numbers, unless it is one of PyTorch's
        # own. The results of torch.empty are never merged, so two draws have different arguments.
        seed = torch.ops.hyperformer_fast.dropout_seed(torch.empty(1, device=like.device))
    elif type(like) in (Tensor, torch.nn.Parameter):
        seed = _draw_seed(like)
    else:
        seed = torch.ops.hyperformer_fast.dropout_seed(like)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Dropout(p, seed, torch.distributed.get_rank() if distributed else 0)
