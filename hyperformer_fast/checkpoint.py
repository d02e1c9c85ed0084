"""The checkpoint format: tensors and their description in a single file with a checksum.

A HyperFormer checkpoint is ONE file, ``model.safetensors``, where Hugging Face's Trainer looks for it: the trained
tensors under their names in the model's ``state_dict``, and in its header the description (configuration, base model).
A single file can be replaced atomically, without touching other files in its directory (a tokenizer, a log).
``config.json`` beside it is a copy of the description for people and other tools. Only the header is loaded, so a
process that is killed between writing the two files leaves either the old checkpoint or the new one.

The Trainer hands a file's tensors to ``load_state_dict``, and drops its header. So the description stands in the file
twice: a tensor of bytes, ``DESCRIPTION``, has the header's text, by which ``load_state_dict`` knows what it loads.

The description has a SHA-256 of itself and of all tensors. safetensors has no checksum, so without it a flipped bit
would silently change a weight.

Files of version 0.1.0 are named ``hyperformer.safetensors`` and ``hyperformer_config.json``; they still load.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import explain_unwritable, recover_directory, write_file
from .atomic import write_directory as write_directory  # checkpoint.write_directory is a public name
from .json_files import parse

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

#: The names of version 0.1.0.
OLD_WEIGHTS_NAME = "hyperformer.safetensors"
OLD_CONFIG_NAME = "hyperformer_config.json"

#: Name of the tensor that has the header's description as bytes.
DESCRIPTION = "hyperformer_description"

#: ``model_type`` in ``config.json``.
MODEL_TYPE = "hyperformer"

#: The field of the description that has the digest. Files of version 0.1.0 and earlier have none.
DIGEST = "sha256"

_HEADER = "hyperformer"  # the key in the safetensors header that only our files have

_SPELLINGS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

#: Our descriptions nest 3 deep. A deeper one could exhaust the recursion of code that compares or prints it.
_MAX_DEPTH = 16


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit. The message names the file and both sides of a mismatch."""

    def __init__(self, message: str):
        # A message quotes the file, whose content may be megabytes long and invalid Unicode.
        text = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(text if len(text) <= 2000 else f"{text[:1000]} ... {text[-900:]}")


