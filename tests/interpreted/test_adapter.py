"""The adapter's kernels against the float64 truth, by the one rule; their memory accesses; their determinism."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.activations import check_activations_everywhere
from support.cases import HOSTILE, random_packed
from support.sweep import draw_case
from support.tolerance import assert_accurate
from support.watch import watch
from support.weights import check_hostile_weights
from test_ops import DTYPES, check_against_truth

from hyperformer_fast import backends, ops, reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

NORMS = list(itertools.product([False, True], repeat=2))


@pytest.fixture(autouse=True)
def _watched():
    """No access outside a kernel's tensors, no number written twice in a launch."""
    with watch() as seen:
        yield seen


@settings(
    max_examples=int(os.environ.get("HYPERFORMER_FAST_SWEEP_EXAMPLES", 120)),
    deadline=None,
    print_blob=True,
    derandomize=True,
)
@given(data=st.data())
def test_sweep(data):
    check_against_truth(*draw_case(data.draw, [1, 3, 5, 16, 17, 24, 32]), backend="triton")


# Several tiles of columns and rows, wide and odd d, b of exactly a tile, the largest bottleneck; kept rows and not.
LARGE = [
    (768, 24, 34, "gelu_new", False, True, torch.float32),
    (768, 24, 34, "gelu_new", False, True, torch.bfloat16),
    (512, 16, 33, "silu", True, True, torch.float16),
    (1024, 32, 33, "gelu", False, False, torch.bfloat16),
    (1536, 48, 17, "gelu_new", False, True, torch.bfloat16),
    (4096, 64, 2, "gelu_new", True, True, torch.bfloat16),
    (777, 128, 3, "gelu", False, True, torch.float32),
    (2050, 3, 3, "silu", True, False, torch.float16),
]


@pytest.mark.parametrize(("d", "b", "rows", "activation", "pre", "post", "dtype"), LARGE)
def test_shapes_of_every_tile(d, b, rows, activation, pre, post, dtype):
    layout = AdapterLayout(d, b, pre, post)
    T = 2 if rows > 3 else 1
    x, g = (torch.randn(T, rows, d).to(dtype) for _ in range(2))
    index = torch.tensor([1, 0], dtype=torch.int32) if T > 1 else None
    check_against_truth(x, g, random_packed(layout, T).float(), layout, activation, index, backend="triton")


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_task_and_a_task_that_is_not_there(pre, post, dtype):
    """-1: out is x and dx is g, bit for bit. Out of range: NaN, and nobody else is touched. Neither reaches a
    weight."""
    backend = TritonBackend()
    layout = AdapterLayout(40, 3, pre, post)
    packed = random_packed(layout, 2).float()
    x, g = (torch.randn(6, 35, 40).to(dtype) for _ in range(2))
    x[1, 0, 3], x[1, 1, 2], x[1, 1, 3] = float("nan"), float("inf"), -0.0
    folded = reference.fold(packed, layout, dtype)
    index = torch.tensor([1, -1, 2, 0, -2, 2**40])
    out, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "gelu_new"), index, True)
    dx, dpacked = backend.adapter_backward(
        g, x, saved, packed, folded, AdapterSpec(layout, "gelu_new"), index, True, True
    )
    bits = lambda t: t.view(torch.int32 if dtype == torch.float32 else torch.int16)  # noqa: E731
    assert torch.equal(bits(out[1]), bits(x[1])) and torch.equal(bits(dx[1]), bits(g[1]))
    assert not any(part[1].any() for part in saved if part.numel())
    for bad in (2, 4, 5):
        assert out[bad].isnan().all() and dx[bad].isnan().all()
    alone = [0, 3]
    small, small_saved = backend.adapter_forward(x[alone], folded, AdapterSpec(layout, "gelu_new"), index[alone], True)
    small_dx, small_dpacked = backend.adapter_backward(
        g[alone], x[alone], small_saved, packed, folded, AdapterSpec(layout, "gelu_new"), index[alone], True, True
    )
    assert torch.equal(out[alone], small) and torch.equal(dx[alone], small_dx)
    assert torch.allclose(dpacked, small_dpacked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [0, 1])
def test_without_tasks_or_rows(T):
    backend = TritonBackend()
    layout = AdapterLayout(20, 3, True)
    packed = random_packed(layout, T).float()
    folded = reference.fold(packed, layout, torch.float32)
    for B in (0, 3):
        x, index = torch.randn(B, 2, 20), torch.tensor([-1, 5, -1][:B])
        out, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "silu"), index, True)
        dx, dpacked = backend.adapter_backward(
            x, x, saved, packed, folded, AdapterSpec(layout, "silu"), index, True, True
        )
        assert torch.equal(out[::2], x[::2]) and torch.equal(dx[::2], x[::2]) and out[1:2].isnan().all()
        assert dpacked.shape == packed.shape and not dpacked.any()


