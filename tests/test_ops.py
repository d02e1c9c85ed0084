"""The registered ops and the functions over them, on every backend that serves a CPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.cases import random_packed
from support.tolerance import assert_accurate

from hyperformer_fast import backends, ops, reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = list(itertools.product([False, True], repeat=2))
#: Fewer, and always the same, where each is slow and memory is what is looked at, as under a sanitizer.
SWEEP_EXAMPLES = int(os.environ.get("HYPERFORMER_FAST_SWEEP_EXAMPLES", 2000))


def static(layout, activation="gelu_new"):
    return layout.d, layout.b, layout.pre_norm, layout.post_norm, ACTIVATIONS.index(activation)


def op_arguments(layout, dtype=torch.float32, mixed=True, grad=True):
    packed = random_packed(layout, 3 if mixed else 1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(5, 3, layout.d).to(dtype)
    index = torch.tensor([0, 2, -1, 0, 2]) if mixed else None
    folded = ops.fold(packed, layout, dtype)
    return x.requires_grad_(grad), packed.requires_grad_(grad), folded, index


def check_against_truth(x, g, packed, layout, activation, index, backend="auto"):
    """Outputs and gradients within the tolerance rule, and two runs bit-equal."""

    def run(x, g, packed, apply):
        # clones keep strides: x and g keep the layout under test
        x, packed = x.detach().requires_grad_(), packed.detach().requires_grad_()
        out = apply(x, packed)
        return [out.detach(), *torch.autograd.grad(out, (x, packed), g, materialize_grads=True)]

    eager_form = lambda x, p: reference.adapter(x, p, layout, activation, index)  # noqa: E731
    with backends.use_backend(backend):
        mine, again = (
            run(x, g, packed, lambda x, p: ops.adapter(x, p, layout, activation, task_index=index)) for _ in range(2)
        )
    truth = run(x.double(), g.double(), packed.double(), eager_form)
    eager = run(x, g, packed, eager_form)
    fp32 = run(x.float(), g.float(), packed.float(), eager_form)
    for name, k, a, e, t, e32 in zip(("out", "dx", "dpacked"), mine, again, eager, truth, fp32):
        assert torch.equal(k, a), f"{name}: two runs differ"
        assert_accurate(k, e, t, name, e32, x.dtype)


LAYOUTS = {
    "contiguous": lambda shape, dtype: torch.randn(shape).to(dtype),
    "strided rows": lambda shape, dtype: torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]],
    "transposed": lambda shape, dtype: torch.randn(shape[1], shape[0], shape[2]).to(dtype).transpose(0, 1),
    "expanded": lambda shape, dtype: torch.randn(1, 1, shape[-1]).to(dtype).expand(shape),
    "column-major": lambda shape, dtype: torch.randn(shape[0], shape[2], shape[1]).to(dtype).transpose(1, 2),
}


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(x_layout, dtype):
    layout = AdapterLayout(24, 6)
    packed = random_packed(layout, 2).float()
    shape = (3, 5, 24)
    x, g = LAYOUTS[x_layout](shape, dtype), LAYOUTS["contiguous"](shape, dtype)
    index = torch.tensor([1, -1, 0], dtype=torch.int32)
    check_against_truth(x, g, packed, layout, "gelu_new", index)
    check_against_truth(g, LAYOUTS[x_layout](shape, dtype), packed, layout, "gelu_new", index)


def test_stride_zero_gradient():
    layout = AdapterLayout(8, 2)
    x = torch.randn(4, 8, requires_grad=True)
    packed = random_packed(layout).float()
    ops.adapter(x, packed, layout, "relu").sum().backward()
    (expected,) = torch.autograd.grad(reference.adapter(x, packed, layout, "relu").sum(), x)
    assert torch.allclose(x.grad, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8), (8,), (1, 8), (2, 1, 3, 8)])
def test_any_number_of_rows(shape):
    layout = AdapterLayout(8, 3, pre_norm=True)
    packed = random_packed(layout).float().requires_grad_()
    x = torch.randn(shape, requires_grad=True)
    out = ops.adapter(x, packed, layout, "gelu_new")
    out.sum().backward()
    assert out.shape == x.shape and x.grad.shape == x.shape and packed.grad.shape == packed.shape
    if not x.numel():
        assert not packed.grad.any()


def test_zero_samples_with_tasks():
    layout = AdapterLayout(8, 3)
    packed = random_packed(layout, 4).float().requires_grad_()
    x = torch.randn(0, 5, 8, requires_grad=True)
    ops.adapter(x, packed, layout, "silu", task_index=torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert x.grad.shape == x.shape and not packed.grad.any()


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_task_passes_bit_for_bit(pre, post, dtype):
    """-1: the output is the input, even NaN and infinity, and nothing of the sample reaches another's gradient."""
    layout = AdapterLayout(8, 3, pre, post)
    packed = random_packed(layout, 2).float().requires_grad_()
    x = torch.randn(3, 2, 8).to(dtype)
    x[1, 0, 3], x[1, 1, 2], x[1, 1, 3] = float("nan"), float("inf"), -0.0
    x.requires_grad_()
    out = ops.adapter(x, packed, layout, "gelu_new", task_index=torch.tensor([1, -1, 1]))
    g = torch.randn_like(out)
    dx, dpacked = torch.autograd.grad(out, (x, packed), g)
    bits = lambda t: t.view(torch.int32 if dtype == torch.float32 else torch.int16)  # noqa: E731
    assert torch.equal(bits(out[1]), bits(x[1])) and torch.equal(dx[1], g[1])
    assert dpacked[1].isfinite().all() and not dpacked[0].any() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_forward_goes_on_from_the_z_that_it_keeps(dtype):
    """Rounded to x's dtype: the backward knows no other. r is of the rounded z to float32's precision, or it is not."""
    layout = AdapterLayout(96, 12)
    packed, x = random_packed(layout).float(), torch.randn(40, 96).to(dtype)
    folded = reference.fold(packed, layout, dtype)
    op = torch.ops.hyperformer_fast.adapter_forward.default
    _, z, r, *_ = op(x, packed, *folded, None, *static(layout), True)
    h = torch.nn.functional.gelu(z.double(), approximate="tanh")
    h = torch.cat([h, torch.ones(40, 1, dtype=torch.float64)], -1)
    expected = ((h @ folded.root[0].double().mT).square().sum(-1) + reference.EPS).rsqrt()
    torch.testing.assert_close(r.double(), expected, rtol=3e-6, atol=0)