def save_checkpoint(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
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
    content[DIGEST] = digest_of(tensors, content)
    text = json.dumps(content)
    tensors[DESCRIPTION] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with explain_unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with write_file(directory / WEIGHTS_NAME) as partial:
        # save_file would write to a temporary file of its own, which a killed process would leave behind.
        partial.write_bytes(save(tensors, metadata={"format": "pt", _HEADER: text}))
    with write_file(directory / CONFIG_NAME) as partial:
        partial.write_text(json.dumps(_for_people(content), indent=2) + "\n", encoding="utf-8")
    for name in (OLD_WEIGHTS_NAME, OLD_CONFIG_NAME):
        (directory / name).unlink(missing_ok=True)


def weights_file(directory: str | Path) -> Path | None:
    """The file with the weights of the checkpoint in ``directory``, under its present or its old name; None where
    there is neither. A file of the present name may be another model's; an old one beside it is ours then."""
    new, old = Path(directory) / WEIGHTS_NAME, Path(directory) / OLD_WEIGHTS_NAME
    if old.is_file() and not (new.is_file() and _is_ours(new)):
        return old
    return new if new.is_file() else None


def _is_ours(path: Path) -> bool:
    try:
        return _HEADER in (safe_open(path, framework="pt").metadata() or {})
    except SafetensorError:
        return True  # reading it will say that it is broken


def _for_people(description: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: the description without the digests of the T5's weights, as transformers names its kind."""
    import transformers

    shown = dict(description)
    if isinstance(shown.get("base_model"), dict):
        shown["base_model"] = {name: value for name, value in shown["base_model"].items() if name != "frozen"}
    kind = {"architectures": ["HyperFormerModel"], "model_type": MODEL_TYPE}
    return {**kind, "transformers_version": transformers.__version__, **shown}


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
        found = weights_file(directory)
        if found is None:
            raise FileNotFoundError(f"no HyperFormer checkpoint in {directory}: {WEIGHTS_NAME} is not there")
        self.path = found
        try:
            self._file = safe_open(self.path, framework="pt")
            header = self._file.metadata() or {}
            names = [name for name in self._file.keys() if name != DESCRIPTION]
            slices = {name: self._file.get_slice(name) for name in names}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {error}") from error
        if _HEADER not in header:
            raise CheckpointError(
                f"{self.path} is a safetensors file, but not a HyperFormer checkpoint: its header lacks {_HEADER!r}"
            )
        self._text = header[_HEADER]
        self.description = parsed_description(self._text, f"{self.path}: the header's {_HEADER!r}")
        copy = OLD_CONFIG_NAME if self.path.name == OLD_WEIGHTS_NAME else CONFIG_NAME
        _compare_copy(directory / copy, self.description, self.path)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU. Raises CheckpointError if their digest differs from the description's."""
        try:
            tensors = {name: self._file.get_tensor(name) for name in self.shapes}
            copy = self._file.get_tensor(DESCRIPTION) if DESCRIPTION in self._file.keys() else None
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {error}") from error
        # A copy that is not the header's text counts as one more tensor, which the digest does not know.
        changed = {} if copy is None or _bytes_of(copy) == self._text.encode() else {DESCRIPTION: copy}
        expect_digest(str(self.path), {**tensors, **changed}, self.description)
        return tensors


class LoadedCheckpoint:
    """A checkpoint whose tensors are in memory already, as the Trainer gives them to ``load_state_dict``.

    Attributes:
        path: what stands for the path in messages.
        description, shapes, dtypes, tensors: as those of :class:`CheckpointFile`.

    Raises:
        CheckpointError: the description is broken.
    """

    path = "the state dict"

    def __init__(self, state_dict: Mapping[str, Tensor]):
        self._tensors = {name: tensor for name, tensor in state_dict.items() if name != DESCRIPTION}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: _SPELLINGS.get(tensor.dtype, str(tensor.dtype)) for name, tensor in self._tensors.items()}
        text = _bytes_of(state_dict[DESCRIPTION]).decode("utf-8", "replace")
        self.description = parsed_description(text, f"{self.path}'s {DESCRIPTION!r}")

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU. Raises CheckpointError if their digest differs from the description's."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors.items()}
        expect_digest(self.path, tensors, self.description)
        return tensors


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU, by name) and the description of a checkpoint. Nothing is unpickled.

    Raises:
        FileNotFoundError: there is no checkpoint in ``directory``.
        CheckpointError: the checkpoint is broken, or its digest differs from the description's.
    """
    file = CheckpointFile(directory)
    return file.tensors, file.description


def digest_of(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a description without its digest, and of the names, dtypes, shapes and bytes of tensors."""
    rest = {field: value for field, value in description.items() if field != DIGEST}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def expect_digest(name: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the description has no digest (as in old files), or the right one."""
    if DIGEST not in description:
        return
    said, found = description[DIGEST], digest_of(tensors, description)
    if said != found:
        raise CheckpointError(
            f"{name} is not what was saved (bit rot, or edited): the SHA-256 of its description and tensors "
            f"is {found}, its header says {said!r}. Restore it from a backup, or train again"
        )


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def parsed_description(text: str, where: str) -> dict[str, Any]:
    """Return the description that a header holds as JSON. Raises CheckpointError if it is none."""
    try:
        description = parse(text, max_depth=_MAX_DEPTH)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{where} must be a JSON object, got {type(description).__name__}")
    return description


def _compare_copy(copy: Path, description: dict[str, Any], path: Path) -> None:
    try:
        # is_file(), because reading from a FIFO would block.
        said = parse(copy.read_text(encoding="utf-8")) if copy.is_file() else None
        expected = description if copy.name == OLD_CONFIG_NAME else _for_people(description)
        own = {"transformers_version": None}  # which may have been another when the file was written
        same = isinstance(said, dict) and {**said, **own} == {**expected, **own}
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{copy} is absent or differs from the description inside {path}, which is the one that is used. A save "
            "was interrupted, or the copy was edited; saving again renews it.",
            stacklevel=5,
        )
