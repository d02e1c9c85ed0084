"""Checkpoints that a killed process cannot break: whole files and whole directories, replaced in one step.

A HyperFormer checkpoint is ONE file, ``hyperformer.safetensors``: the tensors, and in its header the description
(configuration, base model) that gives them meaning. One file can be replaced atomically, without touching what else its
directory holds (a tokenizer, a log). ``hyperformer_config.json`` beside it is a copy of the description for people and
other tools; a loader reads the header, so that a process killed between the two files leaves a checkpoint that is
wholly the old or wholly the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

WEIGHTS_NAME = "hyperformer.safetensors"
CONFIG_NAME = "hyperformer_config.json"

_HEADER = "hyperformer"  # the key in the safetensors header; its presence tells our files from any other safetensors
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


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
    with _explained(directory):
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
        same = json.loads(copy.read_text(encoding="utf-8")) == description
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{copy} is absent, or differs from the description inside {path}, which is the one that counts. A save "
            "was interrupted, or the copy was edited; saving again renews it.",
            stacklevel=3,
        )


@contextlib.contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Write one file whole or not at all.

    Yields the name of a temporary file beside ``path`` to write to. On a clean exit it is flushed to the disk and takes
    ``path``'s name in one step; on an exception it is removed. What killed writers left is swept up by the next one.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory has the name of the file to write", str(path))
    _sweep(path)
    partial = _partial(path)
    with _explained(path):
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        os.close(handle)
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_directory(path: str | Path) -> Iterator[Path]:
    """Write a whole directory or nothing: at any moment, also under kill -9, ``path`` is the old or the new one.

    Yields a temporary directory beside ``path`` (so on the same file system) to write into. On a clean exit everything
    in it is flushed to the disk, and it takes ``path``'s place; on an exception it is removed and ``path`` is as
    before. An old directory is replaced WITH ALL ITS CONTENTS, by ``renameat2(RENAME_EXCHANGE)``, one step of the
    kernel; where that is not to be had (not Linux, an old file system), by two renames, between which ``path`` is
    absent: a kill just there is mended by :func:`recover_directory`, which the next writer calls, and every loader
    should.

    Raises:
        OSError: the parent cannot be written, or ``path`` is a file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file has the name of the directory to write", str(path))
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(path)
        _sweep(path)
        partial = _partial(path)
        partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial
        for folder, _, files in os.walk(partial):
            for file in files:
                if not os.path.islink(os.path.join(folder, file)):
                    _sync(Path(folder, file))
            _sync(Path(folder))
        _put(partial, path)
        _sync(path.parent)
    finally:
        os.close(handle)
        # after an exchange this is the old directory
        shutil.rmtree(partial, ignore_errors=True)


def recover_directory(path: str | Path) -> Path:
    """Mend what a kill between the two renames of :func:`write_directory` left, and return ``path``.

    Where ``path`` is absent and the old directory stands aside, it gets its name back. Nothing happens otherwise.
    """
    real = Path(os.path.realpath(path))
    if not real.exists() and _aside(real).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another process mended it first
            os.rename(_aside(real), real)
    return Path(path)


def _put(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    if _exchange(partial, path):
        return
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library older than glibc 2.28
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _partial(path: Path) -> Path:
    return path.with_name(_prefix(path) + secrets.token_hex(6))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _sweep(path: Path) -> None:
    """Remove what dead writers of ``path`` left: a living one holds a lock, which a kill -9 frees too."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    leftovers = [other for other in beside if other.name.startswith(_prefix(path))]
    if path.is_dir() and _aside(path).is_dir():
        leftovers.append(_aside(path))
    for leftover in leftovers:
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror} ({path.parent})") from error
