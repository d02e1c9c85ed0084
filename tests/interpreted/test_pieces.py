"""The Triton kernels of the activations, called as the backend calls them; and what the kernels of all pieces of a T5
have in common: the dropout's mask, empty tensors, and each number crossing memory once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.interpreted import DTYPES, EPS, assert_like_eager, dropout_of, mask_of, strided
from support.watch import watch

from hyperformer_fast import philox
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.kernels import entry
from hyperformer_fast.layout import NO_DROPOUT


@pytest.fixture(autouse=True)
def _watched():
    torch.manual_seed(0)
    with watch() as seen:
        yield seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation, gated, dtype):
    shape = (3, 5, 1100) if (activation, dtype) == ("relu", torch.float32) else (3, 5, 70)
    dropout = dropout_of(0.1 if gated else 0.3)
    a, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    c = strided(shape, dtype, "apart") if gated else None
    out = entry.act_dropout_forward(a, c, activation, dropout)
    da, dc = entry.act_dropout_backward(g, a, c, activation, dropout)
    kinds = {"gelu_new": "tanh", "gelu": "none"}

    def function(a, c=None):
        h = F.gelu(a, approximate=kinds[activation]) if activation in kinds else getattr(F, activation)(a)
        return (((h if c is None else h * c) * mask_of(dropout, shape).to(a.dtype)),)

    inputs, mine = ((a, c), (out, da, dc)) if gated else ((a,), (out, da))
    assert gated or not dc.numel()
    assert_like_eager(mine, function, inputs, (g,), dtype, ("out", "da", "dc")[: len(mine)])


@pytest.mark.parametrize(
    ("seed", "stream", "p"),
    [(0, 0, 0.1), (-1, 7, 0.5), (2**63 - 1, 2**40 + 3, 0.9), (-(2**63) + 12345, -1, 0.25)],
)
def test_every_kernel_has_the_mask_of_the_definition(seed, stream, p):
    """Forward and backward; with tiles of several rows, and of several parts of a row."""
    dropout = dropout_of(p, seed, stream)
    for shape in ((5, 3, 16), (37,), (2, 1, 1030)):
        kept, ones = philox.kept(dropout, shape), torch.ones(shape)
        every = [
            entry.residual_forward(ones * 0, ones, dropout, None, EPS, False)[0],
            entry.residual_backward(ones, None, None, None, None, dropout, True, False)[1],
            entry.act_dropout_forward(ones, None, "relu", dropout),
            *entry.act_dropout_backward(ones, ones, ones, "relu", dropout),
        ]
        for mine in every:
            assert torch.equal(mine, torch.where(kept, torch.tensor(philox.scale(p)), 0.0))
    shape = 2, 3, 5, 24
    kept, scores = philox.kept(dropout, shape), torch.zeros(shape)
    out, probabilities = entry.softmax_dropout_forward(scores, None, None, dropout, True)
    assert torch.equal(out != 0, kept)
    alone = torch.zeros(shape)
    alone[..., 5] = 1.0  # a gradient of one element reaches the scores only if it was kept
    dscores = entry.softmax_dropout_backward(alone, probabilities, dropout)
    assert torch.equal((dscores != 0).any(-1), kept[..., 5])


def test_what_is_dropped_is_zero_whatever_it_was():
    dropout, none = dropout_of(0.5), dropout_of(1.0)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).repeat(2, 8)
    dropped, ones = ~philox.kept(dropout, bad.shape), torch.ones_like(bad)
    for drop, where in ((dropout, dropped), (none, ones.bool())):
        for mine in (
            entry.residual_forward(ones * 0, bad, drop, None, EPS, False)[0],
            entry.residual_backward(bad, None, None, None, None, drop, True, False)[1],
            entry.act_dropout_forward(bad, None, "relu", drop),
            *entry.act_dropout_backward(bad, ones, ones, "gelu_new", drop),
        ):
            assert not mine[where].any() and mine[~where].isnan().any() == (drop is dropout)


def test_a_dropout_that_drops_nothing_still_separates_the_gradients():
    g, dropout = torch.randn(3, 8), dropout_of(1e-7)
    assert torch.equal(entry.residual_backward(g, None, None, None, None, dropout, True, False)[1], g)


def test_no_rows_and_no_columns():
    for shape in ((0, 8), (3, 0), (2, 0, 8)):
        x, weight = torch.ones(shape), torch.ones(shape[-1])
        out, normed, rstd = entry.residual_forward(x, x, dropout_of(0.1), weight, EPS, True)
        assert out.shape == normed.shape == shape and rstd.shape == shape[:-1]
        _, dy, dweight = entry.residual_backward(x, normed, out, weight, rstd, dropout_of(0.1), True, True)
        assert dy.shape == shape and not dweight.any() and dweight.shape == weight.shape
        assert entry.act_dropout_forward(x, x, "silu", dropout_of(0.1)).shape == shape
        assert [t.shape for t in entry.act_dropout_backward(x, x, x, "silu", NO_DROPOUT)] == [shape, shape]
    scores = torch.ones(2, 3, 4, 0)
    assert entry.softmax_dropout_backward(scores, scores, dropout_of(0.1)).shape == scores.shape
    assert entry.cross_entropy_forward(torch.ones(0, 5), torch.ones(0, dtype=torch.int64), 0.1, -100, True)[
        0
    ].shape == (0,)


def test_each_number_crosses_memory_once(_watched):
    """Inputs are read once, outputs written once, and of a mask nothing is stored."""
    x, weight, dropout = torch.randn(16, 768).bfloat16(), torch.ones(768), dropout_of(0.1)
    size = x.numel() * 2
    out, normed, rstd = entry.residual_forward(x, x.clone(), dropout, weight, EPS, True)
    (forward,) = _watched.launches
    assert forward.loaded["HIDDEN"] == forward.loaded["Y"] == forward.stored["OUT"] == size
    assert forward.stored.total() == size + 2 * size + 4 * 16
    entry.residual_backward(x, normed, out, weight, rstd, dropout, True, True)
    backward = _watched.launches[1]
    assert backward.loaded["G_OUT"] == backward.loaded["OUT"] == backward.stored["DY"] == size
    assert backward.loaded["G_NORMED"] == 2 * size
    scores = torch.randn(2, 3, 8, 64)
    before = len(_watched.launches)
    _, probabilities = entry.softmax_dropout_forward(scores, None, torch.zeros(2, 1, 1, 64), dropout, True)
    entry.softmax_dropout_backward(scores, probabilities, dropout)
    for launch, reads, writes in zip(_watched.launches[before:], (1, 2), (2, 1), strict=True):
        read = launch.loaded.total() - launch.loaded["MASK"] - launch.loaded["SEED"]
        assert read == reads * scores.nbytes and launch.stored.total() == writes * scores.nbytes
