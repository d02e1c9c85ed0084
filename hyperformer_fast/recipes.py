"""Recipes: named sets of choices of how adapters start and how fast each part of a model learns.

A choice that a configuration leaves open (None) is what its recipe says. ``initialisation.py`` carries out the first
two, ``hypernetwork.py`` the third, ``learning_rates.py`` the fourth.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .config import HyperFormerConfig

#: How weights are drawn; ``initialisation.py`` has the formulas.
INITIALISATIONS = ("authors", "hyperfan_in", "hyperfan_out")

#: How the learning rate of each part follows from the one that is set; ``learning_rates.py`` has the formulas.
LEARNING_RATE_RULES = ("uniform", "fan_in")


class Recipe(NamedTuple):
    """What a recipe sets where nothing else is said."""

    init_weights: str
    zero_delta: bool
    normalize_embeddings: bool
    learning_rate_rule: str


#: Recipe by name. A configuration that was saved before there were recipes is of ``"authors"``.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "default": Recipe(
            init_weights="hyperfan_in", zero_delta=False, normalize_embeddings=True, learning_rate_rule="fan_in"
        ),
        "authors": Recipe(
            init_weights="authors", zero_delta=False, normalize_embeddings=False, learning_rate_rule="uniform"
        ),
    }
)

#: The recipe of everything that was trained, or configured, before there were recipes, and of the authors' own files.
BEFORE_RECIPES = "authors"

#: The fields of HyperFormerConfig that a recipe sets.
OF_THE_CONFIG = ("init_weights", "zero_delta", "normalize_embeddings")


def settle(config: HyperFormerConfig) -> None:
    """Give the fields of ``config`` that are None the values of its recipe.

    Raises:
        ValueError, TypeError: naming the field, its value and what is allowed.
    """
    if config.recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {config.recipe!r}")
    recipe = RECIPES[config.recipe]
    for name in OF_THE_CONFIG:
        if getattr(config, name) is None:
            setattr(config, name, getattr(recipe, name))
    if config.init_weights not in INITIALISATIONS:
        raise ValueError(f"init_weights must be one of {', '.join(INITIALISATIONS)}, got {config.init_weights!r}")
    for name in OF_THE_CONFIG[1:]:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True, False or None (as the recipe says), got {getattr(config, name)!r}")


def learning_rate_rule(config: HyperFormerConfig, rule: str | None = None) -> str:
    """Return ``rule``, or that of the configuration's recipe where it is None. Raises ValueError for an unknown one."""
    chosen = RECIPES[config.recipe].learning_rate_rule if rule is None else rule
    if chosen not in LEARNING_RATE_RULES:
        raise ValueError(
            f"learning_rate_rule must be one of {', '.join(LEARNING_RATE_RULES)}, or None for the recipe's, "
            f"got {chosen!r}"
        )
    return chosen
