"""Time the generation and folding of a whole T5's adapters against the authors' calls, site by site.

    python benchmarks/stack.py [--sizes T5-small T5-base] [--rounds 15] [--quick] [--output DIR]

HyperFormer++ as published (reduction factor 32, 64-d embeddings), encoder and decoder, one task, float32. The weights
and the gradients of every parameter are compared with float64 before anything is timed. The original does not fold,
since its norm runs over each row later: "generate" compares like with like, "generate and fold" is what our step takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from original import OriginalStack
from timing import arguments, interleaved, machine, relative_error, show, write
from torch import Tensor

from hyperformer_fast import official, ops
from hyperformer_fast.parameters import T5_SHAPES

ORIGINAL, GENERATE, FOLD = "original", "generate", "generate and fold"
REDUCTION, TASK, NET = 32, "task_embedding_controller.task_to_embeddings.task", "adapter_layers_hyper_net."
#: Of an error relative to float64; the gradient of the task's embedding is a sum over all generated numbers.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


class Stack:
    """One stack as the authors compute it and as we do, with the same parameters, and a gradient of its weights.

    Args:
        d: width.
        layers: blocks.
    """

    def __init__(self, d: int, layers: int):
        self.layers = layers
        self.original = OriginalStack(d, d // REDUCTION, layers)
        self.task = torch.randn(64, requires_grad=True)
        config = {
            "tasks": ["task"], "input_dim": d, "reduction_factor": REDUCTION, "non_linearity": "gelu_new",
            "task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 128,
            "efficient_unique_hyper_net": True, "unique_hyper_net_layer_norm": True, "train_task_embeddings": False,
            "add_layer_norm_before_adapter": False, "add_layer_norm_after_adapter": True,
            "conditional_layer_norm": True,
        }  # fmt: skip
        state = {f"{NET}{name}": tensor for name, tensor in self.original.state_dict().items()}
        state[TASK] = self.task.detach()
        self.ours = official.build_stack(config, layers, state)
        self.truth = official.build_stack(config, layers, {name: tensor.double() for name, tensor in state.items()})
        self.layout = self.ours.hypernetwork.layout
        self.g = torch.randn(2 * layers, 1, self.layout.numel)
        # the original generates block by block, ours position by position
        sites = [position * layers + layer for layer in range(layers) for position in range(2)]
        self.g_parts = [part for site in sites for part in self.layout.unpack(self.g[site, 0]).values()]

    def generate(self, stack: official.OfficialStack) -> Tensor:
        """Our generation: packed [sites, 1, P]."""
        return stack.hypernetwork(stack.task_embeddings())

    def generate_and_fold(self) -> Tensor:
        """Our generation and fold; returns the packed weights, to which the gradient flows."""
        packed = self.generate(self.ours)
        ops.fold(packed, self.layout, torch.float32)
        return packed

    def backward(self, who: str) -> tuple[Tensor, ...]:
        """A forward and a backward; returns the gradients of every parameter."""
        if who == ORIGINAL:
            parts = [part for block in self.original(self.task) for site in block for part in site]
            return torch.autograd.grad(parts, [self.task, *self.original.parameters()], self.g_parts)
        packed = self.generate_and_fold() if who == FOLD else self.generate(self.ours)
        return torch.autograd.grad(packed, list(self.ours.parameters()), self.g)

    def difference(self) -> float:
        """The largest relative error of the weights and gradients, theirs and ours, from float64.

        Raises:
            SystemExit: it is too large for rounding.
        """
        truth, worst = self._ours(self.truth), 0.0
        for who, found in ((ORIGINAL, self._theirs()), (GENERATE, self._ours(self.ours))):
            for name, tensor in found.items():
                error = relative_error(tensor, truth[name])
                if not error <= TOLERANCE:
                    raise SystemExit(f"wrong: {who}: {name} is off by {error:.1e} relative to float64")
                worst = max(worst, error)
        return worst

    def _theirs(self) -> dict[str, Tensor]:
        blocks = self.original(self.task)
        sites = [blocks[layer][position] for position in range(2) for layer in range(self.layers)]
        packed = torch.stack([torch.cat([part.flatten() for part in site]) for site in sites]).unsqueeze(1)
        task, *rest = self.backward(ORIGINAL)
        names = [f"{NET}{name}" for name, _ in self.original.named_parameters()]
        return {"packed": packed, TASK: task, **dict(zip(names, rest, strict=True))}

    def _ours(self, stack: official.OfficialStack) -> dict[str, Tensor]:
        packed = self.generate(stack)
        packed.backward(self.g.to(packed.dtype))
        gradients = official.export_gradients(stack)
        stack.zero_grad()
        return {"packed": packed.detach(), **gradients}


def providers(stacks: list[Stack], backward: bool) -> dict[str, Callable[[], object]]:
    if backward:
        return {who: lambda who=who: [s.backward(who) for s in stacks] for who in (ORIGINAL, GENERATE, FOLD)}
    forward = {
        ORIGINAL: lambda: [s.original(s.task) for s in stacks],
        GENERATE: lambda: [s.generate(s.ours) for s in stacks],
        FOLD: lambda: [s.generate_and_fold() for s in stacks],
    }
    return {who: torch.no_grad()(call) for who, call in forward.items()}


def stacks(size: str) -> list[Stack]:
    """The stacks of the encoder and the decoder."""
    shape = T5_SHAPES[size]
    torch.manual_seed(0)
    return [Stack(shape["d_model"], shape["num_layers"]) for _ in range(2)]


def measure(size: str, rounds: int) -> list[dict]:
    both = stacks(size)
    difference = max(stack.difference() for stack in both)
    results = []
    for backward in (False, True):
        times = interleaved(providers(both, backward), rounds)
        ratios = {name: times[ORIGINAL] / times[name] for name in (GENERATE, FOLD)}
        results.append({
            "size": size, "sites": 4 * T5_SHAPES[size]["num_layers"], "backward": backward, "difference": difference,
            **ratios,
        })  # fmt: skip
    return results


def main() -> None:
    parser = arguments(__doc__, quick="T5-small, one round")
    parser.add_argument("--sizes", nargs="+", default=list(T5_SHAPES), choices=list(T5_SHAPES))
    options = parser.parse_args()
    where = machine()
    sizes, rounds = (["T5-small"], 1) if options.quick else (options.sizes, options.rounds)
    results = [row for size in sizes for row in measure(size, rounds)]
    rows = [
        (r["size"], r["sites"], "fwd+bwd" if r["backward"] else "fwd", r[GENERATE], r[FOLD], f"{r['difference']:.0e}")
        for r in results
    ]
    columns = ("T5", "sites", "pass", "original over generation", "original over generation and fold", "error")
    show("Weights of both stacks, HyperFormer++, one task", where, columns, rows)
    write("stack", where, results, options.output)


if __name__ == "__main__":
    main()
