"""Generation and folding of whole stacks: one call for all sites against the authors' calls, site by site."""

from __future__ import annotations

import pytest
import torch
from stack import FOLD, GENERATE, ORIGINAL, providers, stacks

from hyperformer_fast import ops
from hyperformer_fast.backends import use_backend
from hyperformer_fast.parameters import T5_SHAPES


@pytest.mark.parametrize("provider", [ORIGINAL, GENERATE, FOLD])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("size", T5_SHAPES)
def test_a_whole_t5(benchmark, size, backward, provider):
    benchmark.group = f"generate {size} HyperFormer++, {'forward+backward' if backward else 'forward'}"
    both = stacks(size)
    for stack in both:
        stack.difference()
    benchmark(providers(both, backward)[provider])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fold(benchmark, backend):
    benchmark.group = "fold T5-base, one stack"
    stack = stacks("T5-base")[0]
    with torch.no_grad():
        packed = stack.generate(stack.ours)
    with use_backend(backend):
        benchmark(lambda: ops.fold(packed, stack.layout, torch.float32))
