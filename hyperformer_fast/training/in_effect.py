"""What the arguments of a run come to where they were left out: to give such a value is to ask for the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import HyperFormerConfig
from ..recipes import learning_rate_rule
from .arguments import RunArguments


def in_effect(
    run: RunArguments, tasks: Sequence[str], selecting: bool, config: HyperFormerConfig | None = None
) -> dict[str, Any]:
    """What those arguments come to that may be left out for a value that could also be given.

    Args:
        run: the arguments.
        tasks: the tasks that they train.
        selecting: whether evaluations choose the weights.
        config: that of the run's model, where it starts from another's weights and the arguments do not tell it.
    """
    flat = run.to_dict()
    found: dict[str, Any] = {
        "add_prefix": run.adds_prefix,
        "split_validation_test": _or(run.data.split_validation_test, selecting),
        "tasks": _or(run.data.tasks, list(tasks)),
        "tokenizer_name": _or(run.model.tokenizer_name, run.model.model_name_or_path),
    }
    if run.model.init_from is None:
        config = run.hyperformer_config(list(run.adapters.task_to_embeddings or tasks or ["task"]))
        found |= {field: value for field, value in config.to_dict().items() if field != "tasks"}
    elif config is not None:
        of_model = config.to_dict()
        found |= {field: _or(value, of_model[field]) for field, value in vars(run.adapters).items()}
    if config is not None:
        found["learning_rate_rule"] = learning_rate_rule(config, flat.get("learning_rate_rule"))
    return found


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