@pytest.mark.parametrize(("need_dx", "need_dpacked"), NORMS)
@pytest.mark.parametrize("post", [False, True])
def test_what_is_not_needed_is_empty(need_dx, need_dpacked, post):
    backend = TritonBackend()
    layout = AdapterLayout(20, 3, True, post)
    packed = random_packed(layout).float()
    folded, x = reference.fold(packed, layout, torch.float32), torch.randn(3, 20)
    out, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "silu"), None, True)
    both = backend.adapter_backward(x, x, saved, packed, folded, AdapterSpec(layout, "silu"), None, True, True)
    some = backend.adapter_backward(
        x, x, saved, packed, folded, AdapterSpec(layout, "silu"), None, need_dx, need_dpacked
    )
    for needed, mine, full in zip((need_dx, need_dpacked), some, both):
        assert torch.equal(mine, full) if needed else mine.numel() == 0
    lean, nothing = backend.adapter_forward(x, folded, AdapterSpec(layout, "silu"), None, False)
    assert torch.equal(lean, out) and [t.numel() for t in nothing] == [0] * 4


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights(kind):
    with backends.use_backend("triton"):
        check_hostile_weights(kind, ops.adapter)


@pytest.mark.parametrize(("shape", "index"), [((1, 300), None), ((7, 40), [1, 0, 1, 1, -1, 0, 1])])
def test_rows_of_several_stretches(shape, index):
    """Each row in one partial sum, and each partial sum once."""
    layout = AdapterLayout(40, 3)
    x, g = (torch.randn(*shape, 40) for _ in range(2))
    index = None if index is None else torch.tensor(index)
    check_against_truth(
        x, g, random_packed(layout, 1 if index is None else 2).float(), layout, "silu", index, backend="triton"
    )


@pytest.mark.parametrize(("std", "wide"), [(1e-5, 30), (1e-3, 30), (30.0, 30), (1e-7, 1000)])
def test_float16_range(std, wide):
    """r h and gamma * Wc each leave float16's range here; gradients must not."""
    layout = AdapterLayout(64, 8)
    packed = random_packed(layout).float()
    parts = layout.unpack(packed)
    parts["up_weight"].mul_(std / 0.3)
    parts["up_bias"].mul_(std / 0.3)
    parts["down_weight"].mul_(wide)
    x, g = (torch.randn(40, 64).half() for _ in range(2))
    check_against_truth(x, g, packed, layout, "gelu_new", None, backend="triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite_rows_stay_alone(activation):
    layout = AdapterLayout(40, 5)
    packed = random_packed(layout).float()
    x = torch.randn(70, 40)
    x[3, 7], x[66, 0] = float("nan"), float("inf")
    with backends.use_backend("triton"):
        out = ops.adapter(x, packed, layout, activation)
    assert (~out.isfinite()).any(1).nonzero().flatten().tolist() == [3, 66]
    assert out[3].isnan().all()  # the NaN went through the bottleneck, not around it


def test_a_row_far_from_zero_with_little_spread():
    """Beyond the last column of such a row -mean / std is more than float16 holds, and infinity times a zero weight is
    a NaN."""
    layout = AdapterLayout(2050, 3, True)
    x = torch.full((2, 2050), 2047.0).half()
    x[:, 0] = 2046
    packed = random_packed(layout).float()
    with backends.use_backend("triton"):
        out = ops.adapter(x, packed, layout, "gelu_new")
    assert_accurate(
        out,
        reference.adapter(x, packed, layout, "gelu_new"),
        reference.adapter(x.double(), packed.double(), layout, "gelu_new"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_over_the_whole_range(dtype):
    check_activations_everywhere(TritonBackend(), dtype, count=80)


def test_large_arguments_of_activations():
    layout = AdapterLayout(16, 4, False, False)
    packed = random_packed(layout).float()
    x = torch.randn(32, 16) * 1e4
    for activation in ACTIVATIONS:
        check_against_truth(x, torch.randn_like(x), packed, layout, activation, None, backend="triton")


def test_rows_far_apart(tmp_path):
    """Rows 2^31 numbers apart, in a file with holes: an offset in 32 bits would wrap."""
    layout = AdapterLayout(32, 3)
    apart = 2**31 + 16
    far = torch.from_file(str(tmp_path / "rows"), shared=True, size=2 * apart, dtype=torch.bfloat16)
    x = far.as_strided((2, 32), (apart, 1)).copy_(torch.randn(2, 32))
    assert x.stride(0) > 2**31
    with backends.use_backend("triton"):
        packed = random_packed(layout).float()
        out, near = (
            ops.adapter(t, packed, layout, "silu") for t in (x, x.clone(memory_format=torch.contiguous_format))
        )
    assert torch.equal(out, near)
