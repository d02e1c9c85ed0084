"""Attention and the loss, on every backend that serves them on a CPU: shapes and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from support.pieces import ATTENTION, BACKENDS, SOFTMAX, attention, cross_entropy, dropout_of, softmax, use_or_skip

from hyperformer_fast import backends, ops, t5_reference
from hyperformer_fast.layout import NO_DROPOUT

HALF = dropout_of(0.5)


@pytest.fixture(params=BACKENDS)
def use(request):
    """Choose a backend for the ops named, or skip."""
    return functools.partial(use_or_skip, request.param)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 1, 1, 1)])
def test_attention_of_any_shape(use, shape):
    B, H, Lq, Lk = shape
    with use(*SOFTMAX, *ATTENTION):
        scores = torch.randn(shape, requires_grad=True)
        out = ops.softmax_dropout(scores, torch.zeros(H, Lq, Lk), None, HALF)
        (gradient,) = torch.autograd.grad(out.sum(), scores)
        assert out.shape == gradient.shape == shape
        q, k, v = (torch.randn(B, H, L, 8, requires_grad=True) for L in (Lq, Lk, Lk))
        out = ops.attention(q, k, v, None, None, 1.0, HALF)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and [g.shape for g in gradients] == [t.shape for t in (q, k, v)]
    if Lk == 0:
        assert not out.any() and not gradients[0].any()


def test_a_mask_that_is_trained_gets_its_gradient(use):
    with use(*SOFTMAX):
        scores, bias, mask = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5), torch.randn(2, 1, 1, 5, requires_grad=True)
        for b in (None, bias):
            total = scores + mask if b is None else scores + b + mask
            (expected,) = torch.autograd.grad(torch.softmax(total, -1).square().sum(), mask)
            (mine,) = torch.autograd.grad(ops.softmax_dropout(scores, b, mask).square().sum(), mask)
            torch.testing.assert_close(mine, expected)


def test_a_label_out_of_range_where_nobody_looks_is_nan():
    """On a GPU labels are not read by the host."""
    logits, labels = torch.randn(4, 7), torch.tensor([0, 7, -100, -1])
    loss, gradient = t5_reference.cross_entropy_forward(logits, labels, 0.0, -100, True)
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, False, True]
    assert loss[2] == 0 and not gradient[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_scaled_loss(backend, compiled):
    """It is larger than float16 has numbers, but what becomes of the logits is not."""
    labels, g = torch.tensor([1, -100, 3]), torch.full((3,), 1e5)
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 8.0]])
    half = logits.half().requires_grad_()
    rows = torch.compile(ops.cross_entropy_rows, backend="aot_eager") if compiled else ops.cross_entropy_rows
    with backends.use_backend(backend):
        (mine,) = torch.autograd.grad(rows(half, labels), half, g)
    wide = logits.requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(wide, labels, reduction="none"), wide, g)
    assert torch.allclose(mine.float(), truth, rtol=2e-3)


def gradients_beside_float64(mine, plain, leaves, g):
    """The gradients of both, those of ``plain`` in float64, and their errors relative to the row's largest number."""
    found = []
    for call, dtype in ((mine, torch.float32), (plain, torch.float64)):
        wide = [t.detach().to(dtype).requires_grad_() for t in leaves]
        found.append(torch.autograd.grad(call(*wide), wide, g.to(dtype)))
    for one, truth in zip(*found):
        error = (one - truth).abs().amax(-1) / truth.abs().amax(-1)
        assert error.max() < 1e-5, error


#: Scores of which one dominates, by little and by so much that its probability is 1 in float32.
DOMINATED = torch.tensor([[0.0, -9.0, -9.5, -11.0, -12.0], [-17.0, -18.5, 0.0, -19.0, -21.0]]).view(1, 1, 2, 5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_softmaxs_gradient_does_not_cancel(use, p):
    """Where one probability is nearly 1, and where the gradients that come in are nearly equal."""
    g, dropout = torch.randn(1, 1, 2, 5), dropout_of(p)
    with use(*SOFTMAX):
        mine = lambda scores: ops.softmax_dropout(scores, dropout=dropout)  # noqa: E731
        plain = lambda scores: softmax(scores, None, None, dropout)  # noqa: E731
        gradients_beside_float64(mine, plain, [DOMINATED], g)
    with use(*SOFTMAX):
        mine = lambda scores: ops.softmax_dropout(scores)  # noqa: E731
        plain = lambda scores: softmax(scores, None, None, NO_DROPOUT)  # noqa: E731
        gradients_beside_float64(mine, plain, [torch.randn(1, 1, 2, 5)], 1000 + g / 64)


def test_the_attentions_gradients_do_not_cancel(use):
    q, k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2), DOMINATED.mT.contiguous()
    v, g = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 2, 8)
    with use(*ATTENTION):
        mine = lambda q, k: ops.attention(q, k, v)  # noqa: E731
        plain = lambda q, k: attention(q, k, v.double(), None, None, 1.0, NO_DROPOUT)  # noqa: E731
        gradients_beside_float64(mine, plain, [q, k], g)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_losss_gradient_does_not_cancel(use, smoothing):
    """A label whose probability is nearly 1."""
    logits, labels = DOMINATED.view(2, 5), torch.tensor([0, 2])
    with use("cross_entropy_forward"):
        mine = lambda logits: ops.cross_entropy_rows(logits, labels, smoothing)  # noqa: E731
        plain = lambda logits: cross_entropy(logits, labels, smoothing)  # noqa: E731
        gradients_beside_float64(mine, plain, [logits], torch.ones(2))
