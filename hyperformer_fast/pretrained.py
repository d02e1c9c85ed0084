"""Save a model's checkpoint, and check whether a checkpoint fits a model."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, fingerprint
from .checkpoint import DIGEST, CheckpointError, CheckpointFile, LoadedCheckpoint, save_checkpoint
from .config import HyperFormerConfig
from .methods import build_parts
from .sharding import is_sharded, whole_state
from .sites import find_sites
from .tiny import EMBEDDED, name_of

FORMAT_VERSION = 1

_SAMPLE = "base_sample"
_RECORD = "frozen"
_FACTS = ("model_type", "d_model", "num_layers", "num_decoder_layers", "vocab_size")
#: Fields of a T5's configuration by which the same weights compute something else.
_COMPUTATION = ("feed_forward_proj", "layer_norm_epsilon", "relative_attention_max_distance")
#: Fields of a T5's configuration that say how and by what it was loaded, and not what it is.
_NOT_OF_THE_T5 = ("_name_or_path", "dtype", "quantization_config", "torch_dtype", "transformers_version")
_SIZES = ("task_embedding_dim", "projected_task_embedding_dim", "task_hidden_dim", "reduction_factor")

#: No tensor of a larger width can exist, and torch computes wrong sizes for one.
_LARGEST_SIZE = 2**31 - 1

#: The dtypes that a checkpoint's tensors may have, as safetensors spells them.
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint whose description has been checked against a T5's shape, and whose tensors are not read yet.

    Attributes:
        directory: where it lies; what stands for that in messages, if its tensors came from elsewhere.
        config: its configuration.
        file: its description and tensors.
    """

    directory: str | Path
    config: HyperFormerConfig
    file: CheckpointFile | LoadedCheckpoint

    def expect_config(self, config: HyperFormerConfig) -> None:
        """Raise CheckpointError, which names the first field that differs, if ``config`` is not the checkpoint's."""
        theirs = self.config.to_dict()
        for field, ours in config.to_dict().items():
            if theirs[field] != ours:
                raise CheckpointError(
                    f"{self.directory}: {field} is {theirs[field]!r} in the checkpoint, {ours!r} in this model"
                )

    def expect(self, shapes: Mapping[str, Collection[int]], t5: nn.Module, trained: Collection[str]) -> None:
        """Check that the checkpoint fits a model, which need not exist yet, before any of its parameters is changed.

        Args:
            shapes: names and shapes of exactly the tensors that the checkpoint must have.
            t5: the T5 that the model is built on.
            trained: names of the T5's parameters that are not frozen.

        Raises:
            CheckpointError: a name is missing or unknown, a shape or dtype differs, the digest is wrong, or the frozen
                weights are those of another T5.
        """
        theirs = {name: shape for name, shape in self.file.shapes.items() if name != _SAMPLE}
        missing, unknown = sorted(shapes.keys() - theirs.keys()), sorted(theirs.keys() - shapes.keys())
        if missing or unknown:
            what = f"lacks {missing[0]} of this model" if missing else f"has {unknown[0]}, unknown to this model"
            raise CheckpointError(f"{self.directory} {what} ({len(missing)} missing, {len(unknown)} unknown)")
        for name, shape in shapes.items():
            if theirs[name] != tuple(shape):
                here = f"{list(theirs[name])} in the checkpoint, {list(shape)} in this model"
                raise CheckpointError(f"{self.directory}: {name} is {here}")
        if len(self.file.shapes.get(_SAMPLE, ())) != 1:
            raise CheckpointError(f"{self.directory} lacks {_SAMPLE}, which identifies its T5")
        for name, dtype in self.file.dtypes.items():
            if dtype not in _FLOATS:
                raise CheckpointError(f"{self.directory}: {name} has dtype {dtype}; allowed are {', '.join(_FLOATS)}")
        sharded = any(map(is_sharded, t5.parameters()))
        state = {f"t5.{name}": value for name, value in whole_state(t5, everywhere=True).items()} if sharded else None
        self._expect_base(frozen_in(state, t5, trained))

    def warn_of_old_order(self) -> None:
        """Warn if an optimizer's state beside the checkpoint has the parameter order of an earlier version."""
        names = self.config.embedding_names
        old = DIGEST not in self.file.description and Path(self.directory, "optimizer.pt").is_file()
        if old and names != sorted(names):
            warnings.warn(
                f"{self.directory} was written when task embeddings were in alphabetical order; they are now in the "
                f"configuration's ({', '.join(names)}). Its optimizer.pt refers to parameters by position and would "
                "give tasks each other's state: start with a new optimizer",
                stacklevel=3,
            )

    def values_for(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the checkpoint's value for each target, in the target's dtype. Call :meth:`expect` first.

        Raises:
            CheckpointError: a value is not finite.
        """
        tensors = self.file.tensors
        values = {name: tensors[name].to(target.dtype) for name, target in targets.items()}
        for name, value in values.items():
            if not value.isfinite().all():
                where = tensors[name][~value.isfinite()][0].item()
                raise CheckpointError(
                    f"{self.directory}: {name} has the value {where}, which is not finite in this model's {value.dtype}"
                )
        return values

    def _expect_base(self, weights: fingerprint.Weights) -> None:
        digests = self.file.description["base_model"].get(_RECORD)
        if digests is not None and not fingerprint.is_record(digests):
            raise CheckpointError(
                f"{self.directory}: base_model.{_RECORD} must map names of parameters to digests, got {digests!r}"
            )
        differs, blind = fingerprint.difference(weights, self.file.tensors[_SAMPLE], digests)
        if differs is not None:
            hint = _embedded_before(self.file.description["base_model"])
            raise CheckpointError(f"{self.directory} was trained on another T5: {differs}{hint}")
        if blind:
            warnings.warn(
                f"{self.directory}: {len(blind)} of the T5's {len(weights)} frozen weights ({blind[0]} for one) are "
                "quantised, here or where it was trained, or have a precision that cannot be compared value by value: "
                "make sure that this is the T5 it was trained on",
                stacklevel=4,
            )


def save(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: HyperFormerConfig,
    t5: nn.Module,
    weights: fingerprint.Weights,
) -> None:
    """Save a model's trained tensors, with what identifies the T5 that they were trained on.

    Args:
        directory: where to write the checkpoint.
        tensors: the trained tensors by name.
        config: the model's configuration.
        t5: the T5 that the model is built on.
        weights: its frozen weights.

    Raises:
        OSError: the directory cannot be written.
        ValueError: a value is not finite. Such a checkpoint could not be loaded, and an old one in ``directory`` may
            be good, so nothing is written. Or the directory is the T5's own, whose files would be replaced.
    """
    name = name_of(t5)
    if os.path.isdir(name) and os.path.realpath(name) == os.path.realpath(directory):
        raise ValueError(
            f"{directory} is the folder that the T5 was loaded from, and the checkpoint's files are named as the T5's "
            "are: save to another folder"
        )
    for tensor_name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{tensor_name} has values that are not finite: nothing was saved, and {directory} is unchanged"
            )
    description = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "config": config.to_dict(),
        "base_model": {**_facts(t5), **_how_to_load(t5), _RECORD: fingerprint.record(weights)},
    }
    save_checkpoint(directory, {**tensors, _SAMPLE: fingerprint.sample(weights)}, description)


def frozen_in(state_dict: Mapping[str, Tensor] | None, t5: nn.Module, trained: Collection[str]) -> fingerprint.Weights:
    """Return the T5's frozen weights, from a model's ``state_dict`` where they are spread over several processes."""
    weights = fingerprint.frozen(t5, trained)
    for name, weight in weights.items():
        value = (state_dict or {}).get(f"t5.{name}")
        if weight is None and value is not None and fingerprint.is_plain(value):
            weights[name] = value
    return weights


def read(directory: str | Path, t5: nn.Module) -> Checkpoint:
    """Read the description of the checkpoint in ``directory``.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: the checkpoint is broken, has another format version, or was trained on a T5 of another shape.
    """
    return described(CheckpointFile(directory), directory, t5)


def described(file: CheckpointFile | LoadedCheckpoint, directory: str | Path, t5: nn.Module) -> Checkpoint:
    """Check a checkpoint's description against the shape of ``t5``. Errors are those of :func:`read`."""
    version = file.description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory} has format version {version!r}; this library reads {FORMAT_VERSION}")
    theirs, ours = file.description.get("base_model"), _facts(t5)
    theirs = theirs if isinstance(theirs, dict) else {}
    for fact in _FACTS:
        if theirs.get(fact) != ours[fact]:
            raise CheckpointError(
                f"{directory} was trained on another T5: {fact} was {theirs.get(fact)!r}, this one's is {ours[fact]!r}"
                f"{_embedded_before(theirs)}"
            )
    said, here = computation_of(theirs.get("config")), computation_of(fingerprint.config_of(t5).to_dict())
    for field in said:
        if field in here and said[field] != here[field]:
            raise CheckpointError(
                f"{directory} was trained on another T5: {field} was {said[field]!r}, this one's is {here[field]!r}"
                f"{_embedded_before(theirs)}"
            )
    try:
        config = HyperFormerConfig.from_dict(file.description.get("config", {}))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: config: {error}") from error
    for size in _SIZES:
        if getattr(config, size) > _LARGEST_SIZE:
            raise CheckpointError(f"{directory}: {size} must be at most {_LARGEST_SIZE}, got {getattr(config, size)}")
    return Checkpoint(directory, config, file)


