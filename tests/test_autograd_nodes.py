"""The autograd nodes in C++ do what the autograd functions in Python do."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import random_packed
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from hyperformer_fast import native, ops
from hyperformer_fast.backends import registry
from hyperformer_fast.layout import AdapterLayout

pytestmark = pytest.mark.skipif(
    native.autograd_library() is None or native.cpu_library() is None,
    reason=f"{native.status('autograd')['reason'] or native.status()['reason']}",
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(layout: AdapterLayout, dtype: torch.dtype, mixed: bool, masters: torch.dtype = torch.float32):
    """x [4, 3, d], packed [T, P], E, G, g0 and task_index, with T = 2 where the batch is mixed."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    T = 2 if mixed else 1
    packed = random_packed(layout, T).to(masters)
    E, G, g0 = draw(T, 5).to(masters), (draw(layout.numel, 5) * 0.01).to(masters), packed[0].clone()
    index = torch.tensor([1, -1, 0, 1]) if mixed else None
    return draw(4, 3, layout.d).to(dtype), packed, (E, G, g0), index


def leaves(*tensors: torch.Tensor, needs=None) -> list[torch.Tensor]:
    needs = needs or [True] * len(tensors)
    return [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def both_ways(monkeypatch, run) -> None:
    """``run`` gives the same bits through the nodes and through the Python functions."""
    with_nodes = run()
    assert "hyperformer_fast" in with_nodes[0]  # the name of the C++ node
    with monkeypatch.context() as patch:
        patch.setitem(registry.get("cpu").__dict__, "nodes", None)
        in_python = run()
    assert in_python[0] in ("_AdapterBackward", "_HyperAdapterBackward")
    for a, b in zip(with_nodes[1:], in_python[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-6 if b.dtype == torch.float32 else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pre_norm, post_norm", [*itertools.product((False, True), repeat=2)])
def test_adapter(monkeypatch, pre_norm, post_norm, dtype, mixed):
    layout = AdapterLayout(24, 5, pre_norm, post_norm)
    x, packed, _, index = inputs(layout, dtype, mixed)
    g = torch.randn_like(x)

    def run():
        a, w = leaves(x, packed)
        out = ops.adapter(a, w, layout, "gelu_new", task_index=index, impl="cpu")
        return out.grad_fn.name(), out, *torch.autograd.grad(out, (a, w), g)

    both_ways(monkeypatch, run)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hyper_adapter(monkeypatch, dtype, mixed):
    layout = AdapterLayout(24, 5)
    x, _, generator, index = inputs(layout, dtype, mixed)
    g = torch.randn_like(x)

    def run():
        tensors = leaves(x, *generator)
        out = ops.hyper_adapter(*tensors, layout, "silu", index, impl="cpu")
        return out.grad_fn.name(), out, *torch.autograd.grad(out, tensors, g)

    both_ways(monkeypatch, run)


@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=4) if any(n)])
def test_only_the_gradients_that_are_needed(monkeypatch, needs):
    layout = AdapterLayout(24, 5)
    x, packed, generator, _ = inputs(layout, torch.float32, False)

    def gradients(tensors, out):
        wanted = [t for t in tensors if t.requires_grad]
        out.sum().backward()
        assert all(t.grad is not None for t in wanted)
        return out.grad_fn.name(), out, *(t.grad for t in tensors)

    def site():
        tensors = leaves(x, *generator, needs=needs)
        return gradients(tensors, ops.hyper_adapter(*tensors, layout, "gelu", impl="cpu"))

    both_ways(monkeypatch, site)
    if any(needs[:2]):

        def adapter():
            tensors = leaves(x, packed, needs=needs[:2])
            return gradients(tensors, ops.adapter(*tensors, layout, "gelu", impl="cpu"))

        both_ways(monkeypatch, adapter)


