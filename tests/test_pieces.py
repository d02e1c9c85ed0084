"""The pieces of a T5, on every backend that serves them on a CPU: edges, gradients with a fixed mask, and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.cases import random_packed
from support.pieces import (
    BACKENDS,
    DTYPES,
    act_dropout_case,
    attention_case,
    check,
    dropout_of,
    dropped,
    residual_case,
    rms_norm_case,
    serves,
    softmax_case,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hyperformer_fast import backends, ops, philox, t5_reference
from hyperformer_fast.backends.base import ADAPTER_OPS
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.layout import NO_DROPOUT, AdapterLayout, Dropout

every_backend = pytest.mark.parametrize("backend", BACKENDS)
HALF = dropout_of(0.5)


@pytest.fixture(params=BACKENDS)
def use(request):
    """Choose a backend for the ops named, or skip."""

    def choose(*names, dtype=torch.float32):
        for op in names:
            if backends.explain(op, dtype=dtype, impl=request.param).chosen != request.param:
                pytest.skip(f"backend {request.param} has no kernels for {op} here")
        return backends.use_backend(request.param)

    return choose


RESIDUAL = ("residual_forward", "residual_backward")
ACT = ("act_dropout_forward", "act_dropout_backward")
SOFTMAX = ("softmax_dropout_forward", "softmax_dropout_backward")
ATTENTION = ("attention_forward", "attention_backward")


@pytest.mark.parametrize("of_weight", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
def test_the_norm_is_t5s(use, of_x, of_weight):
    """Values and dtypes are those of transformers' T5LayerNorm, but for the rounding of four operations."""
    norm = T5LayerNorm(24)
    with torch.no_grad():
        norm.weight.normal_()
    norm.to(of_weight)
    x = torch.randn(3, 5, 24).to(of_x)
    with use("residual_forward", dtype=of_x):
        mine, theirs = ops.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
        out, normed = ops.residual(x, x, NO_DROPOUT, norm.weight)
    assert mine.dtype == normed.dtype == theirs.dtype
    eps = torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(mine, theirs, rtol=4 * eps, atol=0)
    assert torch.equal(out, x + x)
    torch.testing.assert_close(normed, norm(x + x), rtol=4 * eps, atol=0)


@pytest.mark.parametrize(
    "shape", [(0, 8), (2, 0, 8), (8,), (1, 8), (2, 1, 3, 8), (3, 0), (1,), (5, 1), (2, 2, 2, 2, 9)]
)
def test_any_shape(use, shape):
    """The mask's rows are the leading dimensions, flattened; and nothing is read where there is nothing."""
    flat = (-1, shape[-1]) if 0 not in shape else shape
    with use(*RESIDUAL, *ACT):
        leaves = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        weight = torch.randn(shape[-1], requires_grad=True)
        results = []
        for view in (shape, flat):
            hidden, y = (t.reshape(view) for t in leaves)
            out, normed = ops.residual(hidden, y, HALF, weight)
            acted = ops.act_dropout(y, "gelu_new", hidden, HALF)
            total = out.sum() + normed.square().sum() + acted.sum() + ops.rms_norm(y, weight).sum()
            gradients = torch.autograd.grad(total, (*leaves, weight))
            results.append([t.reshape(shape) for t in (out, normed, acted)] + list(gradients))
    for mine, of_flat in zip(*results):
        assert mine.shape == of_flat.shape and torch.equal(mine, of_flat)
    assert results[0][0].shape == results[0][3].shape == shape
    if 0 in shape:
        assert not results[0][-1].any()


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


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_whoever_needs_no_gradient_gets_none(use, p):
    """Each subset of the inputs alone, against the gradients of all."""
    dropout = dropout_of(p)
    calls = {
        "residual": (RESIDUAL, lambda h, y, w: sum(t.square().sum() for t in ops.residual(h, y, dropout, w))),
        "only out": (RESIDUAL, lambda h, y, w: ops.residual(h, y, dropout, w)[0].square().sum()),
        "only normed": (RESIDUAL, lambda h, y, w: ops.residual(h, y, dropout, w)[1].pow(3).sum()),
        "gated": (ACT, lambda h, y, w: ops.act_dropout(h, "gelu_new", y, dropout).square().sum() + 0 * w.sum()),
    }
    leaves = [torch.randn(3, 4, 9), torch.randn(3, 4, 9), torch.randn(9)]
    for names, call in calls.values():
        with use(*names):
            everything = [t.clone().requires_grad_() for t in leaves]
            expected = torch.autograd.grad(call(*everything), everything, materialize_grads=True)
            for needs in itertools.product([False, True], repeat=3):
                mine = [t.clone().requires_grad_(need) for t, need in zip(leaves, needs)]
                out = call(*mine)
                wanted = [t for t in mine if t.requires_grad]
                if not out.requires_grad:
                    continue
                found = iter(torch.autograd.grad(out, wanted, materialize_grads=True))
                assert all(torch.equal(next(found), e) for e, need in zip(expected, needs) if need)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("with_norm", [False, True])
