"""Generation and folding of whole stacks: one call for all sites against one call per layer, as the authors' code."""

from __future__ import annotations

import pytest
import torch
from stack import per_layer, stacks

from hyperformer_fast import ops
from hyperformer_fast.parameters import T5_SHAPES

TASKS = 1


@pytest.mark.parametrize("provider", ["per layer", "hyperformer_fast"])
@pytest.mark.parametrize("size", T5_SHAPES)
def test_generate_and_fold(benchmark, size, provider):
    benchmark.group = f"generate+fold {size} HyperFormer++"
    nets, task = stacks(size), torch.randn(TASKS, 64)

    def ours():
        return [ops.fold(net(task), net.layout, torch.float32) for net in nets]

    with torch.no_grad():
        original = per_layer(nets)
        benchmark(ours if provider == "hyperformer_fast" else lambda: original(task))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fold(benchmark, backend):
    from hyperformer_fast.backends import use_backend

    benchmark.group = "fold T5-base, one stack"
    net = stacks("T5-base")[0]
    with torch.no_grad():
        packed = net(torch.randn(TASKS, 64))
    with use_backend(backend):
        benchmark(lambda: ops.fold(packed, net.layout, torch.float32))
