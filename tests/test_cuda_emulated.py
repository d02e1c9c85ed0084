"""The CUDA kernels in the emulator against the float64 truth, by the one rule."""

from __future__ import annotations

import itertools
import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.activations import check_activations_everywhere
from support.cases import HOSTILE, hostile_packed, random_packed
from support.emulated import EmulatedCuda, device_of, few_rows, needs_compiler, registered, thread_order
from support.sweep import draw_case
from support.tolerance import assert_accurate
from support.weights import assert_folded, check_hostile_weights
from test_ops import DTYPES, check_against_truth

from hyperformer_fast import reference
from hyperformer_fast.backends import Backend
from hyperformer_fast.backends.cuda import ONE_LAUNCH_ROWS
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

pytestmark = needs_compiler
NORMS = list(itertools.product([False, True], repeat=2))
#: The forward has a kernel of its own for few rows: every shape is to go through both.
FORWARDS = pytest.mark.parametrize("few", [0, 1000], ids=["rows by 32", "row by row"])


def folded_of(packed, layout, dtype):
    folded = EmulatedCuda().fold(packed, layout, dtype)
    assert_folded(folded, packed, layout, dtype)
    return folded


def check(x, packed, layout, activation, index, save=True):
    """Fold and forward; out by the one rule, and what is saved as near the truth as the folded reference's."""
    backend = EmulatedCuda()
    folded = folded_of(packed, layout, x.dtype)
    out, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, activation), index, save)
    eager, eager_fp32 = (reference.adapter(t, packed.to(t.dtype), layout, activation, index) for t in (x, x.float()))
    eager_saved = reference.adapter_forward(
        x, reference.fold(packed, layout, x.dtype), AdapterSpec(layout, activation), index, True
    )[1]
    truth, true_saved = reference.adapter_forward(
        x.double(), reference.fold(packed.double(), layout, torch.float64), AdapterSpec(layout, activation), index, True
    )
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    assert_accurate(out, eager, truth, "out", eager_fp32)
    if index is not None:
        assert torch.equal(out[index == -1], x[index == -1])
    for name, k, e, t in zip(saved._fields, saved, eager_saved, true_saved):
        if not save:
            assert k.numel() == 0, name
        else:
            assert k.shape == t.shape, name
            # sums that may cancel: z and the mean are as accurate as what they add up, which is of x's size
            summed = [x.double()] if name in ("z", "pre_mean") else []
            largest = max((part.abs().max().item() for part in (t, *summed) if part.numel()), default=0.0)
            near = 5 * (e - t).abs().max().item() if t.numel() else 0.0
            torch.testing.assert_close(k.double(), t, rtol=0, atol=near + 2 * torch.finfo(x.dtype).eps * largest)
    return out, saved


@settings(
    max_examples=int(os.environ.get("HYPERFORMER_FAST_SWEEP_EXAMPLES", 150)), deadline=None, derandomize=True,
    print_blob=True,
)  # fmt: skip
@given(data=st.data())
def test_sweep(data):
    case = draw_case(data.draw, [1, 3, 5, 16, 17, 24, 32, 48, 65])
    with few_rows(data.draw(st.sampled_from([0, 1000]), label="few")), registered():
        check(case.x, *case[2:], data.draw(st.booleans(), label="save"))
        check_against_truth(*case, backend="cuda-emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [9, 24, 60, 127])
@pytest.mark.parametrize("d", [512, 768, 1024, 1032, 515])
def test_every_instantiation(d, b, dtype):
    """Widths that registers hold, a wider one in whole pieces, and one that is not aligned; each bottleneck's tile."""
    layout = AdapterLayout(d, b, pre_norm=b == 24)
    x, packed = torch.randn(1, 3, d).to(dtype), random_packed(layout).float()
    check(x, packed, layout, "gelu_new", None)
    with few_rows(0), registered():
        check(x, packed, layout, "gelu_new", None)
        check_against_truth(x, torch.randn_like(x), packed, layout, "gelu_new", None, backend="cuda-emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "index"), [((1, 300), None), ((7, 40), [1, 0, 1, 1, -1, 0, 1])])
def test_rows_of_several_stretches(shape, index, dtype):
    """Each row in one partial sum, and each partial sum once."""
    layout = AdapterLayout(40, 3)
    x, g = (torch.randn(*shape, 40).to(dtype) for _ in range(2))
    index, T = (None, 1) if index is None else (torch.tensor(index), 2)
    with registered():
        check_against_truth(x, g, random_packed(layout, T).float(), layout, "silu", index, backend="cuda-emulated")


@pytest.mark.parametrize(("rows", "d", "b"), [(33, 2048, 96), (4096, 96, 24)])
def test_long_float32_sums(rows, d, b):
    """Tensor cores round toward zero: that must not add up, neither along a row nor over the rows."""
    layout = AdapterLayout(d, b, False, False)
    x, g = (torch.randn(rows, d) for _ in range(2))
    with few_rows(0), registered():
        check_against_truth(x, g, random_packed(layout).float(), layout, "silu", None, backend="cuda-emulated")


def test_float32_to_the_ends_of_its_range():
    """What a float32 has beyond a tf32's range or mantissa must not become NaN, nor a small number."""
    layout = AdapterLayout(40, 3, False, False)
    packed = torch.zeros(1, layout.numel)
    weight = 0.25 + 2**-17  # of which a tf32 has 0.25, and another the rest
    layout.unpack(packed)["down_weight"][:] = weight
    ends = torch.tensor([3.4028234e38, -3.4028234e38, 3.4026e38, 1.2e-38, float("nan"), float("inf")])
    x = torch.zeros(len(ends), 40)
    x[:, 7] = ends
    folded = folded_of(packed, layout, torch.float32)
    expected = (weight * ends).unsqueeze(-1).expand(-1, 3)
    for few in (0, 1000):
        with few_rows(few):
            _, saved = EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, "relu"), None, True)
        torch.testing.assert_close(saved.z, expected, equal_nan=True, atol=1e-41, rtol=1e-6)


