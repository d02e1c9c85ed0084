"""Checkpoints that a killed process cannot break: whole files and whole directories, replaced in one step.

A HyperFormer checkpoint is ONE file, ``hyperformer.safetensors``: the tensors, and in its header the description
(configuration, base model) that gives them meaning. One file can be replaced atomically, without touching what else its
directory holds (a tokenizer, a log). ``hyperformer_config.json`` beside it is a copy of the description for people and
other tools; a loader reads the header, so that a process killed between the two files leaves a checkpoint that is
wholly the old or wholly the new one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import explain_unwritable, recover_directory, write_file
from .atomic import write_directory as write_directory  # its name here is public

WEIGHTS_NAME = "hyperformer.safetensors"
CONFIG_NAME = "hyperformer_config.json"

_HEADER = "hyperformer"  # the key in the safetensors header; its presence tells our files from any other safetensors


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit. The message names the file and both sides of the mismatch."""


def save_checkpoint(directory: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a checkpoint into ``directory`` (made if need be); an old one there is replaced in one step.

    Args:
        directory: other files in it stay as they are.
        tensors: by name; any device.
        description: JSON-serialisable.

    Raises:
        OSError: the directory cannot be written (PermissionError, NotADirectoryError, no space); an old checkpoint is
            intact.
    """
    directory = Path(directory)
    description = dict(description)
    text = json.dumps(description, indent=2) + "\n"
    with explain_unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with write_file(directory / WEIGHTS_NAME) as partial:
        # not save_file, which writes to a temporary file of its own: one that nobody would sweep up
        partial.write_bytes(save(tensors, metadata={_HEADER: json.dumps(description)}))
    with write_file(directory / CONFIG_NAME) as partial:
        partial.write_text(text, encoding="utf-8")


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote: tensors on the CPU by name, and their description. Nothing is unpickled.

    Raises:
        FileNotFoundError: there is no checkpoint in ``directory``.
        CheckpointError: the file is truncated, not safetensors, or not a HyperFormer checkpoint.
    """
    directory = recover_directory(directory)
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no HyperFormer checkpoint in {directory}: {WEIGHTS_NAME} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    if _HEADER not in header:
        raise CheckpointError(f"{path} is a safetensors file, but not of a HyperFormer: its header lacks {_HEADER!r}")
    try:
        description = json.loads(header[_HEADER])
    except ValueError as error:
        raise CheckpointError(f"{path}: the header's {_HEADER!r} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(
            f"{path}: the header's {_HEADER!r} must be a JSON object, got {type(description).__name__}"
        )
    _compare_copy(directory / CONFIG_NAME, description, path)
    return tensors, description


def _compare_copy(copy: Path, description: dict[str, Any], path: Path) -> None:
    try:
        # is_file: reading a FIFO would wait for its other end
        same = copy.is_file() and json.loads(copy.read_text(encoding="utf-8")) == description
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{copy} is absent, or differs from the description inside {path}, which is the one that counts. A save "
            "was interrupted, or the copy was edited; saving again renews it.",
            stacklevel=3,
        )