def test_gradients_that_are_equal_are_two_tensors(use, p, with_norm):
    """Without dropout hidden and y have one gradient: where they are leaves, each keeps its own."""
    leaves = [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
    with use(*RESIDUAL):
        out = ops.residual(*leaves, dropout_of(p), torch.ones(8) if with_norm else None)
        sum(t.square().sum() for t in (out if with_norm else [out])).backward()
    a, b = (t.grad for t in leaves)
    before = b.clone()
    a.zero_()
    assert torch.equal(b, before) and b.any()


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


def test_a_mask_that_is_trained_gets_its_gradient(use):
    with use(*SOFTMAX):
        scores, bias, mask = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5), torch.randn(2, 1, 1, 5, requires_grad=True)
        for b in (None, bias):
            total = scores + mask if b is None else scores + b + mask
            (expected,) = torch.autograd.grad(torch.softmax(total, -1).square().sum(), mask)
            (mine,) = torch.autograd.grad(ops.softmax_dropout(scores, b, mask).square().sum(), mask)
            torch.testing.assert_close(mine, expected)


def test_mixed_dtypes_are_promoted(use):
    """As under autocast: a float32 residual stream, and a bfloat16 sublayer."""
    with use(*RESIDUAL, *ACT):
        hidden = torch.randn(3, 16, requires_grad=True)
        y = torch.randn(3, 16).bfloat16().requires_grad_()
        out = ops.residual(hidden, y, HALF)
        assert out.dtype == torch.float32 and torch.equal(out, hidden + dropped(y.float(), HALF))
        dhidden, dy = torch.autograd.grad(out.sum(), (hidden, y))
        assert dhidden.dtype == torch.float32 and dy.dtype == torch.bfloat16
        assert ops.act_dropout(hidden, "relu", y).dtype == torch.float32


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


def test_bits_do_not_depend_on_threads(use):
    before = torch.get_num_threads()
    hidden, y, weight = (torch.randn(2, 700, 96), torch.randn(2, 700, 96), torch.randn(96))
    q = torch.randn(4, 3, 65, 16)
    results = []
    with use(*RESIDUAL, *ACT, *SOFTMAX):
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaves = [t.clone().requires_grad_() for t in (hidden, y, weight)]
                out, normed = ops.residual(*leaves[:2], HALF, leaves[2])
                acted = ops.act_dropout(leaves[0], "gelu_new", leaves[1], HALF)
                total = out.square().sum(-1).mean() + normed.pow(3).sum(-1).mean() + acted.sum(-1).mean()
                weights = ops.softmax_dropout(q, None, None, HALF)
                results.append([out, normed, acted, weights, *torch.autograd.grad(total, leaves)])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


DOUBLE = {
    "residual": lambda h, y, w: ops.residual(h, y, HALF, w),
    "residual without a norm": lambda h, y, w: ops.residual(h, y, HALF),
    "rms_norm": lambda h, y, w: ops.rms_norm(y, w),
    "act_dropout": lambda h, y, w: ops.act_dropout(h, "gelu_new", y, HALF),
    "softmax_dropout": lambda h, y, w: ops.softmax_dropout(h[None], y[:1], None, HALF),
    "attention": lambda h, y, w: ops.attention(h[None], y[None], y[None] + w, h[:, :, :3], None, 0.7, HALF),
    "cross_entropy": lambda h, y, w: ops.cross_entropy_rows(h[0], torch.tensor([1, -100, 4]), 0.1),
}


