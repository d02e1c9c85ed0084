"""Answers that do not depend on the company: on the backend ``cpu`` a sample's adapter output has the same bits
whatever else is in its batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperformer_fast
from hyperformer_fast import native, ops
from hyperformer_fast.backends.cpu import INSTRUCTION_SETS, ISA_VARIABLE
from hyperformer_fast.layout import AdapterLayout

needs_library = pytest.mark.skipif(native.cpu_library() is None, reason="needs the compiled library _hf_cpu")

ROOT = Path(hyperformer_fast.__file__).resolve().parents[1]

TASKS, LENGTH = 4, 5
#: The sample that is padding: it holds NaN.
PADDING = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Widths that end within a vector, and bottlenecks that end within a tile.
SIZES = ((40, 5), (96, 12), (33, 7))


def stacks(d: int, b: int, pre: bool, post: bool) -> tuple[ops.Stack, ops.PreparedStack]:
    """One site with TASKS tasks, as a forward that trains runs it, and as one in evaluation does."""
    generator = torch.Generator().manual_seed(d)
    packed = torch.randn(1, TASKS, AdapterLayout(d, b, pre, post).numel, generator=generator) * 0.3
    layout = AdapterLayout(d, b, pre, post)
    return ops.Stack(packed, layout, "gelu_new"), ops.PreparedStack(packed, layout, "gelu_new")


def check(d: int, b: int, pre: bool, post: bool, dtype: torch.dtype, batches: list[list[tuple[int, int]]]) -> None:
    """Run batches of (sample, task), -1 for no task, and compare each sample with itself alone."""
    generator = torch.Generator().manual_seed(b)
    samples = torch.randn(6, LENGTH, d, generator=generator).to(dtype)
    samples[PADDING] = torch.nan
    weight = torch.randn(d, generator=generator)
    for stack in stacks(d, b, pre, post):
        alone: dict[tuple[int, int], list[torch.Tensor]] = {}
        for batch in batches:
            rows, tasks = (list(each) for each in zip(*batch))
            for length in (LENGTH, 1):
                x, index = samples[rows, :length], torch.tensor(tasks)
                out = stack.adapter(x, 0, index)
                both = stack.adapter_residual(x, x.flip(-1), 0, index, weight=weight)
                trained = out if isinstance(stack, ops.PreparedStack) else stack.adapter(x.requires_grad_(), 0, index)
                for place, (sample, task) in enumerate(batch):
                    if sample == PADDING:
                        continue
                    if (sample, task, length) not in alone:
                        one, of_task = samples[sample, :length].unsqueeze(0), torch.tensor([task])
                        found = [stack.adapter(one, 0, of_task)]
                        found += stack.adapter_residual(one, one.flip(-1), 0, of_task, weight=weight)
                        alone[sample, task, length] = [each[0] for each in found]
                    expected = alone[sample, task, length]
                    for got, one in zip((out, *both, trained.detach()), (*expected, expected[0]), strict=True):
                        assert same_bits(got[place], one), (d, b, pre, post, dtype, batch, place)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == other.dtype and torch.equal(one.view(kind), other.view(kind))


def batches_of(*lists: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Some batches, each forwards, backwards, among padding, and repeated until several blocks are full."""
    return [b for each in lists for b in (each, each[::-1], [(PADDING, 0), *each, (PADDING, -1)], each * 30)]


def check_all() -> None:
    """Every dtype and layout, small and large batches."""
    chosen = batches_of(
        [(0, 1)], [(i % 5, i % TASKS) for i in range(7)], [(i % 5, -1 if i == 2 else 3) for i in range(9)]
    )
    for d, b in SIZES:
        for pre in (False, True):
            for post in (False, True):
                for dtype in DTYPES:
                    check(d, b, pre, post, dtype, chosen)
    for k in (5, 16, 33, 64):
        check_generation(k)


def check_generation(k: int) -> None:
    """Generate from embeddings of width ``k`` in companies of several sizes: from as many as the backend says on, each
    has the bits that it has among all."""
    draw = torch.Generator().manual_seed(k)
    fewest = ops.independent_rows(torch.empty(0))
    assert fewest is not None
    for P in (3, 49, 1031):
        E, G, g0 = (torch.randn(*shape, generator=draw) for shape in ((2, 40, k), (2, P, k), (2, P)))
        every = ops.generate_weights(E, G, g0)
        for n in (*range(fewest, fewest + 9), 31):
            chosen = torch.randperm(40, generator=draw)[:n]
            assert torch.equal(ops.generate_weights(E[:, chosen], G, g0), every[:, chosen]), (k, P, n)


@needs_library
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_every_instruction_set(instructions):
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]\n"
        "from hyperformer_fast import backends\n"
        "report = next(r for r in backends.backend_report() if r['name'] == 'cpu')\n"
        "print(report['reason']) if not report['available'] else None\n"
        "if report['available']:\n    import test_company\n    test_company.check_all()\n    print('the same')\n"
    )
    environment = {**os.environ, ISA_VARIABLE: instructions}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if "the same" not in done.stdout:
        pytest.skip(f"needs a CPU with {instructions}: {done.stdout.strip()}")


@needs_library
@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.tuples(st.integers(0, 5), st.integers(-1, TASKS - 1)), min_size=1, max_size=40),
    size=st.sampled_from(SIZES),
    norms=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_any_batch(batch, size, norms, dtype):
    check(*size, *norms, dtype, [batch])