def _embedded_before(base: Mapping[str, Any]) -> str:
    """Say what to do where a checkpoint is of the embedded T5, which is not the same in all versions."""
    if base.get("name_or_path") != EMBEDDED:
        return ""
    return (
        ". It names the embedded T5, which was another in an earlier version of this library: train again, or install "
        "the version that trained it"
    )


def shapes_of(config: HyperFormerConfig, t5: nn.Module, trained: Collection[str]) -> dict[str, torch.Size]:
    """Return the names and shapes of the tensors in a checkpoint of ``config`` on ``t5``, without allocating them.

    Raises:
        ValueError: the configuration does not fit the T5, or its sizes are too large for any tensor.
    """
    layers = {site.stack: site.layer + 1 for site in find_sites(t5)}
    try:
        with torch.device("meta"):
            task_embeddings, hypernetworks = build_parts(config, fingerprint.config_of(t5).d_model, layers)
            parts = {"task_embeddings": task_embeddings, "hypernetworks": hypernetworks}
    except (RuntimeError, OverflowError) as error:
        sizes = ", ".join(f"{size}={getattr(config, size)}" for size in _SIZES)
        raise ValueError(f"the configuration's sizes are too large together: {sizes}") from error
    ours = {f"{part}.{name}": p.shape for part, module in parts.items() for name, p in module.named_parameters()}
    return ours | {f"t5.{name}": p.shape for name, p in t5.named_parameters() if name in trained}