def test_several_tasks_equal_one_by_one():
    layout = AdapterLayout(16, 4)
    packed = random_packed(layout, 4).float().requires_grad_()
    x = torch.randn(7, 3, 16, requires_grad=True)
    index = torch.tensor([3, 0, 0, 2, -1, 3, 2])
    g = torch.randn_like(x)
    out = ops.adapter(x, packed, layout, "gelu", task_index=index)
    dx, dpacked = torch.autograd.grad(out, (x, packed), g)
    for task in range(4):
        chosen = index == task
        alone = ops.adapter(x[chosen], packed[task : task + 1], layout, "gelu")
        alone_dx, alone_dpacked = torch.autograd.grad(alone, (x, packed), g[chosen])
        assert torch.allclose(out[chosen], alone, atol=1e-6)
        assert torch.allclose(dx[chosen], alone_dx[chosen], atol=1e-5)
        assert torch.allclose(dpacked[task], alone_dpacked[task], atol=1e-4)
    assert not dpacked[1].any()


@settings(
    max_examples=SWEEP_EXAMPLES,
    derandomize=True,
    deadline=None,
    print_blob=True,
)
@given(data=st.data())
def test_sweep(data):
    """Shapes, dtypes, layouts, activations and norm options, against float64 by the one rule."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    # The draws are the same in every run: on a single row of 8 numbers the rule is a matter of luck. Of 4,000 seeds
    # with both norms and b = 2 the C++ kernels' dx broke it twice, though it is nearer the truth than eager's in the
    # median, and eager's, held to the kernels' error, broke it once.
    # A layer norm over few numbers loses what it has to cancellation in any arithmetic: with d = 4 and both norms the
    # reference itself in float32 breaks the rule in one draw of 200.
    layout = AdapterLayout(
        draw(st.integers(8, 40), label="d"),
        draw(st.integers(1, 12), label="b"),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    shape = (draw(st.integers(1, 4), label="B"), draw(st.integers(1, 6), label="L"), layout.d)
    T = draw(st.integers(1, 3), label="T")
    mixed = T > 1 or draw(st.booleans(), label="mixed")
    index = torch.randint(-1, T, shape[:1]) if mixed else None
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)), label="layout of x")](shape, dtype)
    g = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)), label="layout of g")](shape, dtype)
    packed = random_packed(layout, T).float()
    activation = draw(st.sampled_from(ACTIVATIONS), label="activation")
    if activation == "relu":
        assume(away_from_the_kink(x, packed, layout, index))
    check_against_truth(x, g, packed, layout, activation, index)


def away_from_the_kink(x, packed, layout, index) -> bool:
    """No bottleneck value so near 0 that rounding a weight to x's dtype can turn its sign, and with it relu's
    derivative."""
    folded = reference.fold(packed.double(), layout, torch.float64)
    _, saved = reference.adapter_forward(x.double(), folded, AdapterSpec(layout, "relu"), index)
    z = saved.z if index is None else saved.z[index >= 0]
    return not z.numel() or bool(z.abs().min() > 16 * torch.finfo(x.dtype).eps * z.abs().max())


def test_float64_and_mixed_precision_masters():
    layout = AdapterLayout(16, 4, pre_norm=True)
    for of_x, of_packed in itertools.product((torch.float64, torch.float32, torch.bfloat16), repeat=2):
        packed = random_packed(layout).to(of_packed).requires_grad_()
        x = torch.randn(3, 16, dtype=of_x, requires_grad=True)
        out = ops.adapter(x, packed, layout, "gelu_new")
        out.sum().backward()
        assert out.dtype == x.grad.dtype == of_x and packed.grad.dtype == of_packed
        E, G, g0 = (torch.randn(s, dtype=of_packed).requires_grad_() for s in ((1, 4), (layout.numel, 4), layout.numel))
        out = ops.hyper_adapter(x, E, G, g0, layout, "gelu_new")
        assert out.dtype == of_x and torch.autograd.grad(out.sum(), G)[0].dtype == of_packed


def test_autocast_changes_nothing():
    layout = AdapterLayout(16, 4)
    E, G, g0 = torch.randn(1, 1, 4), torch.randn(1, layout.numel, 4), torch.randn(1, layout.numel)
    x = torch.randn(5, 16, requires_grad=True)

    def step():
        packed = ops.generate_weights(E, G.requires_grad_(), g0)[0]
        out = ops.adapter(x, packed, layout, "gelu_new")
        return [out, *torch.autograd.grad(out.sum(), (x, G))]

    plain = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = step()
    for mine, theirs in zip(plain, cast):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_nan_propagates():
    layout = AdapterLayout(8, 2)
    x = torch.randn(3, 8)
    x[1, 4] = float("nan")
    out = ops.adapter(x, random_packed(layout).float(), layout, "gelu_new")
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
