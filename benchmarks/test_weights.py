"""Generation and folding of whole stacks: one call for all sites against one call per layer, as the authors' code."""

from __future__ import annotations

import pytest
import torch

from hyperformer_fast import ops
from hyperformer_fast.hypernetwork import HyperNetwork
from hyperformer_fast.parameters import T5_SHAPES, published_config

TASKS = 1


def _stacks(size: str):
    shape = T5_SHAPES[size]
    torch.manual_seed(0)
    return [HyperNetwork(published_config("hyperformer++"), shape["d_model"], shape["num_layers"]) for _ in range(2)]


def _per_layer(nets):
    """Eight linear generators called for each site, as AdapterLayersOneHyperNetController calls them (it does not
    fold)."""
    generators = []
    for net in nets:
        weight, bias = net.generator.weight[0], net.generator.bias[0]
        generators.append([(weight[rows].clone(), bias[rows].clone()) for rows in net.layout.slices.values()])

    def call(task):
        outputs = []
        for net, parts in zip(nets, generators):
            e = net.embeddings(task)
            outputs += [
                [torch.nn.functional.linear(e[site, 0], w, b) for w, b in parts] for site in range(net.num_sites)
            ]
        return outputs

    return call


@pytest.mark.parametrize("provider", ["per layer", "hyperformer_fast"])
@pytest.mark.parametrize("size", T5_SHAPES)
def test_generate_and_fold(benchmark, size, provider):
    benchmark.group = f"generate+fold {size} HyperFormer++"
    nets, task = _stacks(size), torch.randn(TASKS, 64)

    def ours():
        return [ops.fold(net(task), net.layout, torch.float32) for net in nets]

    with torch.no_grad():
        per_layer = _per_layer(nets)
        benchmark(ours if provider == "hyperformer_fast" else lambda: per_layer(task))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_fold(benchmark, backend):
    from hyperformer_fast.backends import use_backend

    benchmark.group = "fold T5-base, one stack"
    net = _stacks("T5-base")[0]
    with torch.no_grad():
        packed = net(torch.randn(TASKS, 64))
    with use_backend(backend):
        benchmark(lambda: ops.fold(packed, net.layout, torch.float32))
