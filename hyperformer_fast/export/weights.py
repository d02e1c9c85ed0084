"""The packed weights of chosen tasks, outside of any forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sharding import is_sharded

if TYPE_CHECKING:
    from ..model import HyperFormerModel


def packed_weights(model: HyperFormerModel, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Return the packed weights [S, T, P] of each stack for the tasks of these names; empty without adapters.

    Raises:
        ValueError: a task is unknown, FSDP shards them, or they are not in memory.
    """
    expect_whole(model.task_embeddings)
    expect_whole(model.hypernetworks)
    nets: Any = model.hypernetworks
    # the lock, so that names and embeddings are of one moment
    with model._task_order.lock, torch.inference_mode(False), torch.no_grad():
        of_tasks: Any = model.task_embeddings
        embeddings = of_tasks.each(model.hyperformer_config.task_ids(tasks))
        return {name: net.forward_each(embeddings) for name, net in nets.items()}


def expect_whole(module: nn.Module) -> None:
    """Raise ValueError where a parameter is spread over processes, or not in memory."""
    for name, parameter in module.named_parameters():
        if is_sharded(parameter) or parameter.is_meta:
            raise ValueError(
                f"{name} is spread over processes or not in memory: load a saved checkpoint into a model of one process"
            )
