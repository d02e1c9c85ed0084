"""The Triton kernels of sums, norms and their gradients, called as the backend calls them: values and gradients beside
float64, and every access within its tensor."""

from __future__ import annotations

import pytest
import torch
from support.interpreted import DTYPES, EPS, assert_like_eager, dropout_of, mask_of, strided
from support.watch import watch

from hyperformer_fast import t5_reference
from hyperformer_fast.kernels import entry, residual, tiles
from hyperformer_fast.layout import NO_DROPOUT, normed_dtype


@pytest.fixture(autouse=True)
def _watched():
    torch.manual_seed(0)
    with watch() as seen:
        yield seen


def eager_residual(mask, norm):
    def function(hidden, y, weight):
        out = hidden + y * mask.to(y.dtype)
        if not norm:
            return (out,)
        exact = torch.float64 if out.dtype == torch.float64 else torch.float32
        normed = out * torch.rsqrt(out.to(exact).square().mean(-1, keepdim=True) + EPS)
        half = weight.dtype in (torch.bfloat16, torch.float16)
        return out, weight * (normed.to(weight.dtype) if half else normed)

    return function


CASES = [
    # shape, dtype, dtype of the weight, p, places of hidden and y
    ((3, 5, 40), torch.float32, torch.float32, 0.1, ("", "apart")),
    ((3, 5, 40), torch.bfloat16, torch.bfloat16, 0.5, ("apart", "expanded")),
    ((3, 5, 40), torch.float16, torch.float32, 0.1, ("transposed", "")),
    ((2, 768), torch.bfloat16, torch.float32, 0.1, ("", "")),
    ((7, 13), torch.bfloat16, torch.float16, 0.0, ("", "")),
    ((5,), torch.float32, torch.bfloat16, 0.3, ("", "")),
    ((3, 1, 1), torch.float32, torch.float32, 0.0, ("", "")),
]


@pytest.mark.parametrize(("shape", "dtype", "weights", "p", "places"), CASES, ids=str)
def test_sum_and_norm(shape, dtype, weights, p, places):
    dropout = dropout_of(p)
    hidden, y = (strided(shape, dtype, place) for place in places)
    weight = (1 + 0.3 * torch.randn(shape[-1])).to(weights)
    out, normed, rstd = entry.residual_forward(hidden, y, dropout, weight, EPS, True)
    assert out.dtype == dtype and normed.dtype == normed_dtype(dtype, weights) and rstd.shape == shape[:-1]
    g_out, g_normed = torch.randn(shape).to(dtype), torch.randn(shape).to(normed.dtype)
    dhidden, dy, dweight = entry.residual_backward(g_out, g_normed, out, weight, rstd, dropout, True, True)
    assert dweight.dtype == weights and dy.numel() == (dhidden.numel() if p else 0)
    coarsest = max((dtype, normed.dtype), key=lambda d: torch.finfo(d).eps)
    assert_like_eager(
        (out, normed, dhidden, dy if p else dhidden, dweight), eager_residual(mask_of(dropout, shape), True),
        (hidden, y, weight), (g_out, g_normed), coarsest, ("out", "normed", "dhidden", "dy", "dweight"),
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "p"), [(torch.bfloat16, 0.1), (torch.float32, 0.0)], ids=str)
def test_rows_of_several_tiles(monkeypatch, dtype, p):
    monkeypatch.setattr(tiles, "whole_rows", lambda n, numbers=0: tiles.Tile(4, 16, 4))
    test_sum_and_norm((7, 45), dtype, torch.float32, p, ("apart", ""))


@pytest.mark.parametrize("n", [1, 16, 768, 2049, tiles.MOST_KEPT, tiles.MOST_KEPT + 1, 10**5])
def test_tiles_of_whole_rows(n):
    tile = tiles.whole_rows(n)
    assert (tile.BK >= n) == (n <= tiles.MOST_KEPT) and tile.BM * tile.BK <= 32 * 16 * tile.warps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_alone(dtype):
    shape, dropout = (4, 3, 24), dropout_of(0.25)
    hidden, y, g = (torch.randn(shape).to(dtype) for _ in range(3))
    out, normed, rstd = entry.residual_forward(hidden, y, dropout, None, EPS, True)
    assert not normed.numel() and not rstd.numel()
    dhidden, dy, dweight = entry.residual_backward(g, None, None, None, None, dropout, True, False)
    assert not dhidden.numel() and not dweight.numel()
    function, inputs = eager_residual(mask_of(dropout, shape), False), (hidden, y, torch.ones(24))
    assert_like_eager((out, g, dy, g[:0]), function, inputs, (g,), dtype, ("out", "dhidden", "dy", "dweight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["last norm", "stream goes on"])
def test_norm_alone(dtype, stream):
    shape = 3, 2, 33
    y, weight = torch.randn(shape).to(dtype), torch.randn(33)
    out, normed, rstd = entry.residual_forward(None, y, NO_DROPOUT, weight, EPS, True)
    assert not out.numel()
    g_normed, g_out = torch.randn(shape), torch.randn(shape).to(dtype) if stream else None
    dhidden, dy, dweight = entry.residual_backward(g_out, g_normed, y, weight, rstd, NO_DROPOUT, True, True)
    assert not dy.numel()

    def function(y, weight):
        return (*((y * 1,) if stream else ()), eager_residual(torch.zeros(shape), True)(y, y.detach(), weight)[1])

    outputs, gradients = ((y, normed), (g_out, g_normed)) if stream else ((normed,), (g_normed,))
    names = ("out", "normed", "dhidden", "dweight")[2 - len(outputs) :]
    assert_like_eager((*outputs, dhidden, dweight), function, (y, weight), gradients, dtype, names)


@pytest.mark.parametrize("stretches", [1, 3, 7])
def test_the_weights_gradient_in_stretches(monkeypatch, stretches):
    """The stretches end within a tile, and some programs' last tiles have no rows."""
    monkeypatch.setattr(residual, "_STRETCHES", stretches)
    monkeypatch.setattr(tiles, "whole_rows", lambda n, numbers=0: tiles.Tile(4, 64, 4))
    out, weight, g = torch.randn(50, 40), torch.randn(40), torch.randn(50, 40)
    rstd = torch.rsqrt(out.square().mean(-1) + EPS)
    first, second = (entry.residual_backward(None, g, out, weight, rstd, NO_DROPOUT, False, True) for _ in range(2))
    truth = t5_reference.residual_backward(None, *(t.double() for t in (g, out, weight, rstd)), NO_DROPOUT, False, True)
    for mine, again, exact in zip(first, second, truth):
        assert torch.equal(mine, again)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_long_sum_of_parts(_watched, monkeypatch):
    """More parts than a program of ``sum_parts_kernel`` adds at a time."""
    out = torch.randn(200, 24)
    monkeypatch.setattr(tiles, "whole_rows", lambda n, numbers=0: tiles.Tile(1, 32, 4))
    dweight = entry.residual_backward(None, out, out, torch.ones(24), torch.ones(200), NO_DROPOUT, False, True)[2]
    assert _watched.launches[-1].kernel == "sum_parts"
    torch.testing.assert_close(dweight, out.square().sum(0), rtol=1e-6, atol=0)
