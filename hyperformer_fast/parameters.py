"""Count the parameters that each method trains, from its configuration alone (table 1 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .config import VARIANTS, HyperFormerConfig
from .methods import build_parts, freeze_but_task_embeddings
from .t5 import trained_names

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import T5Config

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

#: Fields of T5Config for the published T5 checkpoints.
T5_SHAPES = {
    "T5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "T5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}

#: The names here of the paper's two methods that train a model for each task.
SINGLE_TASK = {"adapters": "adapters, one task", "finetuning": "finetuning, one task"}

#: Trained parameters per task in percent of the T5, as the paper reports them.
PAPER = {
    ("hyperformer++", "T5-small"): 0.50,
    ("hyperformer++", "T5-base"): 0.29,
    ("hyperformer", "T5-small"): 5.80,
    ("hyperformer", "T5-base"): 6.86,
    ("adapters", "T5-small"): 0.68,
    ("adapters", "T5-base"): 0.82,
    ("adapters, one task", "T5-small"): 0.74,
    ("adapters, one task", "T5-base"): 0.87,
    ("finetuning", "T5-small"): 12.5,
    ("finetuning", "T5-base"): 12.5,
    ("finetuning, one task", "T5-small"): 100.0,
    ("finetuning, one task", "T5-base"): 100.0,
}


class ParameterCount(NamedTuple):
    """Numbers of parameters that a model trains, by part, and of those that its T5 has."""

    hypernetworks: int  #: in variant "adapters" the learned adapters
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

    layers = {"encoder": t5_config.num_layers, "decoder": t5_config.num_decoder_layers or t5_config.num_layers}
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(t5_config)
        embeddings, stacks = build_parts(config, t5_config.d_model, layers)
    t5_total = numel(t5)
    names = trained_names(t5, config)
    if config.freeze_model_but_task_embeddings:
        freeze_but_task_embeddings(embeddings, stacks, t5)
    of_t5 = sum(p.numel() for name, p in t5.named_parameters() if name in names and p.requires_grad)
    of_stacks, of_embeddings = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (stacks, embeddings)
    )
    return ParameterCount(of_stacks, of_embeddings, of_t5, t5_total, len(config.tasks))


def by_configuration(config: HyperFormerConfig, tensors: Mapping[str, Tensor], t5_total: int) -> ParameterCount:
    """Count what a configuration trains among the ``tensors`` of a checkpoint, whatever requires a gradient now."""
    alone = config.freeze_model_but_task_embeddings

    def numel(start: str) -> int:
        return sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(start))

    embeddings = numel("task_embeddings.task_to_embeddings." if alone else "task_embeddings.")
    rest = (0, 0) if alone else (numel("hypernetworks."), numel("t5."))
    return ParameterCount(rest[0], embeddings, rest[1], t5_total, len(config.tasks))


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
    """Return (method, T5, count, the paper's percentage or None) for every method on T5-small and T5-base."""
    from transformers import T5Config

    methods = {variant: published_config(variant) for variant in VARIANTS}
    methods |= {name: methods[variant].replace(tasks=[GLUE[0]]) for variant, name in SINGLE_TASK.items()}
    return [
        (method, name, count(config, T5Config.from_dict(shape)), PAPER.get((method, name)))
        for method, config in methods.items()
        for name, shape in T5_SHAPES.items()
    ]


def table() -> Table:
    """Return the counts as a table for the terminal."""
    from rich.table import Table

    out = Table("method", "T5", title="Trained parameters, 8 tasks unless one is said, reduction factor 32")
    for heading in ("hypernetworks or adapters", "embeddings", "of the T5", "total", "of T5, per task", "paper"):
        out.add_column(heading, justify="right")
    for method, name, c, paper in rows():
        numbers = [f"{n:,}" for n in (c.hypernetworks, c.task_embeddings, c.t5_trained, c.trained)]
        out.add_row(method, name, *numbers, f"{c.percent_per_task:.2f} %", "" if paper is None else f"{paper:.2f} %")
    return out