def test_weights_in_half_precision_and_views(monkeypatch):
    layout = AdapterLayout(24, 5)
    x, packed, generator, index = inputs(layout, torch.bfloat16, True, torch.bfloat16)
    strided = torch.randn(4, 3, 48).bfloat16()[..., ::2]
    expanded = torch.randn(1, 1, 24).bfloat16().expand(4, 3, 24)

    def run():
        a, w = strided.detach().requires_grad_(), packed.detach().requires_grad_()
        out = ops.adapter(a, w, layout, "relu", task_index=index, impl="cpu")
        return out.grad_fn.name(), out, *torch.autograd.grad(out, (a, w), expanded)

    both_ways(monkeypatch, run)
    # Generators in half precision are not served in one call: the function in Python takes the steps one by one.
    tensors = leaves(x, *generator)
    out = ops.hyper_adapter(*tensors, layout, "relu", index, impl="cpu")
    assert out.grad_fn.name() == "_HyperAdapterBackward"
    assert all(torch.isfinite(part).all() for part in torch.autograd.grad(out.float().sum(), tensors))


def test_no_rows():
    layout = AdapterLayout(24, 5)
    x, w = torch.zeros(0, 3, 24, requires_grad=True), random_packed(layout, 2).float().requires_grad_()
    out = ops.adapter(x, w, layout, "gelu", task_index=torch.zeros(0, dtype=torch.long), impl="cpu")
    dx, dw = torch.autograd.grad(out, (x, w), torch.zeros_like(out))
    assert dx.shape == x.shape and torch.equal(dw, torch.zeros_like(w))


@pytest.fixture
def made():
    layout = AdapterLayout(24, 5)
    x, packed, generator, _ = inputs(layout, torch.float32, False)
    return layout, *leaves(x, packed), leaves(*generator)


def outputs(made):
    layout, x, packed, generator = made
    return [
        ops.adapter(x, packed, layout, "gelu", impl="cpu"),
        ops.hyper_adapter(x, *generator, layout, "gelu", impl="cpu"),
    ]


def test_a_second_derivative_is_refused(made):
    for out in outputs(made):
        with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph=True"):
            torch.autograd.grad(out.sum(), made[1], create_graph=True)


def test_a_tangent_in_the_backward_is_refused(made):
    for out in outputs(made):
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.autograd.grad(out, made[1], g)


def test_an_input_that_changed_since_the_forward_is_refused(made):
    for out in outputs(made):
        with torch.no_grad():
            made[1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_twice_with_a_retained_graph_and_not_without(made):
    for out in outputs(made):
        first = torch.autograd.grad(out.sum(), made[1], retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out.sum(), made[1])[0])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(out.sum(), made[1])


def test_saved_tensors_hooks_see_what_is_saved(made):
    packs, unpacks = [], []
    with saved_tensors_hooks(lambda t: packs.append(t) or t, lambda t: unpacks.append(t) or t):
        found = outputs(made)
    assert len(packs) >= 2 * 12 and not unpacks
    for out in found:
        out.sum().backward()
    assert len(unpacks) == len(packs)


def test_a_library_of_another_torch_is_not_loaded(monkeypatch):
    info = native.build_info()
    monkeypatch.setattr(native, "build_info", lambda: {**info, "torch": "2.11.0"})
    native._load.cache_clear()
    try:
        reason = native.status("autograd")["reason"]
    finally:
        native._load.cache_clear()
    assert "built against torch 2.11.0 and fits no other" in reason and "rebuild it with: pip install" in reason


def test_two_backends_are_served_in_python():
    """The forward by one backend and the backward by another: no node of a single library can do that."""
    layout = AdapterLayout(24, 5)
    x, w = leaves(*inputs(layout, torch.float32, False)[:2])
    folded = ops.fold(w, layout, x.dtype)
    spec = ops.public.spec_of(layout, "gelu")
    forward, backward = registry.get("cpu"), registry.get("reference")
    out = ops.eager.adapter(x, w, folded, spec, None, forward, backward)
    assert out.grad_fn.name() == "_AdapterBackward"
    out.sum().backward()
