"""The pieces between a T5's matrix products as Triton kernels, called as the backend calls them: values and gradients
beside float64, and every access within its tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.tolerance import assert_accurate
from support.watch import watch

from hyperformer_fast import philox, t5_reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.kernels import cross_entropy, entry, residual, tiles
from hyperformer_fast.layout import NO_DROPOUT, Dropout, normed_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


@pytest.fixture(autouse=True)
def _watched():
    torch.manual_seed(0)
    with watch() as seen:
        yield seen


def dropout_of(p: float, seed: int = 5, stream: int = 0) -> Dropout:
    return Dropout(p, torch.tensor([seed]), stream) if p else NO_DROPOUT


def mask_of(dropout: Dropout, shape) -> torch.Tensor:
    """What a dropout multiplies by, in float64."""
    if not dropout.p:
        return torch.ones(shape, dtype=torch.float64)
    return philox.kept(dropout, shape).double() * philox.scale(dropout.p)


def assert_like_eager(mine, function, inputs, gradients, dtype, names):
    """Outputs, then gradients of ``inputs``, beside ``function`` in float64 and in the inputs' own dtypes."""

    def run(convert):
        leaves = [convert(t).requires_grad_() for t in inputs]
        outputs = [out for out in function(*leaves) if out is not None]
        matching = [g.to(out.dtype) for g, out in zip(gradients, outputs)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, matching, allow_unused=True)]

    eager, truth = run(lambda t: t.clone()), run(lambda t: t.double())
    for name, k, e, t in zip(names, mine, eager, truth, strict=True):
        if t is None:
            assert not k.numel(), name
        else:
            assert_accurate(k, e, t.detach(), name, dtype=dtype)


# residual


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


def strided(shape, dtype, place):
    """A tensor whose rows are contiguous, or lie apart, or are one row, or are not contiguous."""
    *lead, n = shape
    if place == "apart":
        return torch.randn(*lead, n + 3).to(dtype)[..., 2 : n + 2]
    if place == "expanded":
        return torch.randn(n).to(dtype).expand(shape)
    if place == "transposed":
        return torch.randn(n, *lead).to(dtype).movedim(0, -1)
    return torch.randn(shape).to(dtype)


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


# act_dropout


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


# softmax_dropout

MASKS = {
    "none": lambda B, Q, K, dtype: None,
    "padding": lambda B, Q, K, dtype: lowest(torch.arange(K).expand(B, 1, 1, K) < K - 2, dtype),
    "causal": lambda B, Q, K, dtype: lowest(torch.ones(Q, K).tril(K - Q).bool().expand(B, 1, Q, K), dtype),
    "boolean": lambda B, Q, K, dtype: (torch.arange(K) != 1).expand(B, 1, 1, K),
    "one for all keys": lambda B, Q, K, dtype: torch.randn(B, 1, Q, 1).to(dtype),
    "float32": lambda B, Q, K, dtype: torch.randn(B, 1, Q, K),
}


def lowest(attended, dtype):
    """The additive mask of transformers."""
    return torch.zeros(attended.shape, dtype=dtype).masked_fill(~attended, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "shape"), list(zip(MASKS, itertools.cycle([(2, 3, 5, 16), (2, 2, 3, 21)]))))
def test_softmax(kind, shape, dtype):
    B, H, Q, K = shape
    dropout = dropout_of(0.2)
    scores, bias = torch.randn(shape).to(dtype), torch.randn(1, H, Q, K).to(dtype)
    mask = MASKS[kind](B, Q, K, dtype)
    out, probabilities = entry.softmax_dropout_forward(scores, bias, mask, dropout, True)
    g = torch.randn(B, Q, H, K).to(dtype).transpose(1, 2)
    dscores = entry.softmax_dropout_backward(g, probabilities, dropout)

    def function(scores):
        total = scores + bias.to(scores.dtype)
        if mask is not None:
            total = total.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else total + mask.to(total.dtype)
        plain = total.softmax(-1)
        return plain * mask_of(dropout, shape).to(scores.dtype), plain

    assert_like_eager(
        (out, probabilities, dscores), function, (scores,), (g, torch.zeros(shape)), dtype, ("out", "plain", "dscores")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_of_more_keys_than_a_tile_has(dtype, monkeypatch):
    monkeypatch.setattr(tiles, "whole_rows", lambda n, numbers=0: tiles.Tile(2, 16, 4))
    test_softmax("padding", (2, 2, 3, 45), dtype)
    test_softmax("boolean", (1, 1, 3, 33), dtype)


def test_softmax_of_scores_that_lie_apart(_watched):
    """Slices and a transposition, whose keys are copied only if they are not contiguous."""
    dropout = dropout_of(0.2)
    wide = torch.randn(2, 5, 3, 40)
    for scores in (wide.transpose(1, 2)[..., 8:24], wide[:, :3, :, ::2], wide[:1, :1, :1, :1]):
        mine = entry.softmax_dropout_forward(scores, None, None, dropout, True)
        plain = entry.softmax_dropout_forward(scores.contiguous(), None, None, dropout, True)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(mine, plain))


