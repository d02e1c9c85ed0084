"""The bottleneck form against the paper's, in float64; and both against numerical derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.activations import EAGER, whole_range
from support.cases import HOSTILE, hostile_packed, random_packed
from support.tolerance import assert_accurate

from hyperformer_fast import ops, reference
from hyperformer_fast.activations import ACTIVATIONS, activate, activate_grad
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

NORMS = list(itertools.product([False, True], repeat=2))


def both_forms(x, packed, layout, activation, index, g):
    """(out, dx, dpacked) of the paper's form by autograd, and of the bottleneck form in closed form."""
    x, packed = x.detach().requires_grad_(), packed.detach().requires_grad_()
    out = reference.adapter(x, packed, layout, activation, index)
    paper = [out.detach(), *torch.autograd.grad(out, (x, packed), g)]
    with torch.no_grad():
        folded = reference.fold(packed, layout, x.dtype)
        out, saved = reference.adapter_forward(x, folded, AdapterSpec(layout, activation), index)
        bottleneck = [
            out,
            *reference.adapter_backward(g, x, saved, packed, folded, AdapterSpec(layout, activation), index),
        ]
    return paper, bottleneck


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mixed", [False, True])
def test_bottleneck_form_equals_the_papers(pre, post, activation, mixed):
    layout = AdapterLayout(13, 4, pre, post)
    packed = random_packed(layout, 3 if mixed else 1)
    x = torch.randn(5, 3, 13, dtype=torch.float64)
    index = torch.tensor([0, 2, -1, 0, 2]) if mixed else None
    paper, bottleneck = both_forms(x, packed, layout, activation, index, torch.randn_like(x))
    for name, mine, expected in zip(("out", "dx", "dpacked"), bottleneck, paper):
        assert (mine - expected).abs().max() <= 1e-13 * expected.abs().max(), name


@pytest.mark.parametrize(("d", "b"), [(1, 1), (2, 5), (3, 3), (40, 1)])
def test_bottleneck_form_at_the_edges(d, b):
    layout = AdapterLayout(d, b, pre_norm=True)
    x = torch.randn(4, d, dtype=torch.float64)
    paper, bottleneck = both_forms(x, random_packed(layout), layout, "gelu", None, torch.randn_like(x))
    for mine, expected in zip(bottleneck, paper):
        assert (mine - expected).abs().max() <= 1e-11 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(pre, post, activation):
    layout = AdapterLayout(7, 2, pre, post)
    packed = random_packed(layout, 2).requires_grad_()
    x = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, -1, 0])
    torch.autograd.gradcheck(lambda x, p: reference.adapter(x, p, layout, activation, index), (x, packed))
    torch.autograd.gradcheck(lambda x, p: ops.adapter(x, p, layout, activation, task_index=index), (x, packed))


