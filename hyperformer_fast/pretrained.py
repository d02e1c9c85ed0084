"""What a HyperFormer checkpoint says, and whether it fits a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import HyperFormerConfig

FORMAT_VERSION = 1

_SAMPLE = "base_sample"
_FACTS = ("model_type", "d_model", "num_layers", "num_decoder_layers", "vocab_size")

# A base model may be saved in float32 and loaded in bfloat16 (relative rounding 2^-9); another model's weights are
# unrelated. Below the absolute one, float16 rounds to nothing.
_RTOL, _ATOL = 1e-2, 1e-6


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint read from ``directory``, known to be whole and of a T5 of the right shape."""

    directory: Path
    config: HyperFormerConfig
    tensors: dict[str, Tensor]

    def expect_config(self, config: HyperFormerConfig) -> None:
        """CheckpointError names the first field in which ``config`` is another one."""
        theirs = self.config.to_dict()
        for field, ours in config.to_dict().items():
            if theirs[field] != ours:
                raise CheckpointError(
                    f"{self.directory}: {field} is {theirs[field]!r} in the checkpoint, {ours!r} in this model"
                )

    def values_for(self, targets: Mapping[str, Tensor], t5: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
        """The value of each target, by name.

        Args:
            targets: all tensors that the checkpoint must hold, and no others.
            t5: the T5 that they are to be loaded on top of.
            trained: names of its parameters that are not frozen.

        Raises:
            CheckpointError: a name is missing or unknown, a shape differs, or the frozen weights are another T5's.
        """
        values = {name: tensor for name, tensor in self.tensors.items() if name != _SAMPLE}
        missing, unknown = sorted(targets.keys() - values.keys()), sorted(values.keys() - targets.keys())
        if missing or unknown:
            what = f"lacks {missing[0]} of this model" if missing else f"has {unknown[0]}, unknown to this model"
            raise CheckpointError(f"{self.directory} {what} ({len(missing)} missing, {len(unknown)} unknown)")
        for name, target in targets.items():
            if values[name].shape != target.shape:
                shapes = f"{list(values[name].shape)} in the checkpoint, {list(target.shape)} in this model"
                raise CheckpointError(f"{self.directory}: {name} is {shapes}")
        self._expect_base(t5, trained)
        return values

    def _expect_base(self, t5: nn.Module, trained: Collection[str]) -> None:
        names, ours = _sample(t5, trained)
        theirs = self.tensors.get(_SAMPLE)
        if theirs is None or theirs.dim() != 1:
            raise CheckpointError(f"{self.directory} lacks {_SAMPLE}, which tells its T5 from others")
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{self.directory} was trained on another T5: it had {len(theirs)} frozen parameters, "
                f"this one has {len(ours)}"
            )
        differs = ~torch.isclose(ours, theirs, rtol=_RTOL, atol=_ATOL, equal_nan=True)
        if differs.any():
            first = int(differs.nonzero()[0])
            raise CheckpointError(
                f"{self.directory} was trained on another T5: its frozen {names[first]} held {theirs[first]:.6g} where "
                f"this one holds {ours[first]:.6g}"
            )


def save(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: HyperFormerConfig,
    t5: nn.Module,
    trained: Collection[str],
) -> None:
    """Save ``tensors``, trained on top of ``t5``, of whose parameters ``trained`` are not frozen. OSError as the system
    says."""
    description = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "config": config.to_dict(),
        "base_model": _facts(t5),
    }
    save_checkpoint(directory, {**tensors, _SAMPLE: _sample(t5, trained)[1]}, description)


def read(directory: str | Path, t5: nn.Module) -> Checkpoint:
    """Read the checkpoint in ``directory``.

    Raises:
        FileNotFoundError: none there.
        CheckpointError: it is broken, of another version, or its T5 was of another shape than ``t5``.
    """
    tensors, description = load_checkpoint(directory)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory} has format version {version!r}; this library reads {FORMAT_VERSION}")
    theirs, ours = description.get("base_model"), _facts(t5)
    theirs = theirs if isinstance(theirs, dict) else {}
    for fact in _FACTS:
        if theirs.get(fact) != ours[fact]:
            raise CheckpointError(
                f"{directory} was trained on another T5: {fact} was {theirs.get(fact)!r}, this one's is {ours[fact]!r}"
            )
    try:
        config = HyperFormerConfig.from_dict(description.get("config"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: {error}") from error
    return Checkpoint(Path(directory), config, tensors)


def _facts(t5: nn.Module) -> dict[str, Any]:
    facts = {"class": type(t5).__name__, "name_or_path": str(t5.config.name_or_path)}
    return facts | {fact: getattr(t5.config, fact) for fact in _FACTS}


def _sample(t5: nn.Module, trained: Collection[str]) -> tuple[list[str], Tensor]:
    """One number out of the middle of every frozen parameter: enough to tell two T5s of one shape apart, in any
    dtype."""
    frozen = {
        name: p.detach() for name, p in sorted(t5.named_parameters()) if name not in trained and p.is_floating_point()
    }
    numbers = [p.flatten()[p.numel() // 2].float() for p in frozen.values()]
    return list(frozen), torch.stack(numbers).cpu() if numbers else torch.empty(0)
