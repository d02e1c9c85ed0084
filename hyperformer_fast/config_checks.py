"""What the fields of a HyperFormerConfig may hold."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HyperFormerConfig


def check_tasks(config: HyperFormerConfig) -> None:
    """Check ``tasks`` and ``task_to_embeddings``, and copy them, so that no two configurations share them.

    Raises:
        ValueError, TypeError: naming the field, its value and what is allowed.
    """
    if isinstance(config.tasks, str) or not isinstance(config.tasks, (list, tuple)):
        raise TypeError(f"tasks must be a list of names, got {config.tasks!r}")
    config.tasks = list(config.tasks)
    for task in config.tasks:
        _check_name("tasks", task)
    if not config.tasks:
        raise ValueError("tasks must name at least one task, got []")
    names = set(config.tasks)
    if len(names) < len(config.tasks):
        repeated = sorted(task for task, count in collections.Counter(config.tasks).items() if count > 1)
        raise ValueError(f"tasks must be unique, got {repeated} more than once")
    if config.task_to_embeddings is None:
        return
    if not isinstance(config.task_to_embeddings, Mapping):
        raise TypeError(f"task_to_embeddings must map task names to embedding names, got {config.task_to_embeddings!r}")
    config.task_to_embeddings = dict(config.task_to_embeddings)
    missing = [task for task in config.tasks if task not in config.task_to_embeddings]
    unknown = [task for task in config.task_to_embeddings if task not in names]
    if missing or unknown:
        raise ValueError(
            f"task_to_embeddings must have exactly the tasks {config.tasks} as keys; "
            f"missing {missing}, unknown {unknown}"
        )
    for name in config.task_to_embeddings.values():
        _check_name("task_to_embeddings", name)


def check_sizes(config: HyperFormerConfig) -> None:
    """Raise ValueError or TypeError unless every size is a whole number of at least 1."""
    for name in ("task_embedding_dim", "projected_task_embedding_dim", "task_hidden_dim", "reduction_factor"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_name(field: str, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{field}: a name must be a non-empty string, got {name!r}")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{field}: {name!r} contains half of a surrogate pair, which UTF-8 cannot encode")
