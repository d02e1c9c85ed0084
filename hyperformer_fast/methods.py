"""What each variant puts into a model, and which of the T5's parameters it trains beside that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter_table import AdapterTable, TaskNumbers
from .config import HyperFormerConfig
from .hypernetwork import HyperNetwork, TaskEmbeddings


def build_parts(
    config: HyperFormerConfig, d: int, layers: Mapping[str, int]
) -> tuple[TaskEmbeddings | TaskNumbers, nn.ModuleDict]:
    """Build what reads the tasks, and what makes the adapters' weights of each stack.

    Args:
        config: the configuration.
        d: the width of the T5.
        layers: the number of blocks of each stack.

    Returns:
        The task embeddings (or numbers, where nothing is generated), and the stacks' modules by name: hypernetworks, or
        tables of learned adapters. There are none in variant ``"finetuning"``, which has no adapters.
    """
    if config.has_hypernetworks:
        nets = {stack: HyperNetwork(config, d, n) for stack, n in layers.items()}
        return TaskEmbeddings(config), nn.ModuleDict(nets)
    tables = {stack: AdapterTable(config, d, n) for stack, n in layers.items() if config.variant == "adapters"}
    return TaskNumbers(config), nn.ModuleDict(tables)


def freeze_but_task_embeddings(task_embeddings: nn.Module, *others: nn.Module) -> None:
    """Leave nothing trained but the tasks' own embeddings (``freeze_model_but_task_embeddings``)."""
    for module in (task_embeddings, *others):
        module.requires_grad_(False)
    embeddings: Any = task_embeddings.task_to_embeddings
    for parameter in embeddings.values():
        parameter.requires_grad_(True)
