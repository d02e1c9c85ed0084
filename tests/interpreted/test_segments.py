"""The schedule of the weight gradients, the partial sums of its segments, and their composition for a whole stack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import random_packed
from support.watch import watch
from test_ops import DTYPES, check_against_truth

from hyperformer_fast.kernels import interpreter
from hyperformer_fast.kernels import schedule as module
from hyperformer_fast.kernels.common import rows_of
from hyperformer_fast.kernels.weight_gradients import finish, part_size, partial_sums, schedule, weight_gradients
from hyperformer_fast.layout import AdapterLayout, Folded, Saved

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _watched():
    interpreter.mend()
    with watch() as seen:
        yield seen


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def check(index: torch.Tensor, M: int, T: int, layout: AdapterLayout = AdapterLayout(768, 24)) -> None:  # noqa: B008
    """Every tile of every valid sample is in exactly one segment, which is of its task, in order and no longer than an
    equal share."""
    B = len(index)
    found = schedule(index, B, M, T, layout, torch.bfloat16, CPU)
    ranges, order, units = found.table.split([T + 1, B, 2 * found.segments])
    units, per_sample = units.view(-1, 2).tolist(), ceil(M, found.tile.BM)
    valid = [task for task in index.tolist() if 0 <= task < T]
    splits = max(1, min(ceil(B * per_sample, 4), 264 // (ceil(layout.d, found.tile.BK) + 1)))
    share = ceil(len(valid) * per_sample, splits)

    assert ranges[0] == 0 and ranges[T] <= found.segments
    assert all(count == 0 for _, count in units[ranges[T] :])
    for task in range(T):
        mine = units[ranges[task] : ranges[task + 1]]
        lengths = [count for _, count in mine]
        assert not mine or (max(lengths) <= share and min(lengths) >= max(1, max(lengths) - 1))
        expected = [(i, tile) for i, t in enumerate(index.tolist()) if t == task for tile in range(per_sample)]
        run = [unit for first, count in mine for unit in range(first, first + count)]
        assert [(int(order[unit // per_sample]), unit % per_sample) for unit in run] == expected


@settings(max_examples=25, deadline=None, derandomize=True, print_blob=True)
@given(data=st.data())
def test_schedule(data):
    T = data.draw(st.integers(1, 5), label="T")
    tasks = data.draw(st.lists(st.integers(-2, T), min_size=1, max_size=40), label="tasks")
    M = data.draw(st.sampled_from([1, 31, 32, 33, 128, 200]), label="M")
    check(torch.tensor(tasks, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))), M, T)


def test_schedule_of_many_samples_and_tasks():
    """More samples and more tasks than the kernel compares at a time, all of one task, none of any."""
    generator = torch.Generator().manual_seed(0)
    check(torch.randint(-1, 3, (300,), generator=generator), 40, 3)
    check(torch.randint(-1, 70, (150,), generator=generator), 1, 70)
    check(torch.full((300,), 1), 33, 2)
    check(torch.full((5,), -1), 33, 2)
    check(torch.tensor([2**40, 0, -(2**40)]), 1, 1)


def test_one_task_needs_no_table():
    found = schedule(None, 1, 4096, 1, AdapterLayout(768, 24), torch.bfloat16, CPU)
    assert found.table is None and not found.mixed
    assert (found.segments - 1) * found.share < ceil(4096, found.tile.BM) <= found.segments * found.share


def per_row_of(x, index, layout, T):
    """Made up dz, r h, m2 and s: NaN in the rows of samples without a valid task."""
    N, kind = x.shape[0] * x.shape[1], torch.float32 if x.dtype == torch.float16 else x.dtype
    dz, rh = torch.randn(N, layout.b).to(x.dtype), torch.randn(N, layout.b).to(kind)
    m2, s, r = (torch.randn(N) for _ in range(3))
    absent = ((index < 0) | (index >= T)).repeat_interleave(x.shape[1])
    for part in (dz, rh, m2, s, r):
        part[absent] = float("nan")
    return (dz, rh, m2, s), r


def as_tf32(t: torch.Tensor) -> torch.Tensor:
    """What a tf32 product reads of a float32 tensor: eleven bits, rounded to nearest."""
    return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_task_reach_no_sum(dtype):
    """Most rows are of one task, some of none, none of the last; whatever the rows of no task hold."""
    layout, T, M = AdapterLayout(40, 3), 4, 35
    index = torch.tensor([0, 0, -1, 0, 1, 0, 7, 0, 2])
    x, g = (torch.randn(len(index), M, 40).to(dtype) for _ in range(2))
    (dz, rh, m2, s), r = per_row_of(x, index, layout, T)
    for t in (x, g):
        t[(index < 0) | (index >= T)] = float("nan")
    segments = schedule(index, *x.shape[:2], T, layout, dtype, CPU)
    rows = rows_of(g, index), rows_of(x, index)
    empty = torch.empty(0)
    part = partial_sums(*rows, Saved(empty, r, empty, empty), (dz, rh, m2, s), layout, segments)
    again = partial_sums(*rows, Saved(empty, r, empty, empty), (dz, rh, m2, s), layout, segments)
    ranges, d, b, N = segments.table[: T + 1].tolist(), 40, 3, len(index) * M
    used = 2 * d * (b + 1) + 16 * 16 + 3 * 16 + 2  # the rest keeps the next segment's sums aligned
    assert torch.equal(part[: ranges[T], :used], again[: ranges[T], :used])

    # Operands that float32 holds for 16-bit rows are multiplied in tf32.
    by_m2 = rh.float() * m2[..., None]
    if dtype != torch.float32:
        by_m2 = as_tf32(by_m2)
        rh = as_tf32(rh) if rh.dtype == torch.float32 else rh
    x, g, dz, rh, by_m2 = (t.double().reshape(N, -1) for t in (x, g, dz, rh, by_m2))
    for task in range(T):
        mine = (index == task).repeat_interleave(M)
        sums = part[ranges[task] : ranges[task + 1]].double().sum(0)
        by_r = g[mine] * r[mine].double()[:, None]
        expected = [x[mine].T @ dz[mine], g[mine].T @ rh[mine], by_r.sum(0), g[mine].sum(0)]
        got = [t.view(e.shape) for t, e in zip(sums.split([d * b, d * b, d, d, len(sums) - 2 * d * (b + 1)]), expected)]
        for k, t in zip(got, expected):  # sums in float32 of what the rows hold; r alone is split, into 17 bits
            assert (k - t).norm() <= 1e-5 * t.norm()
        small = sums[2 * d * (b + 1) :]
        gram = small[:256].view(16, 16)[:b, :b]
        truth = by_m2[mine].T @ rh[mine]
        assert (gram - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("post", [True, False])
def test_all_rows_of_one_of_several_tasks(post):
    layout = AdapterLayout(40, 3, True, post)
    index = torch.full((5,), 1)
    x, g = (torch.randn(5, 33, 40) for _ in range(2))
    packed = random_packed(layout, 3).float()
    check_against_truth(x, g, packed, layout, "silu", index, backend="triton")


@pytest.mark.parametrize(("pre", "post"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_stack_is_its_adapters(mixed, pre, post):
    """One launch for three adapters gives the bits of three launches, and exactly zero for a task without rows."""
    layout, T = AdapterLayout(40, 5, pre, post), 3 if mixed else 1
    index = torch.tensor([2, 0, -1, 2, 2]) if mixed else None
    rows = (5, 40) if mixed else (1, 200)
    segments = schedule(index, *rows, T, layout, torch.float32, CPU)
    assert segments.segments > 1
    packed = torch.stack([random_packed(layout, T).float() for _ in range(3)])
    mean = torch.randn(3, T, layout.b + 1 if post else 0)
    part = torch.randn(3, segments.segments, part_size(layout))
    together = torch.empty_like(packed)
    finish(part, segments, packed, mean, layout, together)
    for site in range(3):
        alone = torch.empty_like(packed[:1])
        finish(part[site : site + 1], segments, packed[site : site + 1], mean[site : site + 1], layout, alone)
        assert torch.equal(alone[0], together[site])
    assert together.isfinite().all() and not (mixed and together[:, 1].any()) and together[:, 0].all(1).all()


def test_a_stack_shares_its_schedule(_watched):
    """Partial sums written into a stack's tensor, and one finish, are the gradients of each adapter alone."""
    layout, T = AdapterLayout(40, 3), 2
    index = torch.tensor([1, 0, 1, 1])
    segments = schedule(index, 4, 35, T, layout, torch.float32, CPU)
    packed, mean = random_packed(layout, 2 * T).float().view(2, T, -1), torch.randn(2, T, 4)
    part, dpacked = torch.empty(2, segments.segments, part_size(layout)), torch.empty_like(packed)
    empty, alone = torch.empty(0), []
    for site in range(2):
        x, g = (torch.randn(4, 35, 40) for _ in range(2))
        per_row, r = per_row_of(x, index, layout, T)
        saved, rows = Saved(empty, r, empty, empty), (rows_of(g, index), rows_of(x, index))
        partial_sums(*rows, saved, per_row, layout, segments, out=part[site])
        folded = Folded(*[empty] * 5, mean=mean[site])
        alone.append(weight_gradients(*rows, saved, per_row, packed[site], folded, layout, index))
    finish(part, segments, packed, mean, layout, dpacked)
    assert torch.equal(dpacked, torch.stack(alone))
    assert [launch.kernel for launch in _watched.launches].count("schedule") == 3


def test_the_constants_of_the_schedule():
    """The tests above must reach past what the kernel compares at a time."""
    assert module._SAMPLES <= 128 and module._TASKS <= 64