@pytest.mark.parametrize("columns", [32, 16])
def test_rows_with_nothing_to_attend_to(monkeypatch, columns):
    monkeypatch.setattr(tiles, "whole_rows", lambda n, numbers=0: tiles.Tile(2, columns, 4))
    scores = torch.randn(1, 2, 3, 20)
    for mask, expected in (
        (torch.zeros(1, 1, 1, 20, dtype=torch.bool), 0.0),
        (torch.full((1, 1, 1, 20), -torch.inf), 0.0),
        (torch.full((1, 1, 1, 20), torch.finfo(torch.float32).min), 0.05),
    ):
        out, probabilities = entry.softmax_dropout_forward(scores, None, mask, dropout_of(0.5), True)
        torch.testing.assert_close(probabilities, torch.full_like(scores, expected))
        dscores = entry.softmax_dropout_backward(torch.ones_like(scores), probabilities, dropout_of(0.5))
        assert dscores.isfinite().all() and (expected or not dscores.any())
    scores[0, 1, 2, 3] = torch.nan
    out, _ = entry.softmax_dropout_forward(scores, None, None, NO_DROPOUT, False)
    assert out[0, 1, 2].isnan().all() and out.isnan().sum() == 20


# dropout


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


# cross_entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "smoothing"), [(11, 0.0), (300, 0.1), (4099, 0.1)])
def test_cross_entropy(classes, smoothing, dtype):
    logits, labels = strided((6, classes), dtype, "apart") * 3, torch.randint(0, classes, (6,))
    labels[1], labels[2], labels[3] = -100, 0, classes - 1
    logits[1, 3] = torch.nan  # nobody asks an ignored row
    loss, dlogits = entry.cross_entropy_forward(logits, labels, smoothing, -100, True)
    assert loss[1] == 0 and not dlogits[1].any()
    alone, nothing = entry.cross_entropy_forward(logits, labels, smoothing, -100, False)
    assert torch.equal(alone, loss) and not nothing.numel()
    scored = labels >= 0

    def function(logits):
        exact = torch.promote_types(logits.dtype, torch.float32)
        each = F.cross_entropy(logits.to(exact), labels[scored], label_smoothing=smoothing, reduction="none")
        return (each.unsqueeze(-1),)

    assert_like_eager(
        (loss[scored].unsqueeze(-1), dlogits[scored]), function, (logits[scored],), (torch.ones(5, 1),), dtype,
        ("loss", "dlogits"),
    )  # fmt: skip


def test_labels_out_of_range_give_nan():
    logits = torch.randn(4, 20)
    labels = torch.tensor([20, -1, 3, 7])
    loss, dlogits = entry.cross_entropy_forward(logits, labels, 0.1, 7, True)
    assert loss.isnan().tolist() == [True, True, False, False]
    assert dlogits.isnan().all(1).tolist() == [True, True, False, False] and not dlogits[3].any()
    loss, _ = entry.cross_entropy_forward(logits[:, :0], labels, 0.1, 7, True)
    assert loss.isnan().tolist() == [True, True, True, False]


def test_classes_that_are_ruled_out(monkeypatch):
    """-inf costs nothing without smoothing, even as a whole tile; the rest is as without these classes."""
    monkeypatch.setattr(tiles, "cross_entropy", lambda classes: tiles.Tile(1, 16, 4))
    logits, labels = torch.randn(3, 50), torch.tensor([20, 33, 49])
    logits[:, :20] = -torch.inf
    loss, dlogits = entry.cross_entropy_forward(logits, labels, 0.0, -100, True)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 20:], labels - 20, reduction="none"))
    assert not dlogits[:, :20].any() and dlogits[:, 20:].isfinite().all()


# in general


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


def test_a_whole_loss_reads_its_logits_twice(_watched):
    logits = torch.randn(3, 500)
    entry.cross_entropy_forward(logits, torch.tensor([1, 2, 3]), 0.1, -100, True)
    (launch,) = _watched.launches
    assert launch.kernel == cross_entropy.cross_entropy_kernel.__name__.removesuffix("_kernel")
    assert launch.loaded["LOGITS"] == 2 * logits.nbytes + 3 * 4 and launch.stored["DLOGITS"] == logits.nbytes
