"""The mark in a state dict that says that its model normalises embeddings before it reads them.

The tensors of a state dict do not say how they are read: those of recipe "authors" fit a model of recipe "default",
which would compute something else with them. So each module that reads normalised embeddings has one more entry in its
state dict, and loads nothing strictly without it. One that reads them as they are has no such entry, as no model had
before there were recipes, and refuses it.

The entry is what PyTorch calls extra state, and not a buffer: DDP would send a buffer to all processes in every
forward. Our checkpoint files do not have it, because they hold the configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded

if TYPE_CHECKING:
    from .config import HyperFormerConfig

#: The name of the mark among the submodules of what reads embeddings, and that of its entry in a state dict.
_NAME = "normalized"
_ENTRY = f"{_NAME}._extra_state"


class EmbeddingMark(nn.Module):
    """Holds nothing, and marks a state dict by an entry of its own."""

    def get_extra_state(self) -> Tensor:
        """Return what the entry holds: a tensor, as safetensors and ``torch.load(weights_only=True)`` want it."""
        return torch.ones((), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Accept the entry. It says all by being there."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not any(map(_waits_for_values, destination.values())):
            super()._save_to_state_dict(destination, prefix, keep_vars)


class EmbeddingReader(nn.Module):
    """What reads embeddings as its configuration says: a base class that marks and checks state dicts."""

    config: HyperFormerConfig

    def mark_state_dicts(self) -> None:
        """Mark the state dicts of this module if it normalises embeddings. To be called at the end of ``__init__``."""
        if self.config.normalize_embeddings:
            self.add_module(_NAME, EmbeddingMark())

    def read_otherwise(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Say why the entries of ``state_dict`` that begin with ``prefix`` are of a module that reads embeddings in
        another way than this one does, and what to do. None: they are not, or there are none."""
        # torch.distributed.checkpoint puts something else where an entry should be that was not there.
        marked, ours = isinstance(state_dict.get(prefix + _ENTRY), Tensor), self.config.normalize_embeddings
        if marked == ours or not any(name.startswith(prefix) for name in state_dict):
            return None
        if marked:
            return (
                'the state dict is of a model that normalises its embeddings (recipe "default"), by its entry '
                f"{_ENTRY}. This model reads them as they are, and would compute something else with these weights: "
                'load them into one whose configuration has recipe "default", or normalize_embeddings=True'
            )
        if any(map(_waits_for_values, self.parameters())):
            return None
        return (
            f"the state dict has no entry {_ENTRY}, so it is of a model that reads its embeddings as they are (recipe "
            '"authors", as everything that was saved before there were recipes). This model normalises them, and would '
            'compute something else with these weights: load them into one whose configuration has recipe "authors", '
            "or normalize_embeddings=False. If they are of a model that normalises them all the same, add to the state "
            f"dict what model.state_dict() has under names that end in {_ENTRY}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        reason = self.read_otherwise(state_dict, prefix)
        if reason is not None:
            # PyTorch tells no module whether the load is strict. If it is, the entry is missing or unexpected.
            warnings.warn(reason, stacklevel=2)
        elif self.config.normalize_embeddings and any(map(_waits_for_values, self.parameters())):
            state_dict.setdefault(prefix + _ENTRY, torch.ones((), dtype=torch.uint8))
        super()._load_from_state_dict(state_dict, prefix, *args)


def read_otherwise(model: nn.Module, state_dict: Mapping[str, Any]) -> str | None:
    """Say why a state dict of ``model`` is of one that reads embeddings in another way, or None."""
    parts = ((name, part) for name, part in model.named_modules() if isinstance(part, EmbeddingReader))
    return next(filter(None, (part.read_otherwise(state_dict, f"{name}.") for name, part in parts)), None)


def _waits_for_values(tensor: Any) -> bool:
    """Whether ``tensor`` is sharded and has no values yet: accelerate spreads a model over processes through state
    dicts of such, in which it takes each entry for a sharded parameter."""
    return isinstance(tensor, Tensor) and tensor.is_meta and is_sharded(tensor)
