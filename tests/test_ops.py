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
from hyperformer_fast.layout import AdapterLayout

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
    _, saved = reference.adapter_forward(x.double(), folded, layout, "relu", index)
    z = saved.z if index is None else saved.z[index >= 0]
    return not z.numel() or bool(z.abs().min() > 16 * torch.finfo(x.dtype).eps * z.abs().max())


def test_float64_and_mixed_precision_masters():
    layout = AdapterLayout(16, 4, pre_norm=True)
    for dtype in (torch.float64, torch.bfloat16):
        packed = random_packed(layout).to(dtype).requires_grad_()
        x = torch.randn(3, 16, dtype=dtype, requires_grad=True)
        out = ops.adapter(x, packed, layout, "gelu_new")
        out.sum().backward()
        assert out.dtype == x.grad.dtype == packed.grad.dtype == dtype
    out = ops.adapter(torch.randn(3, 16, dtype=torch.float64), random_packed(layout).float(), layout, "gelu_new")
    assert out.dtype == torch.float64


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


def test_nan_propagates():
    layout = AdapterLayout(8, 2)
    x = torch.randn(3, 8)
    x[1, 4] = float("nan")
    out = ops.adapter(x, random_packed(layout).float(), layout, "gelu_new")
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


BAD = {
    "width": (lambda a: a | {"x": torch.randn(5, 3, 7)}, r"\[\.\.\., 8\].*\[5, 3, 7\]"),
    "integer x": (lambda a: a | {"x": torch.ones(5, 3, 8, dtype=torch.int64)}, "floating.*int64"),
    "scalar x": (lambda a: a | {"x": torch.tensor(1.0)}, "scalar"),
    "packed length": (lambda a: a | {"packed": a["packed"][:, :-1]}, r"P = \d+.*got \d+"),
    "packed dims": (lambda a: a | {"packed": a["packed"][0]}, r"\[T, P\]"),
    "no index for several tasks": (lambda a: a | {"task_index": None}, "T = 2.*task_index"),
    "index dtype": (lambda a: a | {"task_index": a["task_index"].float()}, "int32 or int64.*float32"),
    "index length": (lambda a: a | {"task_index": torch.tensor([0, 1])}, "5, got 2"),
    "index dims": (lambda a: a | {"task_index": torch.zeros(5, 3, dtype=torch.int64)}, r"\[B\].*\[5, 3\]"),
    "task too high": (lambda a: a | {"task_index": torch.tensor([0, 1, 2, 0, 0])}, "to 1, got 2"),
    "task too low": (lambda a: a | {"task_index": torch.tensor([0, 1, -2, 0, 0])}, "from -1.*got -2"),
    "device": (lambda a: a | {"packed": a["packed"].to("meta")}, "device cpu, got meta"),
    "activation": (lambda a: a | {"activation": "tanh"}, "gelu_new.*'tanh'"),
    "folded for another dtype": (
        lambda a: a | {"folded": ops.fold(a["packed"], a["layout"], torch.float16)},
        "float32, got torch.float16",
    ),
    "folded of another site": (
        lambda a: a | {"folded": ops.fold(a["packed"][:1], a["layout"], torch.float32)},
        r"\[2, 2, 8\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(what, grad):
    layout = AdapterLayout(8, 2)
    good = {
        "x": torch.randn(5, 3, 8),
        "packed": random_packed(layout, 2).float().requires_grad_(grad),
        "layout": layout,
        "activation": "gelu_new",
        "task_index": torch.tensor([0, 1, -1, 0, 1]),
    }
    ops.adapter(**good)
    change, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        ops.adapter(**change(good))


def test_bad_generators_are_named():
    E, G, g0 = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5)
    for arguments, message in (
        ((E[0], G, g0), r"E must be \[Q, n, k\].*\[3, 4\]"),
        ((E[:1], G, g0), "agree in Q and k"),
        ((E, G, g0[:, :4]), r"g0 must be \[Q, P\]"),
        ((E, G.double(), g0), "G must have E's dtype.*float64"),
        ((E.long(), G.long(), g0.long()), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.generate_weights(*arguments)
    layout = AdapterLayout(8, 2)
    x, E, G, g0 = torch.randn(5, 8), torch.randn(1, 4), torch.randn(layout.numel, 4), torch.randn(layout.numel)
    for arguments, message in (
        ((x[:, :7], E, G, g0), r"\[\.\.\., 8\].*\[5, 7\]"),
        ((x, E[0], G, g0), r"E must be \[T, k\]"),
        ((x, E, G[:-1], g0[:-1]), rf"P = {layout.numel} rows.*got {layout.numel - 1}"),
        ((x, E.expand(2, 4), G, g0), "T = 2.*task_index"),
        ((x, E[:, :3], G, g0), "agree in Q and k"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.hyper_adapter(*arguments, layout, "gelu_new")
