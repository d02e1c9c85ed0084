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
