"""Count the parameters that each variant trains, from its configuration alone (table 1 of the paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .config import HyperFormerConfig
from .hypernetwork import HyperNetwork, TaskEmbeddings

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import T5Config

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

#: Fields of T5Config for the published T5 checkpoints.
T5_SHAPES = {
    "T5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "T5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}

#: Trained parameters per task in percent of the T5, as the paper reports them.
PAPER = {
    ("hyperformer++", "T5-small"): 0.50,
    ("hyperformer++", "T5-base"): 0.29,
    ("hyperformer", "T5-small"): 5.80,
    ("hyperformer", "T5-base"): 6.86,
}


class ParameterCount(NamedTuple):
    """Numbers of parameters that a HyperFormer trains, by part, and of those that its T5 has."""

    hypernetworks: int
    task_embeddings: int
    t5_trained: int
    t5_total: int
    tasks: int

    @property
    def trained(self) -> int:
        return self.hypernetworks + self.task_embeddings + self.t5_trained

    @property
    def percent_per_task(self) -> float:
        """Trained parameters per task, in percent of the T5 (the paper's measure)."""
        return 100 * self.trained / self.t5_total / self.tasks


def count(config: HyperFormerConfig, t5_config: T5Config) -> ParameterCount:
    """Count the parameters of a configuration on the meta device, without allocating any weight."""
    from transformers import T5ForConditionalGeneration

    def numel(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(t5_config)
        decoder_layers = t5_config.num_decoder_layers or t5_config.num_layers
        stacks = [HyperNetwork(config, t5_config.d_model, n) for n in (t5_config.num_layers, decoder_layers)]
        embeddings = TaskEmbeddings(config)
    trained: dict[str, int] = {}
    if config.unfreeze_layer_norms:
        trained |= {name: p.numel() for name, p in t5.named_parameters() if name.endswith("layer_norm.weight")}
    if config.unfreeze_lm_head:
        trained["lm_head"] = t5.lm_head.weight.numel()
    return ParameterCount(
        sum(map(numel, stacks)), numel(embeddings), sum(trained.values()), numel(t5), len(config.tasks)
    )


def published_config(variant: str) -> HyperFormerConfig:
    """Return the paper's configuration of a variant: reduction factor 32 and eight GLUE tasks.

    The paper's per-block HyperFormer has the authors' default of 512-d task embeddings, projected to 64; the shared
    variants have 64-d task embeddings.
    """
    per_block = variant == "hyperformer"
    return HyperFormerConfig(
        tasks=list(GLUE),
        variant=variant,
        reduction_factor=32,
        task_embedding_dim=512 if per_block else 64,
        train_task_embeddings=per_block,
    )


def rows() -> list[tuple[str, str, ParameterCount, float | None]]:
    """Return (variant, T5, count, the paper's percentage or None) for every variant on T5-small and T5-base."""
    from transformers import T5Config

    from .config import VARIANTS

    return [
        (variant, name, count(published_config(variant), T5Config.from_dict(shape)), PAPER.get((variant, name)))
        for variant in VARIANTS
        for name, shape in T5_SHAPES.items()
    ]


def table() -> Table:
    """Return the counts as a table for the terminal."""
    from rich.table import Table

    out = Table("variant", "T5", title="Trained parameters, 8 tasks, reduction factor 32")
    for heading in ("hypernetworks", "embeddings", "T5 norms", "total", "of T5, per task", "paper"):
        out.add_column(heading, justify="right")
    for variant, name, c, paper in rows():
        numbers = [f"{n:,}" for n in (c.hypernetworks, c.task_embeddings, c.t5_trained, c.trained)]
        out.add_row(variant, name, *numbers, f"{c.percent_per_task:.2f} %", "" if paper is None else f"{paper:.2f} %")
    return out
