"""Weight gradients of mixed batches: every row of a task counts once, whatever the others are."""

from __future__ import annotations

import pytest
import torch
from support.cases import random_packed
from support.emulated import EmulatedCuda, needs_compiler, registered, thread_order
from test_ops import DTYPES, check_against_truth

from hyperformer_fast.layout import AdapterLayout, AdapterSpec

pytestmark = needs_compiler
MIXES = {
    "even": [0, 1, 2, 3] * 3,
    "one task has all": [2] * 12,
    "all but one": [1] * 11 + [3],
    "the first and last tasks are absent": [1, 2, 2, 1, 2, 2, 1, 1, 2, 1, 2, 2],
    "without a task": [-1, 3, 3, -1, 3, 0, 0, 3, -1, 3, 3, 3],
    "none has a task": [-1] * 12,
}


def backward(x, g, packed, layout, index, order="forward"):
    backend, spec = EmulatedCuda(), AdapterSpec(layout, "silu")
    with thread_order(order):
        folded = backend.fold(packed, layout, x.dtype)
        _, saved = backend.adapter_forward(x, folded, spec, index, True)
        return backend.adapter_backward(g, x, saved, packed, folded, spec, index, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix, dtype):
    """With 70 rows a sample, so that a segment ends within a sample and units have fewer than 32 rows."""
    layout, index = AdapterLayout(40, 5), torch.tensor(MIXES[mix])
    x, g = (torch.randn(len(index), 70, 40).to(dtype) for _ in range(2))
    with registered():
        check_against_truth(x, g, random_packed(layout, 4).float(), layout, "silu", index, backend="cuda-emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [16, 64, 128])
def test_mixes_of_every_bottleneck(b, dtype):
    """Bottlenecks that fill their tile, each with another number of stages of copies."""
    layout, index = AdapterLayout(72, b, pre_norm=b == 64), torch.tensor([1, 0, 1, -1, 1, 1, 0, 1])
    x, g = (torch.randn(len(index), 50, 72).to(dtype) for _ in range(2))
    with registered():
        check_against_truth(x, g, random_packed(layout, 2).float(), layout, "silu", index, backend="cuda-emulated")


@pytest.mark.parametrize(("samples", "tasks"), [(300, 5), (20, 300), (257, 1)])
def test_many_samples_and_many_tasks(samples, tasks):
    """More of either than a block has threads; more tasks than samples."""
    layout, index = AdapterLayout(8, 2), torch.randint(-1, tasks, (samples,))
    x, g = torch.randn(2, samples, 3, 8)
    with registered():
        check_against_truth(x, g, random_packed(layout, tasks).float(), layout, "silu", index, backend="cuda-emulated")


@pytest.mark.parametrize("wrong", [-1, 4, -2])
def test_rows_without_a_task_are_never_read(wrong):
    """They hold NaN, and nothing of it reaches a weight gradient."""
    layout, index = AdapterLayout(40, 5, pre_norm=True), torch.tensor([wrong, 3, wrong, 0, 3, 1, wrong])
    x, g = torch.randn(2, 7, 40, 40)
    packed, there = random_packed(layout, 4).float(), index != wrong
    clean = backward(x[there], g[there], packed, layout, index[there])
    x[~there], g[~there] = torch.nan, torch.nan
    dx, dpacked = backward(x, g, packed, layout, index)
    assert torch.equal(dpacked, clean[1]) and torch.equal(dx[there], clean[0])
    assert not dpacked[2].any() and dpacked[[0, 1, 3]].any(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_absent_task_changes_no_bit_of_the_others(dtype):
    """Nor does the order of threads and blocks."""
    layout, index = AdapterLayout(40, 5), torch.tensor([0, 1, 1, 0, 1, 1, 1])
    x, g = (torch.randn(7, 40, 40).to(dtype) for _ in range(2))
    packed = random_packed(layout, 3).float()
    results = [
        backward(x, g, packed[:2], layout, index),
        backward(x, g, packed[:2], layout, index, "reverse"),
        backward(x, g, packed, layout, index, "1"),
        backward(x, g, packed.roll(1, 0), layout, index + 1, "2"),
    ]
    for result, kept in zip(results, (slice(2), slice(2), slice(2), slice(1, 3)), strict=True):
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1][kept], results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [None, [0, 2, 2, -1, 0]], ids=["one task", "mixed"])
@pytest.mark.parametrize(("pre", "post"), [(False, True), (True, True), (True, False)])
def test_one_finish_for_a_stack_is_each_sites_own(pre, post, index, dtype):
    """Bit for bit, from partial sums that lie in one tensor, and from one site's schedule."""
    backend, layout, S = EmulatedCuda(), AdapterLayout(24, 3, pre, post), 3
    spec, T = AdapterSpec(layout, "gelu"), 1 if index is None else 3
    index = None if index is None else torch.tensor(index)
    x, g = (torch.randn(S, 5, 40, 24).to(dtype) for _ in range(2))
    packed = torch.stack([random_packed(layout, T).float() for _ in range(S)])
    rows = (1, 200) if index is None else (5, 40)
    ops, by_sample = backend.library(), index is not None
    segments, size, integers = ops.sums_sizes(*rows, T, by_sample, 24, 3, post, dtype)
    part, schedule = torch.full((S, segments, size), torch.nan), torch.zeros(integers, dtype=torch.int32)
    alone, means = [], []
    for site in range(S):
        folded = backend.fold(packed[site], layout, dtype)
        _, saved = backend.adapter_forward(x[site], folded, spec, index, True)
        arguments = g[site], x[site], *saved, packed[site], *folded, index, *spec.arguments
        alone.append(ops.adapter_backward(*arguments, True, True))
        assert torch.equal(alone[-1][0], ops.adapter_backward_sums(*arguments, True, part[site], schedule))
        means.append(folded.mean)
    dpacked = ops.finish(part, schedule, packed, torch.stack(means), by_sample, 24, 3, pre, post)
    assert torch.equal(dpacked, torch.stack([own for _, own in alone])) and dpacked.isfinite().all()


def test_sums_of_another_backward_are_refused():
    backend, layout, spec = EmulatedCuda(), AdapterLayout(24, 3), AdapterSpec(AdapterLayout(24, 3), "gelu")
    x, packed = torch.randn(4, 24), random_packed(layout).float()
    folded = backend.fold(packed, layout, torch.float32)
    _, saved = backend.adapter_forward(x, folded, spec, None, True)
    arguments = x, x, *saved, packed, *folded, None, *spec.arguments, True
    empty = torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="part has the wrong shape"):
        backend.library().adapter_backward_sums(*arguments, torch.empty(2, 8), empty)
    _, size, _ = backend.library().sums_sizes(1, 4, 1, False, 24, 3, True, torch.float32)
    with pytest.raises(RuntimeError, match="schedule must be a contiguous vector of int32"):
        backend.library().adapter_backward_sums(*arguments, torch.empty(1, size), empty.float())
    with pytest.raises(RuntimeError, match="rows without a task_index have one task, not 2"):
        many = torch.empty(1, 2, layout.numel)
        backend.library().finish(torch.empty(1, 1, size), empty, many, torch.empty(1, 2, 4), False, 24, 3, False, True)
    with pytest.raises(RuntimeError, match="schedule must have 7 numbers, got 0"):
        backend.library().finish(torch.empty(1, 1, size), empty, many, torch.empty(1, 2, 4), True, 24, 3, False, True)
