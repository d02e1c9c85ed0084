"""The Triton kernels of an attention's softmax and of the loss, called as the backend calls them: values and gradients
beside float64, and every access within its tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.interpreted import DTYPES, assert_like_eager, dropout_of, mask_of, strided
from support.watch import watch

from hyperformer_fast.kernels import cross_entropy, entry, tiles
from hyperformer_fast.layout import NO_DROPOUT


@pytest.fixture(autouse=True)
def _watched():
    torch.manual_seed(0)
    with watch() as seen:
        yield seen


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


def test_a_whole_loss_reads_its_logits_twice(_watched):
    logits = torch.randn(3, 500)
    entry.cross_entropy_forward(logits, torch.tensor([1, 2, 3]), 0.1, -100, True)
    (launch,) = _watched.launches
    assert launch.kernel == cross_entropy.cross_entropy_kernel.__name__.removesuffix("_kernel")
    assert launch.loaded["LOGITS"] == 2 * logits.nbytes + 3 * 4 and launch.stored["DLOGITS"] == logits.nbytes
