"""Calls of the public functions of a T5's pieces: what they refuse, and which backend serves them."""

from __future__ import annotations

import pytest
import torch
from support.cases import random_packed
from support.pieces import dropout_of

from hyperformer_fast import backends, ops
from hyperformer_fast.backends.base import ADAPTER_OPS
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.layout import NO_DROPOUT, AdapterLayout, Dropout

HALF = dropout_of(0.5)

X, W = torch.zeros(2, 8), torch.ones(8)
S, Q = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 8)
REFUSED = {
    "hidden must have the shape": lambda: ops.residual(X[:1], X),
    "y must be of a floating dtype": lambda: ops.residual(X.long(), X.long()),
    r"y must be \[..., n\], got a scalar": lambda: ops.residual(X[0, 0], X[0, 0]),
    "weight must be .8., the last": lambda: ops.residual(X, X, NO_DROPOUT, W[1:]),
    "weight must be .8., the last dimension of x": lambda: ops.rms_norm(X, W[:1]),
    "weight must be of a floating dtype": lambda: ops.rms_norm(X, W.long()),
    "weight must be on the device": lambda: ops.rms_norm(X, W.to("meta")),
    "seed must be on the device": lambda: ops.residual(X, X, Dropout(0.5, torch.zeros(1).long().to("meta"), 0)),
    "needs a seed: make it with": lambda: ops.residual(X, X, Dropout(0.5, None, 0)),
    r"seed must be int64 \[1\]": lambda: ops.residual(X, X, Dropout(0.5, torch.zeros(1), 0)),
    "stream must be a 64-bit integer": lambda: ops.residual(X, X, Dropout(0.5, torch.zeros(1).long(), 2**63)),
    "p must be from 0 to 1": lambda: ops.residual(X, X, Dropout(-0.5, torch.zeros(1).long(), 0)),
    "c must have the shape": lambda: ops.act_dropout(X, "relu", X[:1]),
    "activation must be one of": lambda: ops.act_dropout(X, "tanh"),
    r"scores must be \[B, H, Lq, Lk\]": lambda: ops.softmax_dropout(S[0]),
    "bias must be one that can be broadcast": lambda: ops.softmax_dropout(S, S[..., :2]),
    "bias must be of a floating dtype": lambda: ops.softmax_dropout(S, S.long()),
    "mask must be bool or of a floating": lambda: ops.softmax_dropout(S, None, S.long()),
    "mask must be one that can be broadcast": lambda: ops.softmax_dropout(S, None, torch.zeros(1, 1, 1, 1, 5)),
    "k must have q's dtype": lambda: ops.attention(Q, Q.double(), Q),
    "k must have q's batch and heads": lambda: ops.attention(Q, Q[:1], Q),
    "k must have q's width": lambda: ops.attention(Q, Q[..., :2], Q),
    "v must have k's length": lambda: ops.attention(Q, Q, Q[:, :, :2]),
    r"q must be \[B, H, Lq, dk\]": lambda: ops.attention(Q[0], Q, Q),
    r"logits must be \[N, V\]": lambda: ops.cross_entropy_rows(Q, torch.zeros(2).long()),
    r"labels must be \[2\]": lambda: ops.cross_entropy_rows(X, torch.zeros(3).long()),
    "labels must be int64": lambda: ops.cross_entropy_rows(X, torch.zeros(2)),
    "labels must be from 0 to 7, or -100 .ignored., got 8": lambda: ops.cross_entropy_rows(X, torch.tensor([8, 0])),
    "labels must be from 0 to 7, or -100 .ignored., got -1": lambda: ops.cross_entropy_rows(X, torch.tensor([-1, 0])),
    "label_smoothing must be from 0 to 1": lambda: ops.cross_entropy_rows(X, torch.zeros(2).long(), 1.5),
    "impl: backend must be one of": lambda: ops.rms_norm(X, W, impl="none"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_too_many_rows_are_refused():
    x = torch.zeros(1, 1).expand(2**32, 1)
    with pytest.raises(ValueError, match="at most 4294967295 rows, got y with 4294967296"):
        ops.residual(x, x, HALF)


def test_a_backend_without_kernels_for_the_pieces_leaves_them_to_others():
    class AdaptersOnly(ReferenceBackend):
        name, serves = "adapters-only", ("adapter_forward",)

    backends.register(AdaptersOnly())
    try:
        with backends.use_backend("adapters-only"):
            assert torch.equal(ops.rms_norm(X, W), X)
            assert "adapters-only" not in (backends.explain("residual_forward").chosen, backends.explain("fold"))
            with pytest.raises(backends.BackendError, match="cannot serve residual_forward: it has kernels for"):
                ops.rms_norm(X, W, impl="adapters-only")
    finally:
        backends.unregister("adapters-only")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("serves", ["adapters", "all"])
def test_the_residual_follows_the_adapter_where_it_can(compiled, serves):
    called = []

    class Named(ReferenceBackend):
        name = "named"

        def adapter_forward(self, *args):
            called.append("adapter")
            return super().adapter_forward(*args)

        def residual_forward(self, *args):
            called.append("residual")
            return super().residual_forward(*args)

        def residual_backward(self, *args):
            called.append("residual's backward")
            return super().residual_backward(*args)

    if serves == "adapters":
        Named.serves = ADAPTER_OPS
    layout = AdapterLayout(24, 6)
    packed, weight = random_packed(layout).float().requires_grad_(), torch.randn(24)
    hidden, y = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 3, 24, requires_grad=True)

    def run(impl):
        call = lambda hidden, y: ops.adapter_residual(  # noqa: E731
            hidden, y, packed, layout, "gelu_new", dropout=HALF, weight=weight, impl=impl
        )
        torch._dynamo.reset()
        out, normed = (torch.compile(call, backend="aot_eager") if compiled else call)(hidden, y)
        return torch.autograd.grad((out * normed).sum(), (hidden, y, packed))

    backends.register(Named())
    try:
        for mine, theirs in zip(run("named"), run("reference")):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    finally:
        backends.unregister("named")
    assert set(called) == ({"adapter"} if serves == "adapters" else {"adapter", "residual", "residual's backward"})
