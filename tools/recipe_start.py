"""Measure where each way to start a HyperFormer++ puts its tasks, and where a few steps of Adam take them.

python tools/recipe_start.py             # prints the table
python tools/recipe_start.py --write     # and writes it to tools/results/

The hypernetwork is that of the paper (k = 64, hidden width 128) for a small encoder (three blocks of width 128) and
eight tasks. It is trained to generate adapters that were drawn for each task and site, half of each being the same for
all tasks. Every number is the mean over three seeds.

- e: root mean square of what the generators read, before the layer norm behind the projector
- cosine of e: between the tasks' inputs of the generators at one site, mean over pairs and sites
- cosine of weights: the same of generated down-projections
- moved: by how much, relative to its size, a step changes e, and a generated down-projection
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import records
import torch
from torch import Tensor

from hyperformer_fast import HyperFormerConfig
from hyperformer_fast.hypernetwork import HyperNetwork, TaskEmbeddings
from hyperformer_fast.initialisation import Initialisation, draw_projections
from hyperformer_fast.learning_rates import place_parts

TASKS, WIDTH, LAYERS, STEPS, SEEDS = 8, 128, 3, (0, 1, 10), range(3)

CASES: dict[str, dict[str, Any]] = {
    "authors, uniform": {"recipe": "authors"},
    "authors, normalised, uniform": {"recipe": "authors", "normalize_embeddings": True},
    "hyperfan_in, uniform": {"init_weights": "hyperfan_in"},
    "hyperfan_in, fan_in": {"init_weights": "hyperfan_in"},
    "hyperfan_out, fan_in": {"init_weights": "hyperfan_out"},
    "authors, fan_in": {"recipe": "authors"},
}


def cosine(vectors: Tensor) -> float:
    """The mean cosine between the tasks' vectors [S, T, n]."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    pairs = itertools.combinations(range(vectors.shape[1]), 2)
    return torch.stack([(unit[:, i] * unit[:, j]).sum(-1).mean() for i, j in pairs]).mean().item()


class Start:
    """One hypernetwork in training."""

    def __init__(self, fields: dict[str, Any], rule: str, rate: float, seed: int):
        torch.manual_seed(seed)
        config = HyperFormerConfig(tasks=[f"task{i}" for i in range(TASKS)], **fields)
        self.embeddings, self.net = TaskEmbeddings(config), HyperNetwork(config, WIDTH, LAYERS)
        layout = self.net.layout
        self.down = layout.slices["down_weight"]
        sizes = 2 * LAYERS, TASKS, layout.numel - layout.norm_numel
        common, own = (draw_projections(torch.empty(s), layout, Initialisation("hyperfan_in")) for s in
                       ((sizes[0], 1, sizes[2]), sizes))  # fmt: skip
        self.target = (common + own) / 2**0.5
        places = place_parts([self.embeddings, self.net], config, rule)
        self.optimizer = torch.optim.Adam(
            [{"params": [p], "lr": rate * places[id(p)].scale}
             for part in (self.embeddings, self.net) for p in part.parameters()]
        )  # fmt: skip

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """The generators' inputs before and behind their layer norm, and the generated down-projections."""
        with torch.no_grad():
            norm = self.net.embedding_norm
            self.net.embedding_norm = None
            before = self.net.embeddings(self.embeddings())
            self.net.embedding_norm = norm
            return before, self.net.embeddings(self.embeddings()), self.net(self.embeddings())[..., self.down]

    def step(self) -> None:
        """One step of Adam towards the drawn adapters."""
        self.optimizer.zero_grad()
        generated = self.net(self.embeddings())[..., : self.target.shape[-1]]
        (generated - self.target).square().sum(-1).mean().backward()
        self.optimizer.step()


def measure(fields: dict[str, Any], rule: str, rate: float, seed: int) -> dict[str, float]:
    """The numbers of one row of the table, for one seed."""
    start, found = Start(fields, rule, rate, seed), dict[str, float]()
    last: tuple[Tensor, Tensor] | None = None
    for step in range(max(STEPS) + 1):
        before, e, weights = start.read()
        if step == 0:
            found["e"] = before.square().mean().sqrt().item()
        if step in STEPS:
            found[f"cosine of e, {step} steps"] = cosine(e)
            found[f"cosine of weights, {step} steps"] = cosine(weights)
        if step == 1 and last is not None:
            for name, now, was in (("e", e, last[0]), ("weights", weights, last[1])):
                found[f"{name} moved"] = ((now - was).square().mean() / was.square().mean()).sqrt().item()
        last = e, weights
        start.step()
    return found


def rows(rate: float) -> list[dict[str, object]]:
    """The table at one learning rate."""
    made: list[dict[str, object]] = []
    for name, fields in CASES.items():
        each = [measure(fields, name.rpartition(", ")[2], rate, seed) for seed in SEEDS]
        means = {column: f"{statistics.mean(one[column] for one in each):.3g}" for column in each[0]}
        made.append({"start, rule": name, "rate": f"{rate:g}", **means})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tools/results/recipe_start.json and .md")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2])
    arguments = parser.parse_args()
    made = [row for rate in arguments.rates for row in rows(rate)]
    for row in made:
        print(row)
    if arguments.write:
        folder = Path(__file__).parent / "results"
        records.write(
            "recipe_start", "Where the tasks of a HyperFormer++ start", "python tools/recipe_start.py --write", made,
            folder, torch=torch.__version__,
        )  # fmt: skip


if __name__ == "__main__":
    main()
