"""What a mask and a dropout make 0, on every backend that serves the pieces of a T5 on a CPU."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from support.pieces import ACT, ATTENTION, BACKENDS, DTYPES, RESIDUAL, SOFTMAX, dropout_of, use_or_skip
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperformer_fast import backends, ops, philox

HALF = dropout_of(0.5)


@pytest.fixture(params=BACKENDS)
def use(request):
    """Choose a backend for the ops named, or skip."""
    return functools.partial(use_or_skip, request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_is_zero_whatever_was_there(use, dtype):
    """NaN and infinity that are dropped are 0, forward and backward, also with p = 1."""
    with use(*RESIDUAL, *ACT, dtype=dtype):
        kept = philox.kept(HALF, (4, 24))
        bad = torch.where(kept, 1.0, torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(4, 8)).to(dtype)
        y, hidden = bad.clone().requires_grad_(), torch.zeros(4, 24, dtype=dtype)
        out = ops.residual(hidden, y, HALF)
        assert torch.equal(out, torch.where(kept, 2.0, 0.0).to(dtype))
        (dy,) = torch.autograd.grad(out, y, bad)
        assert torch.equal(dy, torch.where(kept, 2.0, 0.0).to(dtype))
        out = ops.act_dropout(y, "relu", None, HALF)
        assert torch.equal(out, torch.where(kept, 2.0, 0.0).to(dtype))
        (dy,) = torch.autograd.grad(out, y, bad)
        assert torch.equal(dy, torch.where(kept, 2.0, 0.0).to(dtype))
        everything = torch.full((4, 24), torch.nan, dtype=dtype, requires_grad=True)
        out = ops.residual(hidden, everything, dropout_of(1.0))
        assert not out.any() and not torch.autograd.grad(out.sum(), everything)[0].any()


def test_a_nan_that_is_kept_stays(use):
    with use("residual_forward", "act_dropout_forward"):
        x = torch.randn(3, 16)
        x[1, 4] = torch.nan
        assert ops.rms_norm(x, torch.ones(16))[1].isnan().all()
        assert ops.residual(x, x).isnan().sum() == ops.act_dropout(x, "relu").isnan().sum() == 1


def closed_masks(dtype):
    """Masks that leave nothing for the second of three queries, and the first two keys for the others."""
    attend = torch.tensor([[True, True, False], [False] * 3, [True, True, False]])
    additive = torch.zeros(3, 3, dtype=dtype)
    return {
        "bool": attend,
        "-inf": additive.masked_fill(~attend, -torch.inf),
        "lowest": additive.masked_fill(~attend, torch.finfo(dtype).min),
    }


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_masked_out_wholly(use, kind, dtype):
    """They give what PyTorch's scaled_dot_product_attention gives: 0 for bool and -inf, the mean for the least number.

    PyTorch's kernel for the CPU has another gradient for the last of these: it recomputes the probabilities from a sum
    in which the least number swallowed their count. So its plain implementation is the truth here.
    """
    mask = closed_masks(dtype)[kind]
    q, k, v = (torch.randn(2, 2, 3, 8).to(dtype).requires_grad_() for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    g = torch.randn_like(theirs)
    expected = [theirs, *torch.autograd.grad(theirs, (q, k, v), g)]
    with use(*ATTENTION, *SOFTMAX, dtype=dtype):
        out = ops.attention(q, k, v, None, mask)
        found = [out, *torch.autograd.grad(out, (q, k, v), g)]
        weights = ops.softmax_dropout((q @ k.mT).detach(), None, mask)
    for mine, e in zip(found, expected):
        torch.testing.assert_close(
            mine, e, rtol=0, atol=(1e-5 if dtype == torch.float32 else 6e-2) * e.abs().max().item()
        )
    closed = weights[:, :, 1]
    assert torch.equal(closed, torch.full_like(closed, 1 / 3 if kind == "lowest" else 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_the_same_everywhere(dtype):
    """Bit for bit, on every backend, whatever the strides; and those of the backward are those of the forward."""
    shape = (3, 37, 53)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    turned = torch.ones(tuple(reversed(shape)), dtype=dtype).permute(2, 1, 0).requires_grad_()
    dropout = dropout_of(0.3, -12345678901234567, 9)
    expected = philox.kept(dropout, shape)
    for backend in BACKENDS:
        if not backends.registry.get(backend).availability():
            continue
        with backends.use_backend(backend):
            for t in (x, turned):
                for out in (
                    ops.act_dropout(t, "relu", None, dropout),
                    ops.act_dropout(t, "relu", t, dropout),
                    ops.residual(torch.zeros_like(t), t, dropout),
                    ops.softmax_dropout(t.unsqueeze(0), None, None, dropout).squeeze(0),
                ):
                    assert torch.equal(out != 0, expected)
                    if not out.requires_grad:
                        continue
                    (g,) = torch.autograd.grad(out, t, torch.ones_like(out))
                    assert (
                        torch.equal(g != 0, expected) or "Softmax" in str(out.grad_fn) or "Squeeze" in str(out.grad_fn)
                    )
