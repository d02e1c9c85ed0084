"""The bits of the dropout: Random123's test vectors, the layout of a tensor's numbers, statistics, and the draw."""

from __future__ import annotations

import math

import pytest
import torch
from support.emulated import needs_compiler
from torch.utils.checkpoint import checkpoint

from hyperformer_fast import ops, philox
from hyperformer_fast.layout import NO_DROPOUT, Dropout

_ONES, _PI = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(("counter", "key", "expected"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((_ONES,) * 4, (_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (_PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])  # fmt: skip
def test_vectors_of_random123(counter, key, expected):
    word = lambda value: torch.tensor([value])  # noqa: E731
    found = philox.philox(tuple(map(word, counter)), tuple(map(word, key)))
    assert tuple(t.item() for t in found) == expected


def scalar_philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & _ONES, (first >> 32) ^ c[3] ^ k[1], first & _ONES]
        k = [(k[0] + 0x9E3779B9) & _ONES, (k[1] + 0xBB67AE85) & _ONES]
    return c


@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("stream", [0, 3, 2**40 + 5, -2])
def test_each_element_takes_its_number(seed, stream):
    shape = (2, 3, 21)
    found = philox.numbers(Dropout(0.5, torch.tensor([seed]), stream), shape).view(6, 21)
    key = seed & _ONES, seed >> 32 & _ONES
    for row in range(6):
        for column in range(21):
            words = scalar_philox((column >> 3, row, stream & _ONES, stream >> 32 & _ONES), key)
            word = words[(column & 7) >> 1]
            assert found[row, column] == (word >> 16 if column & 1 else word & 0xFFFF)


@pytest.mark.parametrize(("p", "threshold", "factor"), [
    (0.0, 0, 1.0), (1e-6, 0, 1.0), (0.1, 6554, 65536 / 58982), (0.5, 32768, 2.0), (0.999999, 65536, 0), (1.0, 65536, 0),
])  # fmt: skip
def test_p_is_rounded_and_the_mean_exact(p, threshold, factor):
    assert philox.threshold(p) == threshold
    assert philox.scale(p) == torch.tensor(factor, dtype=torch.float32).item()


def test_the_factor_is_a_float32():
    for p in torch.rand(500, generator=torch.Generator().manual_seed(0)).tolist():
        exact = 65536 / (65536 - philox.threshold(p))
        assert philox.scale(p) == torch.tensor(exact, dtype=torch.float64).float().item()


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_a_p_that_is_none_is_refused(p):
    x = torch.ones(3)
    with pytest.raises(ValueError, match="p must be from 0 to 1"):
        philox.draw(p, x)
    with pytest.raises(ValueError, match="p must be from 0 to 1"):
        ops.act_dropout(x, "relu", None, Dropout(p, torch.zeros(1, dtype=torch.int64), 0))


def masks(count, shape, p=0.1, stream=0):
    """``count`` masks, as they would be drawn one after another."""
    torch.manual_seed(5)
    like = torch.empty(0)
    return torch.stack(
        [philox.kept(philox.draw(p, like)._replace(stream=stream), shape) for _ in range(count)]
    ).double()


def deviations(sums, n, p):
    """The sums of n Bernoulli variables that are 1 with probability 1 - p, in standard deviations from their mean."""
    return (sums - n * (1 - p)) / math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rates(p):
    """The rate of all elements, and of each row, column and element of eight, as so many normal variables have it."""
    p_exact = philox.threshold(p) / 65536
    kept = masks(8, (64, 96), p)
    for sums, n in (
        (kept.sum(), kept.numel()),
        (kept.sum((0, 2)), 8 * 96),
        (kept.sum((0, 1)), 8 * 64),
        (kept.sum((1, 2)), 64 * 96),
        (kept.unflatten(2, (12, 8)).sum((0, 1, 2)), 8 * 64 * 12),
    ):
        z = deviations(sums.flatten(), n, p_exact)
        assert z.abs().max() < 4.5
        if len(z) > 30:
            assert 0.6 < z.std() < 1.5  # not better than random, either


def chi_square(counts, expected):
    """Pearson's statistic, in standard deviations from its mean."""
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


def test_numbers_are_uniform():
    drawn = philox.numbers(Dropout(0.1, torch.tensor([77]), 0), (128, 512))
    for shift in (0, 8):  # low and high byte
        counts = torch.bincount((drawn >> shift & 255).flatten(), minlength=256).double()
        assert abs(chi_square(counts, drawn.numel() / 256)) < 4
    pairs = (drawn[:, 1:] >> 12) * 16 + (drawn[:, :-1] >> 12)
    assert abs(chi_square(torch.bincount(pairs.flatten(), minlength=256).double(), pairs.numel() / 256)) < 4


def correlation(a, b):
    """The correlation of two masks, in its standard deviations."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return (a @ b / (a.norm() * b.norm()) * math.sqrt(a.numel())).item()


def test_sites_steps_and_ranks_are_independent():
    """Masks drawn one after another, as by the sites of a step and by steps, and the masks of ranks with one seed."""
    drawn = masks(6, (32, 64))
    ranks = torch.stack([masks(1, (32, 64), stream=rank)[0] for rank in range(6)])
    for kind in (drawn, ranks):
        for i in range(6):
            for j in range(i):
                assert abs(correlation(kind[i], kind[j])) < 4
    rows = drawn.flatten(0, 1)
    for lag in (1, 2, 7, 32):
        assert abs(correlation(rows[lag:], rows[:-lag])) < 4
        assert abs(correlation(rows[:, lag:], rows[:, :-lag])) < 4


def test_the_mean_is_kept():
    out = ops.act_dropout(torch.ones(512, 512), "relu", None, Dropout(0.1, torch.tensor([3]), 0)).double()
    assert abs(out.mean() - 1) < 4 * math.sqrt(0.1 / 0.9 / out.numel())
    assert out.unique().tolist() == [0.0, philox.scale(0.1)]


def test_the_draw_follows_torchs_generator():
    x = torch.ones(4, 8)
    torch.manual_seed(1)
    first, second = philox.draw(0.5, x), philox.draw(0.5, x)
    state = torch.get_rng_state()
    third = philox.draw(0.5, x)
    torch.manual_seed(1)
    assert torch.equal(philox.draw(0.5, x).seed, first.seed) and not torch.equal(first.seed, second.seed)
    torch.set_rng_state(state)
    assert torch.equal(philox.draw(0.5, x).seed, third.seed)
    assert first.seed.dtype == torch.int64 and first.seed.shape == (1,) and first.stream == 0


def test_nothing_is_drawn_without_dropout():
    state = torch.get_rng_state()
    assert philox.draw(0.0, torch.ones(1)) is NO_DROPOUT and philox.draw(1e-7, torch.ones(1)) is NO_DROPOUT
    assert torch.equal(torch.get_rng_state(), state)


def test_the_stream_is_the_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    assert philox.draw(0.5, torch.ones(1)).stream == 3


def chain(x):
    """Two dropouts with the same argument, and one more."""
    a = ops.act_dropout(x, "relu", None, philox.draw(0.5, x))
    b = ops.act_dropout(x, "relu", None, philox.draw(0.5, x))
    return ops.residual(a, b, philox.draw(0.1, a))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", "aot_eager_decomp_partition", pytest.param("inductor", marks=needs_compiler)]
)
def test_a_compiled_graph_draws_what_eager_draws(compiler, train):
    """Equal draws of one graph are not merged, which would give two sites of a T5 one mask."""
    torch._dynamo.reset()
    x = torch.rand(16, 32).requires_grad_(train)
    compiled = torch.compile(chain, fullgraph=True, backend=compiler)
    for _ in range(2):
        state = torch.get_rng_state()
        expected = chain(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        found = compiled(x)
        assert torch.equal(found, expected) and torch.equal(torch.get_rng_state(), after)
        if train:
            g = torch.rand_like(found)
            assert torch.equal(torch.autograd.grad(found, x, g)[0], torch.autograd.grad(expected, x, g)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(reentrant):
    x = torch.rand(16, 32, requires_grad=True)
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(chain(x).pow(2).sum(), x)
    torch.manual_seed(3)
    checkpoint(chain, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(x.grad, expected)


def test_vmap_chooses_one_mask_or_many():
    x = torch.ones(5, 4, 64)
    apply = lambda x: ops.act_dropout(x, "relu", None, philox.draw(0.5, x))  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(apply)(x)
    same = torch.func.vmap(apply, randomness="same")(x)
    assert all(torch.equal(same[0], sample) for sample in same)
    different = torch.func.vmap(apply, randomness="different")(x)
    assert not any(torch.equal(different[0], sample) for sample in different[1:])


def test_opcheck_of_the_draw():
    op = torch.ops.hyperformer_fast.dropout_seed.default
    torch.library.opcheck(op, (torch.ones(3),), test_utils=("test_schema", "test_faketensor"))
