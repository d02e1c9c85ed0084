"""The pieces of a T5, on every backend that serves them on a CPU: shapes, dtypes, and gradients with a fixed mask.

test_pieces_masks.py: what a mask and a dropout make 0. test_pieces_attention.py: attention and the loss.
test_pieces_calls.py: what the public functions refuse, and which backend they call.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from support.cases import random_packed
from support.pieces import (
    ACT,
    BACKENDS,
    DTYPES,
    RESIDUAL,
    SOFTMAX,
    act_dropout_case,
    attention_case,
    check,
    dropout_of,
    dropped,
    residual_case,
    rms_norm_case,
    serves,
    softmax_case,
    use_or_skip,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hyperformer_fast import ops
from hyperformer_fast.layout import NO_DROPOUT, AdapterLayout

HALF = dropout_of(0.5)


@pytest.fixture(params=BACKENDS)
def use(request):
    """Choose a backend for the ops named, or skip."""
    return functools.partial(use_or_skip, request.param)


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


@pytest.mark.parametrize("backend", BACKENDS)
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
