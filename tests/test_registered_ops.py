"""The registered ops: PyTorch's checks of schema, fake kernel and autograd; compilation; what is kept, and refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import random_packed
from test_ops import DTYPES, NORMS, op_arguments, static

from hyperformer_fast import ops
from hyperformer_fast.layout import AdapterLayout


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck_adapter(pre, post, mixed):
    layout = AdapterLayout(13, 4, pre, post)
    x, packed, folded, index = op_arguments(layout, mixed=mixed)
    forward = torch.ops.hyperformer_fast.adapter_forward.default
    torch.library.opcheck(forward, (x, packed, *folded, index, *static(layout), True))
    torch.library.opcheck(forward, (x.detach(), packed.detach(), *folded, index, *static(layout), False))
    x, packed = x.detach(), packed.detach()
    _, *saved = forward(x, packed, *folded, index, *static(layout), True)
    for needs in itertools.product([False, True], repeat=2):
        torch.library.opcheck(
            torch.ops.hyperformer_fast.adapter_backward.default,
            (torch.randn_like(x), x, *saved, packed, *folded, index, *static(layout), *needs),
        )


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck_fold(pre, post, dtype):
    layout = AdapterLayout(13, 4, pre, post)
    for packed in (
        random_packed(layout, 3).float(),
        random_packed(layout, 6).view(2, 3, -1),
        random_packed(layout)[:0].float(),
    ):
        torch.library.opcheck(torch.ops.hyperformer_fast.fold.default, (packed, *static(layout)[:4], dtype))


def test_opcheck_with_float64_weights():
    """They ask for float64 sums, whatever x's dtype."""
    layout = AdapterLayout(13, 4, pre_norm=True)
    x, packed = torch.randn(5, 13, requires_grad=True), random_packed(layout).requires_grad_()
    folded = ops.fold(packed, layout, x.dtype)
    assert folded.wd.dtype == torch.float32 and folded.root.dtype == torch.float64
    arguments = (None, *static(layout), True)
    torch.library.opcheck(torch.ops.hyperformer_fast.adapter_forward.default, (x, packed, *folded, *arguments))
    generator = [torch.randn(s, dtype=torch.float64) for s in ((1, 3), (layout.numel, 3), (layout.numel,))]
    torch.library.opcheck(torch.ops.hyperformer_fast.hyper_adapter.default, (x, *generator, *arguments))


def test_opcheck_generate():
    E, G, g0 = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (2, 5, 4), (2, 5)))
    torch.library.opcheck(torch.ops.hyperformer_fast.generate_weights.default, (E, G, g0))
    torch.library.opcheck(torch.ops.hyperformer_fast.generate_weights.default, (E[:, :0], G, g0))


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("mixed", [False, True])
def test_hyper_adapter_is_its_parts(pre, post, mixed):
    layout = AdapterLayout(13, 4, pre, post)
    T = 3 if mixed else 1
    index = torch.tensor([0, 2, -1, 0, 2]) if mixed else None
    leaves = [torch.randn(s).requires_grad_() for s in ((5, 3, 13), (T, 6), (layout.numel, 6), (layout.numel,))]
    op = torch.ops.hyperformer_fast.hyper_adapter.default
    torch.library.opcheck(op, (*leaves, index, *static(layout), True))
    torch.library.opcheck(op, (*(t.detach() for t in leaves), index, *static(layout), False))

    # Its own weights, once they are found right: other sums' last bits, a backend's own, are not the adapter's concern.
    own = op(*(t.detach() for t in leaves), index, *static(layout), False)[5]
    generated = leaves[1] @ leaves[2].T + leaves[3]
    assert torch.allclose(own, generated, atol=1e-6, rtol=1e-5)

    def parts(x, E, G, g0):
        packed = E @ G.T + g0
        return ops.adapter(x, own + (packed - packed.detach()), layout, "gelu_new", task_index=index)

    at_once = lambda *leaves: ops.hyper_adapter(*leaves, layout, "gelu_new", index)  # noqa: E731
    out, g = parts(*leaves), torch.randn(5, 3, 13)
    expected = [out, *torch.autograd.grad(out, leaves, g)]
    for apply in (at_once, torch.compile(at_once, fullgraph=True, backend="aot_eager")):
        out = apply(*leaves)
        for mine, theirs in zip([out, *torch.autograd.grad(out, leaves, g)], expected):
            assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(at_once(*(t.detach() for t in leaves)), expected[0])
    x = leaves[0]
    (dx,) = torch.autograd.grad(
        ops.hyper_adapter(x, *(t.detach() for t in leaves[1:]), layout, "gelu_new", index), x, g
    )
    assert torch.allclose(dx, expected[1], atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_to_the_same_bits(mixed, dynamic):
    layout = AdapterLayout(12, 4, pre_norm=True)
    E, G, g0 = torch.randn(1, 3 if mixed else 1, 4), torch.randn(1, layout.numel, 4), torch.randn(1, layout.numel)

    def step(x, E, G, g0, index):
        packed = ops.generate_weights(E, G, g0)[0]
        return ops.adapter(x, packed, layout, "silu", task_index=index)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 5):
        index = torch.arange(batch) % 3 if mixed else None
        leaves = [t.clone().requires_grad_() for t in (torch.randn(batch, 3, 12), E, G, g0)]
        out, again = step(*leaves, index), compiled(*leaves, index)
        g = torch.randn_like(out)
        assert torch.equal(out, again)
        for mine, theirs in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(again, leaves, g)):
            assert torch.equal(mine, theirs)


def test_inference_saves_nothing():
    layout = AdapterLayout(16, 4, pre_norm=True)
    packed = random_packed(layout).float()
    x = torch.randn(5, 16)
    out, *saved = torch.ops.hyperformer_fast.adapter_forward(
        x, packed, *ops.fold(packed, layout, x.dtype), None, *static(layout), False
    )
    assert [t.numel() for t in saved] == [0] * 4
    assert torch.equal(out, ops.adapter(x, packed, layout, "gelu_new"))


def test_training_saves_only_x_z_and_r():
    layout = AdapterLayout(64, 4)
    packed = random_packed(layout).float().requires_grad_()
    x = torch.randn(11, 64, requires_grad=True)
    folded = ops.fold(packed, layout, x.dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.adapter(x, packed, layout, "gelu_new", folded)
    with_rows = sorted(tuple(t.shape) for t in kept if t.numel() and t.shape[0] == 11)
    assert with_rows == [(11,), (11, 4), (11, 64)]


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(compiled):
    layout = AdapterLayout(8, 2)
    x = torch.randn(3, 8, requires_grad=True)
    packed = random_packed(layout).float()
    apply = lambda x: ops.adapter(x, packed, layout, "gelu_new")  # noqa: E731
    if compiled:
        apply = torch.compile(apply, backend="aot_eager")
    out = apply(x)
    with pytest.raises(RuntimeError, match="second derivative|double backward"):
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        dx.sum().backward()
