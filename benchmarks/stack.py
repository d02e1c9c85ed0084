"""Generation and folding of a whole T5's adapters against the original's calls, one layer at a time:
`python benchmarks/stack.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timing import RESULTS, interleaved, machine, show, write

from hyperformer_fast import ops
from hyperformer_fast.hypernetwork import HyperNetwork
from hyperformer_fast.parameters import T5_SHAPES, published_config


def stacks(size: str) -> list[HyperNetwork]:
    """The encoder's and the decoder's hypernetwork of a HyperFormer++."""
    shape = T5_SHAPES[size]
    torch.manual_seed(0)
    return [HyperNetwork(published_config("hyperformer++"), shape["d_model"], shape["num_layers"]) for _ in range(2)]


def per_layer(nets: list[HyperNetwork]):
    """The same weights as AdapterLayersOneHyperNetController makes them: for each site its embedding, then one linear
    generator each for the weights and biases of both projections and of the norm. It does not fold."""
    generators = []
    for net in nets:
        weight, bias = net.generator.weight[0], net.generator.bias[0]
        generators.append([(weight[rows].clone(), bias[rows].clone()) for rows in net.layout.slices.values()])

    def call(task):
        outputs = []
        for net, parts in zip(nets, generators):
            e = net.embeddings(task)
            for site in range(net.num_sites):
                outputs.append([torch.nn.functional.linear(e[site, 0], w, b) for w, b in parts])
        return outputs

    return call


def measure(size: str, rounds: int) -> dict:
    nets, task = stacks(size), torch.randn(1, 64)
    original = per_layer(nets)
    calls = {
        "per layer": lambda: original(task),
        "generate": lambda: [net(task) for net in nets],
        "generate and fold": lambda: [ops.fold(net(task), net.layout, torch.float32) for net in nets],
    }
    with torch.no_grad():
        mine = torch.cat([packed.flatten(0, -2) for packed in calls["generate"]()])
        theirs = torch.stack([torch.cat(parts) for parts in calls["per layer"]()])
        error = ((mine - theirs).norm() / theirs.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"wrong: generated weights differ by {error:.1e}")
        times = interleaved(calls, rounds)
    ours = {name: times["per layer"] / times[name] for name in ("generate", "generate and fold")}
    return {"size": size, "sites": sum(net.num_sites for net in nets), "difference": error, **ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(T5_SHAPES), choices=list(T5_SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="T5-small, one round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    where = machine()
    sizes, rounds = (["T5-small"], 1) if options.quick else (options.sizes, options.rounds)
    results = [measure(size, rounds) for size in sizes]
    rows = [(r["size"], r["sites"], r["generate"], r["generate and fold"]) for r in results]
    columns = ("T5", "sites", "the original's calls over our generation", "... over our generation and folding")
    show("Weights of both stacks, HyperFormer++, one task", where, columns, rows)
    write("stack", where, results, options.output)


if __name__ == "__main__":
    main()