def _facts(t5: nn.Module) -> dict[str, Any]:
    config = fingerprint.config_of(t5)
    facts = {"class": type(t5).__name__, "name_or_path": name_of(t5)}
    return facts | {fact: getattr(config, fact) for fact in _FACTS}


def computation_of(fields: Any) -> dict[str, Any]:
    """The fields of a T5's configuration, those of ``_COMPUTATION``, that decide what the same weights compute.

    Variant ``"finetuning"`` has no frozen weights by which another T5 would be noticed.
    """
    if not isinstance(fields, dict):
        return {}
    found = {field: fields[field] for field in _COMPUTATION if field in fields}
    if fields.get("model_type") == "t5":
        # transformers 5 has a field of its own for it; 4.57 writes no field that has its default.
        found["scale_decoder_outputs"] = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
    return found


def _how_to_load(t5: nn.Module) -> dict[str, Any]:
    """What :func:`hyperformer_fast.hub.load_t5` needs besides class and name: revision, dtype, configuration.

    The configuration lacks how the T5 is quantised: transformers would take it for a statement about the file.
    """
    config = fingerprint.config_of(t5)
    fields = json.loads(config.to_json_string())
    fields = {field: value for field, value in fields.items() if field not in _NOT_OF_THE_T5}
    dtype = next((p.dtype for p in t5.parameters() if p.is_floating_point()), torch.float32)
    revision = getattr(config, "_commit_hash", None)
    return {"revision": revision, "dtype": str(dtype).removeprefix("torch."), "config": fields}