def test_samples_of_one_row_each_are_few_rows_however_many():
    layout = AdapterLayout(64, 8)
    packed, x = random_packed(layout, 2).float(), torch.randn(70, 1, 64)
    folded, index = folded_of(packed, layout, x.dtype), torch.arange(70) % 4 - 1
    forward = EmulatedCuda().adapter_forward
    results = []
    for limit in (64, 1000, 0):
        with few_rows(limit):
            results.append(forward(x, folded, AdapterSpec(layout, "silu"), index, True)[1].z)
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())
    assert not torch.equal(results[0].nan_to_num(), results[2].nan_to_num())  # two kernels: or this tests nothing


@FORWARDS
@pytest.mark.parametrize(("std", "wide"), [(1e-5, 30), (1e-3, 30), (30.0, 30), (1e-7, 1000)])
def test_float16_range(std, wide, few):
    """r h and gamma * Wc each leave float16's range here; gradients must not."""
    layout = AdapterLayout(64, 8)
    packed = random_packed(layout).float()
    parts = layout.unpack(packed)
    parts["up_weight"].mul_(std / 0.3)
    parts["up_bias"].mul_(std / 0.3)
    parts["down_weight"].mul_(wide)
    x, g = (torch.randn(40, 64).half() for _ in range(2))
    with few_rows(few), registered():
        check_against_truth(x, g, packed, layout, "gelu_new", None, backend="cuda-emulated")


@FORWARDS
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights(kind, few):
    def adapter(x, packed, layout, activation):
        folded = folded_of(packed, layout, x.dtype)
        return EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, activation), None, False)[0]

    with few_rows(few):
        check_hostile_weights(kind, adapter)


@FORWARDS
def test_weights_that_float16_has_no_range_for(few):
    """r h may pass float16's range where W_u is tiny: the columns' powers of two must carry it."""
    layout = AdapterLayout(96, 12)
    packed = hostile_packed("tiny up", layout).float()
    with few_rows(few):
        check(torch.randn(2, 17, 96).half(), packed, layout, "gelu_new", None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pre", "post", "b"), [(*norms, 24) for norms in NORMS] + [(False, True, 80)])
def test_neither_threads_nor_copies_in_another_order_change_a_bit(pre, post, b, dtype):
    layout, index = AdapterLayout(520, b, pre, post), torch.tensor([1, -1, 0])
    x, g = (torch.randn(3, 34, 520).to(dtype) for _ in range(2))
    packed = random_packed(layout, 2).float()
    generator = torch.randn(2, 6), torch.randn(layout.numel, 6) / 6, packed.mean(0)
    results = []
    for way in (
        ("forward", "late"),
        ("reverse", "late"),
        ("1", "early"),
        ("reverse", "early", "fair"),
        ("2", "late", "fair"),
    ):
        with thread_order(*way), device_of(5):
            folded = EmulatedCuda().fold(packed, layout, dtype)
            out, saved = EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, "silu"), index, True)
            gradients = EmulatedCuda().adapter_backward(
                g, x, saved, packed, folded, AdapterSpec(layout, "silu"), index, True, True
            )
            row_by_row = EmulatedCuda().adapter_forward(x[:, :2], folded, AdapterSpec(layout, "silu"), index, True)
            at_once = EmulatedCuda().hyper_adapter(x, *generator, AdapterSpec(layout, "silu"), index, True)
            flat = [row_by_row[0], *row_by_row[1], at_once[0], *at_once[1], at_once[2], *at_once[3]]
            results.append((*folded, out, *saved, *gradients, *flat))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 4, 50])