def test_gradcheck_generate():
    E, G, g0 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 5, 4), (2, 5)))
    torch.autograd.gradcheck(reference.generate_weights, (E, G, g0))
    torch.autograd.gradcheck(ops.generate_weights, (E, G, g0))
    expected = torch.einsum("qpk,qnk->qnp", G, E) + g0[:, None]
    assert torch.allclose(reference.generate_weights(E, G, g0), expected, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivatives(activation):
    z = torch.linspace(-9, 9, 401, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(activate(z, activation).sum(), z)
    assert torch.allclose(activate_grad(z.detach(), activation), expected, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_over_the_whole_range(activation, dtype):
    """In float32, from the smallest to the largest number of ``dtype``, where z^2 overflows."""
    z = whole_range(dtype, 700).float()
    exact = z.double().requires_grad_()
    (expected,) = torch.autograd.grad(EAGER[activation](exact).sum(), exact)
    torch.testing.assert_close(activate_grad(z, activation).double(), expected, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", HOSTILE)
def test_fold_is_what_it_says(kind):
    layout = AdapterLayout(24, 5, pre_norm=True)
    packed = hostile_packed(kind, layout)
    w = {name: part[0] for name, part in layout.unpack(packed).items()}
    folded = reference.fold(packed, layout, torch.float64)
    wa = torch.cat([w["up_weight"], w["up_bias"][:, None]], 1)
    wa = wa - wa.mean(0)
    gram = wa.T @ wa / layout.d
    root = folded.root[0]
    assert torch.equal(root, root.triu())
    assert (root.T @ root - gram).abs().max() <= 1e-13 * gram.abs().max().clamp(min=1e-30)
    assert torch.allclose(folded.wg[0].T * folded.scale[0], w["post_gamma"][:, None] * wa[:, :-1], rtol=1e-14, atol=0)
    mantissa, _ = torch.frexp(folded.scale)
    assert (mantissa == 0.5).all()
    largest = folded.wg[0].abs().amax(1)
    assert ((largest >= 1) & (largest < 2) | (largest == 0)).all()
    assert torch.allclose(folded.wd[0], w["down_weight"] * w["pre_gamma"])
    assert torch.allclose(folded.vectors[0, : layout.b], w["down_bias"] + w["down_weight"] @ w["pre_beta"])


def test_fold_keeps_nan_visible():
    layout = AdapterLayout(8, 3)
    packed = random_packed(layout)
    layout.unpack(packed)["up_weight"][0, 2, 1] = float("nan")
    folded = reference.fold(packed, layout, torch.float32)
    assert folded.root.isnan().any() and folded.wg.isnan().any() and folded.scale.isfinite().all()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_weights(kind, dtype):
    """Within 8x of eager's own error for columns that cancel (the layer norm amplifies what was lost); the rule
    elsewhere."""
    layout = AdapterLayout(96, 12)
    packed = hostile_packed(kind, layout).float()
    x = torch.randn(64, 96, dtype=torch.float64).to(dtype)
    truth = reference.adapter(x.double(), packed.double(), layout, "gelu_new")
    eager = reference.adapter(x, packed, layout, "gelu_new")
    eager_fp32 = reference.adapter(x.float(), packed, layout, "gelu_new")
    out, _ = reference.adapter_forward(x, reference.fold(packed, layout, dtype), AdapterSpec(layout, "gelu_new"))
    if kind == "cancelling columns":
        worst = max((eager.double() - truth).abs().max(), torch.finfo(dtype).eps * truth.abs().max())
        assert (out.double() - truth).abs().max() <= 8 * worst
    else:
        assert_accurate(out, eager, truth, kind, eager_fp32)


def test_tiny_up_projection_survives_float16():
    layout = AdapterLayout(64, 8)
    packed = hostile_packed("tiny up", layout)
    x = torch.randn(16, 64, dtype=torch.float64).half()
    out, saved = reference.adapter_forward(
        x, reference.fold(packed, layout, torch.float16), AdapterSpec(layout, "gelu_new")
    )
    assert out.isfinite().all() and (saved.r > 100).all()
    truth = reference.adapter(x.double(), packed, layout, "gelu_new")
    assert (out.double() - truth).abs().max() <= 4e-3 * truth.abs().max()


def test_a_layout_and_an_activation_still_stand_for_a_spec():
    layout = AdapterLayout(8, 2)
    spec, packed, x = AdapterSpec(layout, "relu"), random_packed(layout), torch.randn(3, 8, dtype=torch.float64)
    folded = reference.fold(packed, layout, x.dtype)
    out, saved = reference.adapter_forward(x, folded, spec)
    dx, dpacked = reference.adapter_backward(out, x, saved, packed, folded, spec, need_dpacked=False)
    with pytest.warns(DeprecationWarning, match=r"reference.adapter_forward.*pass AdapterSpec\(layout, activation\)"):
        assert torch.equal(reference.adapter_forward(x, folded, layout, "relu", None, False)[0], out)
    with pytest.warns(DeprecationWarning):
        assert torch.equal(reference.adapter_forward(x, folded, layout=layout, activation="relu")[0], out)
    with pytest.warns(DeprecationWarning):
        old = reference.adapter_backward(out, x, saved, packed, folded, layout, activation="relu", need_dpacked=False)
    assert torch.equal(old[0], dx) and old[1].numel() == 0
