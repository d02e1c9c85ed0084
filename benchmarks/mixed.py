"""Time several tasks in one batch against one task, and against a loop over the tasks.

python benchmarks/mixed.py [--batch 32] [--length 128] [--tasks 8] [--rounds 15] [--quick] [--output DIR]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from providers import ACTIVATION, DTYPES
from timing import arguments, interleaved, machine, relative_error, show, write
from torch import Tensor

from hyperformer_fast import ops, reference
from hyperformer_fast.layout import AdapterLayout

LAYOUT, EMBEDDING = AdapterLayout(768, 24), 64


def batches(B: int, T: int) -> dict[str, Tensor]:
    """The task of each sample: evenly spread, or most samples in one task."""
    generator = torch.Generator().manual_seed(0)
    uneven = (torch.rand(B, generator=generator) ** 3 * T).long()
    return {"even": torch.arange(B) % T, "uneven": uneven}


class Leaves:
    """A batch, a loss gradient, and the weights of T tasks, as leaves or as what they are generated from."""

    def __init__(self, B: int, L: int, T: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.x, self.g = draw(B, L, LAYOUT.d).to(dtype).requires_grad_(), draw(B, L, LAYOUT.d).to(dtype)
        self.packed = draw(T, LAYOUT.numel) * 0.05
        LAYOUT.unpack(self.packed)["post_gamma"].add_(1)
        self.packed.requires_grad_()
        self.E = draw(1, T, EMBEDDING).requires_grad_()
        self.G = (draw(1, LAYOUT.numel, EMBEDDING) * 0.02).requires_grad_()
        self.g0 = self.packed.detach()[:1].clone().requires_grad_()

    def weights(self, generated: bool) -> tuple[Tensor, list[Tensor]]:
        if not generated:
            return self.packed, [self.x, self.packed]
        return ops.generate_weights(self.E, self.G, self.g0)[0], [self.x, self.E, self.G, self.g0]


def looped(apply: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, packed: Tensor, groups: list[Tensor]) -> Tensor:
    """One call of ``apply`` for each task's samples; the results are put back in the batch's order."""
    parts = [apply(x[rows], packed[t : t + 1], t) for t, rows in enumerate(groups) if len(rows)]
    return torch.cat(parts)[torch.argsort(torch.cat([rows for rows in groups if len(rows)]))]


def providers(leaves: Leaves, index: Tensor, generated: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls by name; each does a forward and a backward and returns [out, gradients...]."""
    dtype, T = leaves.x.dtype, leaves.packed.shape[0]
    groups = [(index == t).nonzero().flatten() for t in range(T)]
    ready = ops.fold(leaves.packed, LAYOUT, dtype)
    ready_for = [ops.fold(leaves.packed[t : t + 1], LAYOUT, dtype) for t in range(T)]

    def run(forward: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            packed, wanted = leaves.weights(generated)
            out = forward(packed)
            return [out, *torch.autograd.grad(out, wanted, leaves.g)]

        return call

    ours = lambda x, packed, t: ops.adapter(  # noqa: E731
        x, packed, LAYOUT, ACTIVATION, None if generated else ready_for[t]
    )
    eager = lambda x, packed, t: reference.adapter(x, packed, LAYOUT, ACTIVATION)  # noqa: E731
    return {
        "mixed": run(
            lambda packed: ops.adapter(leaves.x, packed, LAYOUT, ACTIVATION, None if generated else ready, index)
        ),
        "one task": run(lambda packed: ours(leaves.x, packed[:1], 0)),
        "loop, eager": run(lambda packed: looped(eager, leaves.x, packed, groups)),
        "loop, ours": run(lambda packed: looped(ours, leaves.x, packed, groups)),
    }


def check(calls: dict[str, Callable], leaves: Leaves, index: Tensor, generated: bool) -> dict[str, float | bool]:
    """How far the mixed batch is from float64 and from calls of single tasks.

    Raises:
        SystemExit: it is too far for rounding.
    """
    mixed, by_task = calls["mixed"](), calls["loop, ours"]()
    with torch.no_grad():
        packed, _ = leaves.weights(generated)
        truth = reference.adapter(leaves.x.double(), packed.double(), LAYOUT, ACTIVATION, task_index=index)
    eps = torch.finfo(leaves.x.dtype).eps
    off, concatenated = relative_error(mixed[0], truth), max(map(relative_error, mixed, by_task))
    if not (off <= 4 * eps and concatenated <= 16 * eps):
        raise SystemExit(f"wrong: {off:.1e} off float64, {concatenated:.1e} off single tasks")
    return {
        "off_float64": off,
        "off_single_tasks": concatenated,
        "bits_of_single_tasks": all(torch.equal(a, b) for a, b in zip(mixed[:2], by_task[:2])),
    }


def measure(leaves: Leaves, index: Tensor, generated: bool, rounds: int) -> dict:
    calls = providers(leaves, index, generated)
    checked = check(calls, leaves, index, generated)
    times = interleaved(calls, rounds)
    return {
        **checked,
        "mixed_over_one_task": times["mixed"] / times["one task"],
        "eager_loop_over_mixed": times["loop, eager"] / times["mixed"],
        "our_loop_over_mixed": times["loop, ours"] / times["mixed"],
    }


def main() -> None:
    parser = arguments(__doc__, quick="a small batch, one round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tasks", type=int, default=8)
    options = parser.parse_args()
    B, L, T = (8, 4, 3) if options.quick else (options.batch, options.length, options.tasks)
    where, results = machine(), []
    for name, dtype in DTYPES.items():
        leaves = Leaves(B, L, T, dtype)
        for spread, index in batches(B, T).items():
            for generated in (False, True):
                row = measure(leaves, index, generated, 1 if options.quick else options.rounds)
                results.append({"dtype": name, "tasks": spread, "generation_and_fold": generated, **row})
    columns = ("dtype", "tasks", "generation, fold", "mixed over one task", "eager loop over mixed",
               "our loop over mixed", "equal to single tasks")  # fmt: skip
    rows = [
        (r["dtype"], r["tasks"], "counted" if r["generation_and_fold"] else "given", r["mixed_over_one_task"],
         r["eager_loop_over_mixed"], r["our_loop_over_mixed"],
         "out and dx bit for bit" if r["bits_of_single_tasks"] else f"to {r['off_single_tasks']:.0e}")
        for r in results
    ]  # fmt: skip
    show(f"Forward and backward, d=768, b=24, B={B}, L={L}, {T} tasks", where, columns, rows)
    write("mixed", where, results, options.output)


if __name__ == "__main__":
    main()