@pytest.mark.parametrize(
    ("d", "b", "k", "shape", "index"),
    [
        (40, 5, 8, (2, 40), [1, 0]),
        (39, 5, 7, (3, 3), [-1, 2, 0]),
        (512, 33, 64, (2, 35), [0, 2]),
        (1024, 100, 4, (70,), None),
        (64, 16, 70, (5, 1), [0, 1, 2, 3, 4]),
        (520, 20, 4, (5, 1), [0, 1, 2, 1, 0]),  # more than one warp has columns
        (8, 3, 3, (40, 1), [*range(40)]),  # more embeddings than generation takes at a time
        (24, 3, 3, (0, 4), []),
        (24, 3, 4, (2, 4), [-1, -1]),
    ],
)
def test_one_launch_is_its_parts(d, b, k, shape, index, blocks, dtype):
    """Bit for bit, whatever part of the work a block has."""
    layout, backend = AdapterLayout(d, b, pre_norm=b == 5), EmulatedCuda()
    T = 1 if index is None else max(index, default=0) + 1
    index = None if index is None else torch.tensor(index, dtype=torch.int32)
    x, (E, G, g0) = (
        torch.randn(*shape, d).to(dtype),
        (torch.randn(s) for s in ((T, k), (layout.numel, k), (layout.numel,))),
    )
    with device_of(blocks):
        out, saved, packed, folded = backend.hyper_adapter(x, E, G, g0, AdapterSpec(layout, "gelu"), index, True)
    parts = Backend.hyper_adapter(backend, x, E, G, g0, AdapterSpec(layout, "gelu"), index, True)
    for mine, other in zip((out, *saved, packed, *folded), (parts[0], *parts[1], parts[2], *parts[3]), strict=True):
        assert torch.equal(mine, other)


def test_many_rows_take_a_launch_for_each_part():
    """And give the same."""
    layout, backend, x = AdapterLayout(8, 2), EmulatedCuda(), torch.randn(ONE_LAUNCH_ROWS + 1, 8)
    site = (
        torch.randn(1, 4),
        torch.randn(layout.numel, 4),
        torch.randn(layout.numel),
        AdapterSpec(layout, "relu"),
        None,
        False,
    )
    library = mock.Mock(wraps=backend.library())
    with mock.patch.object(EmulatedCuda, "library", lambda self: library):
        out = backend.hyper_adapter(x, *site)[0]
        assert not library.hyper_adapter.called and library.fold.called
        assert torch.equal(out[:-1], backend.hyper_adapter(x[:-1], *site)[0]) and library.hyper_adapter.called


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_over_the_whole_range(dtype):
    # a tf32 product is not exact at the end of float32's range, and makes NaN of an infinity
    largest = {torch.float32: 3e38, torch.bfloat16: torch.inf, torch.float16: 65504.0}[dtype]
    check_activations_everywhere(EmulatedCuda(), dtype, largest)


@FORWARDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_h_is_that_of_the_rounded_z(dtype, few):
    """Which is all that the backward knows of it."""
    layout = AdapterLayout(128, 128, post_norm=False)
    packed = torch.zeros(1, layout.numel)
    parts = layout.unpack(packed)
    parts["down_bias"][:], parts["up_weight"][:] = torch.randn(128), torch.eye(128)
    folded = EmulatedCuda().fold(packed, layout, dtype)
    x = torch.zeros(1, 128).to(dtype)
    with few_rows(few):
        out, saved = EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, "gelu_new"), None, True)
    assert torch.equal(saved.z, parts["down_bias"].to(dtype))
    h = torch.nn.functional.gelu(saved.z.double(), approximate="tanh").to(dtype)
    assert (out == h).float().mean() > 0.98  # but for ties that float32 decides otherwise
