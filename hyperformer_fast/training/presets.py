"""Named sets of arguments to start from, and the learning rate that a method has where none is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import HyperFormerConfig
from ..nearest import did_you_mean
from ..recipes import BEFORE_RECIPES, RECIPES
from .field_checks import RunConfigError

#: What suited the embedded T5 of the first release, which was another, on its built-in tasks.
FIRST_RELEASE_EMBEDDED: dict[str, Any] = {
    "reduction_factor": 4,
    "task_embedding_dim": 16,
    "projected_task_embedding_dim": 16,
    "task_hidden_dim": 32,
    "max_steps": 1200,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "per_device_eval_batch_size": 128,
    "eval_strategy": "steps",
    "eval_steps": 300,
    "max_eval_samples": 100,
    "save_steps": 300,
    "logging_steps": 10,
}

#: The defaults of the first release for a T5 that is named.
FIRST_RELEASE: dict[str, Any] = {
    name: value for name, value in FIRST_RELEASE_EMBEDDED.items() if not name.endswith(("_dim", "reduction_factor"))
} | {"max_steps": 2000, "warmup_steps": 100, "per_device_eval_batch_size": 64}

#: What suits the embedded T5 of today, whose width is 128 too, with the default recipe: a minute or two on two cores.
_DEMO: dict[str, Any] = {
    **FIRST_RELEASE_EMBEDDED,
    "max_steps": 1000,
    "learning_rate": 3e-3,
    "warmup_steps": 100,
    "mixed_batches": True,
    "eval_steps": 100,
    "save_steps": 100,
}

#: Where the rate of what makes the adapters' weights is divided (the rule "fan_in"). The paper's 3e-4, which is the
#: default for all else, is too low for them: docs/choosing.md has the sweeps.
FAN_IN_RATE = 3e-3

PRESETS: Mapping[str, Mapping[str, Any]] = {"demo": _DEMO}


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` on top of the preset that it names.

    Raises:
        RunConfigError: there is no such preset.
    """
    name = given.get("preset")
    if name is None:
        return dict(given)
    if name not in PRESETS:
        raise RunConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{did_you_mean(name, PRESETS)}")
    preset = dict(PRESETS[name])
    if not divides_rates(given):
        # The preset's rate is for generators that get it divided. Undivided, a lower one did better on
        # validation (docs/choosing.md), and a whole T5 wants a lower one, too.
        preset["learning_rate"] = FIRST_RELEASE_EMBEDDED["learning_rate"]
    if "num_train_epochs" in given and "max_steps" not in given:
        del preset["max_steps"]  # it would silently win over the epochs that were asked for
    if given.get("warmup_ratio") and "warmup_steps" not in given:
        del preset["warmup_steps"]  # as it would over the ratio, which transformers 5 no longer has
    return {**preset, **given}


def with_rate(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` with the learning rate of their recipe, where they have none."""
    if "learning_rate" in fields or not divides_rates(fields):
        return dict(fields)
    return {**fields, "learning_rate": FAN_IN_RATE}


def divides_rates(fields: Mapping[str, Any]) -> bool:
    """Whether a run with these arguments has adapters, and the rule of learning rates ``"fan_in"``.

    A run that starts from other weights (``init_from``) has their variant and recipe. Where those cannot be read yet,
    on the Hub or in a run that is not finished, the answer is no: a rate that is too low is warned of, later.
    """
    variant, recipe, rule = (fields.get(name) for name in ("variant", "recipe", "learning_rate_rule"))
    start = fields.get("init_from")
    if start is not None:
        try:
            config = HyperFormerConfig.load(start)
            variant, recipe = config.variant, config.recipe
        except (OSError, ValueError, TypeError):
            recipe = recipe or BEFORE_RECIPES
    of_recipe = RECIPES.get(recipe or HyperFormerConfig.recipe)
    return (rule or (of_recipe and of_recipe.learning_rate_rule)) == "fan_in" and variant != "finetuning"
