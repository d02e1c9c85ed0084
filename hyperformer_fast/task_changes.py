"""Tasks that come to a model and leave it while it is in use: no other weight moves.

Whatever belongs to one task alone is a parameter of its own: its embedding, or its adapters in variant ``"adapters"``.
All other parameters stay the same objects with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import HyperFormerConfig
from .names import NamedParameters
from .sharding import is_sharded

if TYPE_CHECKING:
    from .model import HyperFormerModel


def of_tasks(model: HyperFormerModel) -> dict[str, NamedParameters]:
    """The parameters that belong to one task each, by what they are: ``"task_embedding"``, or ``"adapters.encoder"``
    and the like. In each group they have the names of ``config.embedding_of``. There are none where all tasks train the
    same weights (variant ``"finetuning"``)."""
    groups = {"task_embedding": model.task_embeddings.of_tasks()}
    for stack, net in model.hypernetworks.items():
        part: Any = net
        groups[f"adapters.{stack}"] = part.of_tasks()
    return {name: group for name, group in groups.items() if group is not None}


def own_tensors(model: HyperFormerModel, task: str) -> dict[str, Tensor]:
    """What belongs to ``task`` alone, by what it is. Raises ValueError for an unknown task, or where there is nothing
    of the kind."""
    config = model.hyperformer_config
    config.task_id(task)
    groups = of_tasks(model)
    if not groups:
        raise ValueError(
            f"a task of variant {config.variant!r} has no weights of its own, because all tasks train the whole T5: "
            "there is nothing of it that could go into a file; save the model"
        )
    embedding = config.embedding_of(task)
    return {name: group[embedding].detach() for name, group in groups.items()}


def expect_whole(model: HyperFormerModel) -> None:
    """Raise RuntimeError where this process does not hold all that belongs to the tasks."""
    if any(is_sharded(p) or p.is_meta for part in _parts(model) for p in part.parameters()):
        raise RuntimeError(
            "the hypernetworks of this model are spread over processes or offloaded: add, remove and export tasks in a "
            "model that is whole"
        )


def expect_changeable(model: HyperFormerModel) -> None:
    """Raise RuntimeError where tasks cannot come and go now."""
    expect_whole(model)
    if model._task_gradients is not None:
        raise RuntimeError("the gradients of this model's tasks are being watched: change its tasks after that")


@torch.no_grad()
def insert(model: HyperFormerModel, name: str, values: Mapping[str, Tensor]) -> None:
    """Append a task that has these values of its own, by the names of :func:`own_tensors`.

    They are trained if those of the other tasks are. Raises ValueError where the name is taken.
    """
    with model._task_order.lock:
        expect_changeable(model)
        config = model.hyperformer_config.with_task(name)
        for key, group in of_tasks(model).items():
            like = next(iter(group.values()))
            # a copy that is no inference tensor, whoever calls this
            with torch.inference_mode(False):
                value = values[key].to(like.device, like.dtype, copy=True)
                trained = any(parameter.requires_grad for parameter in group.values())
                group[name] = nn.Parameter(value, requires_grad=trained)
        _take(model, config)
        model._task_order.changed(config.tasks)


def remove(model: HyperFormerModel, name: str) -> None:
    """Take a task out, with all that belongs to it alone. Errors are those of ``HyperFormerModel.remove_task``."""
    with model._task_order.lock:
        expect_changeable(model)
        before = model.hyperformer_config
        config = before.without_task(name)
        embedding = before.embedding_of(name)
        if embedding not in config.embedding_names:
            for group in of_tasks(model).values():
                del group[embedding]
        _take(model, config)
        model._task_order.changed(config.tasks)
        if model.card_metrics:
            model.card_metrics = {task: found for task, found in model.card_metrics.items() if task != name}


def rename(model: HyperFormerModel, old: str, new: str) -> None:
    """Give a task another name. Errors are those of ``HyperFormerModel.rename_task``."""
    with model._task_order.lock:
        expect_changeable(model)
        before = model.hyperformer_config
        config = before.with_task_renamed(old, new)
        was, now = before.embedding_of(old), config.embedding_of(new)
        if was != now:
            for group in of_tasks(model).values():
                group.rename(was, now)
        _take(model, config)
        model._task_order.renamed(old, new, config.tasks)
        if model.card_metrics:
            model.card_metrics = {new if task == old else task: found for task, found in model.card_metrics.items()}


def _parts(model: HyperFormerModel) -> Iterator[nn.Module]:
    yield model.task_embeddings
    yield from model.hypernetworks.values()


def _take(model: HyperFormerModel, config: HyperFormerConfig) -> None:
    model.hyperformer_config = config
    for part in _parts(model):
        part.config = config  # type: ignore[assignment]
