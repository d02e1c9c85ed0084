"""The checkpoint format: tensors and their description in a single file with a checksum.

A HyperFormer checkpoint is ONE file, ``hyperformer.safetensors``: the tensors, and in its header the description
(configuration, base model). A single file can be replaced atomically, without touching other files in its directory (a
tokenizer, a log). ``hyperformer_config.json`` beside it is a copy of the description for people and other tools. Only
the header is loaded, so a process that is killed between writing the two files leaves either the old checkpoint or the
new one.

The description has a SHA-256 of itself and of all tensors. safetensors has no checksum, so without it a flipped bit
would silently change a weight.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from .atomic import explain_unwritable, recover_directory, write_file
from .atomic import write_directory as write_directory  # checkpoint.write_directory is a public name
from .json_files import parse

WEIGHTS_NAME = "hyperformer.safetensors"
CONFIG_NAME = "hyperformer_config.json"

#: The field of the description that has the digest. Files of version 0.1.0 and earlier have none.
DIGEST = "sha256"

_HEADER = "hyperformer"  # the key in the safetensors header that only our files have

#: Our descriptions nest 3 deep. A deeper one could exhaust the recursion of code that compares or prints it.
_MAX_DEPTH = 16


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit. The message names the file and both sides of a mismatch."""

    def __init__(self, message: str):
        # A message quotes the file, whose content may be megabytes long and invalid Unicode.
        text = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(text if len(text) <= 2000 else f"{text[:1000]} ... {text[-900:]}")


def save_checkpoint(directory: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a checkpoint into ``directory``, and atomically replace an old one there.

    Args:
        directory: where to write; created if necessary. Other files in it are not changed.
        tensors: the tensors by name, on any device.
        description: a JSON-serialisable description. A digest of it and of the tensors is added.

    Raises:
        OSError: the directory cannot be written (PermissionError, NotADirectoryError, no space); an old checkpoint is
            intact.
    """
    directory = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: dict[str, Any] = json.loads(json.dumps(dict(description)))
    content[DIGEST] = _digest(tensors, content)
    with explain_unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with write_file(directory / WEIGHTS_NAME) as partial:
        # save_file would write to a temporary file of its own, which a killed process would leave behind.
        partial.write_bytes(save(tensors, metadata={_HEADER: json.dumps(content)}))
    with write_file(directory / CONFIG_NAME) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class CheckpointFile:
    """A checkpoint of which only the header has been read, so that it can be checked before any tensor is loaded.

    The file stays open, so replacing it in the meantime has no effect.

    Attributes:
        path: path of the file.
        description: the description that :func:`save_checkpoint` was given, with the digest.
        shapes: shapes of the tensors by name.
        dtypes: dtypes of the tensors by name, as safetensors spells them ("F32").

    Raises:
        FileNotFoundError: there is no checkpoint in ``directory``.
        CheckpointError: the file is truncated, not safetensors, or not a HyperFormer checkpoint.
    """

    def __init__(self, directory: str | Path):
        directory = recover_directory(directory)
        self.path = directory / WEIGHTS_NAME
        if not self.path.is_file():
            raise FileNotFoundError(f"no HyperFormer checkpoint in {directory}: {WEIGHTS_NAME} is not there")
        try:
            self._file = safe_open(self.path, framework="pt")
            header = self._file.metadata() or {}
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {error}") from error
        if _HEADER not in header:
            raise CheckpointError(
                f"{self.path} is a safetensors file, but not a HyperFormer checkpoint: its header lacks {_HEADER!r}"
            )
        self.description = _parsed(header[_HEADER], self.path)
        _compare_copy(directory / CONFIG_NAME, self.description, self.path)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU. Raises CheckpointError if their digest differs from the description's."""
        try:
            tensors = {name: self._file.get_tensor(name) for name in self.shapes}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {error}") from error
        if DIGEST not in self.description:
            return tensors
        said, found = self.description[DIGEST], _digest(tensors, self.description)
        if said != found:
            raise CheckpointError(
                f"{self.path} is not what was saved (bit rot, or edited): the SHA-256 of its description and tensors "
                f"is {found}, its header says {said!r}. Restore it from a backup, or train again"
            )
        return tensors


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU, by name) and the description of a checkpoint. Nothing is unpickled.

    Raises:
        FileNotFoundError: there is no checkpoint in ``directory``.
        CheckpointError: the checkpoint is broken, or its digest differs from the description's.
    """
    file = CheckpointFile(directory)
    return file.tensors, file.description


def _digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a description without its digest, and of the names, dtypes, shapes and bytes of tensors."""
    rest = {field: value for field, value in description.items() if field != DIGEST}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(uint8).numpy().data)
    return sha.hexdigest()


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        description = parse(text, max_depth=_MAX_DEPTH)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header's {_HEADER!r} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(
            f"{path}: the header's {_HEADER!r} must be a JSON object, got {type(description).__name__}"
        )
    return description


def _compare_copy(copy: Path, description: dict[str, Any], path: Path) -> None:
    try:
        # is_file(), because reading from a FIFO would block.
        same = copy.is_file() and parse(copy.read_text(encoding="utf-8")) == description
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{copy} is absent or differs from the description inside {path}, which is the one that is used. A save "
            "was interrupted, or the copy was edited; saving again renews it.",
            stacklevel=5,
        )