@pytest.mark.parametrize("piece", DOUBLE)
def test_gradcheck_with_a_fixed_mask(piece):
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (2, 3, 5), (5,))]
    assert torch.autograd.gradcheck(DOUBLE[piece], leaves)


@pytest.mark.parametrize("piece", DOUBLE)
def test_second_derivatives_are_refused(piece):
    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 3, 5), (2, 3, 5), (5,))]
    out = DOUBLE[piece](*leaves)
    total = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
    with pytest.raises(RuntimeError, match="ops.* has no second derivative.*t5_reference"):
        torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("task_index", [None, torch.tensor([1, -1, 0])], ids=["one task", "several"])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_residual_is_its_parts(use, task_index, with_norm, dtype):
    layout = AdapterLayout(24, 6)
    packed = random_packed(layout, 1 if task_index is None else 2).float()
    leaves = [torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 24).to(dtype), packed, torch.randn(24)]

    def parts(hidden, y, packed, weight):
        adapted = ops.adapter(y, packed, layout, "gelu_new", None, task_index)
        return ops.residual(hidden, adapted, HALF, weight if with_norm else None)

    def whole(hidden, y, packed, weight):
        norm = weight if with_norm else None
        return ops.adapter_residual(hidden, y, packed, layout, "gelu_new", None, task_index, HALF, norm)

    def run(call):
        mine = [t.clone().requires_grad_() for t in leaves]
        out = call(*mine)
        out = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(out, mine, [torch.ones_like(t) for t in out], materialize_grads=True)
        with torch.no_grad():
            again = call(*mine)
        assert all(map(torch.equal, again if isinstance(again, tuple) else (again,), out))
        return [*out, *gradients]

    stack = ops.Stack(packed.unsqueeze(0), layout, "gelu_new")
    with use("adapter_residual_forward", "residual_backward", "adapter_forward"):
        torch._dynamo.reset()
        expected = run(parts)
        for call in (whole, torch.compile(whole, fullgraph=True, backend="aot_eager")):
            for mine, theirs in zip(run(call), expected):
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(mine, theirs, rtol=4 * eps, atol=8 * eps * theirs.abs().max().item())
        out = stack.adapter_residual(leaves[1], leaves[0], 0, task_index, HALF, leaves[3] if with_norm else None)
    for mine, theirs in zip(out if isinstance(out, tuple) else (out,), expected):
        torch.testing.assert_close(mine, theirs, rtol=4 * eps, atol=8 * eps * theirs.abs().max().item())


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


def test_a_label_out_of_range_where_nobody_looks_is_nan():
    """On a GPU labels are not read by the host."""
    logits, labels = torch.randn(4, 7), torch.tensor([0, 7, -100, -1])
    loss, gradient = t5_reference.cross_entropy_forward(logits, labels, 0.0, -100, True)
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, False, True]
    assert loss[2] == 0 and not gradient[2].any()


@every_backend
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


def test_what_a_backward_keeps():
    """No mask, and no copy: of a residual the sum, its statistics and the seed; of an activation its inputs."""
    hidden, y = (torch.randn(5, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, _ = ops.residual(hidden, y, HALF, weight)
        assert sorted(tuple(t.shape) for t in kept) == [(1,), (5,), (5, 16), (16,)]
        kept.clear()
        ops.residual(hidden, y, HALF)
        assert [tuple(t.shape) for t in kept] == [(1,)]
        kept.clear()
        ops.act_dropout(hidden, "gelu_new", y, HALF)
        assert [t.data_ptr() for t in kept] == [hidden.data_ptr(), y.data_ptr(), HALF.seed.data_ptr()]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors(backend, dtype):
    """More rows than a block, more columns than a tile."""
    x = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    dropout = dropout_of(0.1)
    q, k, v = x(2, 2, 70, 32) * 0.2, x(2, 2, 130, 32), x(2, 2, 130, 32)
    for case in (
        residual_case(x(3, 67, 520), x(3, 67, 520), torch.randn(520).to(dtype), dropout),
        rms_norm_case(x(201, 1030), torch.randn(1030)),
        act_dropout_case(x(201, 520), x(201, 520), "gelu_new", dropout),
        softmax_case(x(2, 2, 33, 300), x(1, 2, 33, 300), None, dropout),
        attention_case(q, k, v, None, None, 1.0, dropout),
    ):
        if serves(backend, case, dtype):
            check(case, dtype, backend)
