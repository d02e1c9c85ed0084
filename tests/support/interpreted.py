"""What the tests of the Triton kernels of a T5's pieces share (tests/interpreted/test_pieces*.py)."""

from __future__ import annotations

import torch

from hyperformer_fast import philox
from hyperformer_fast.layout import NO_DROPOUT, Dropout
from support.tolerance import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


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
