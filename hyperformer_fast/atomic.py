"""Write files and directories atomically: under a temporary name first, then renamed in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h

#: Errors of a file system that does not support an operation. EBADF: NFS can lock only what is open for writing, which
#: a directory cannot be.
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

#: Messages of torch.save's errors if a write failed; they do not give the reason.
_TORCH_WRITE_FAILED = re.compile(r"unexpected pos \d+|file write failed|PytorchStreamWriter failed")
_PROBE_BYTES = 1 << 20

_LEFTOVER = re.compile(r"\..+\.partial-[0-9a-f]{12}", re.DOTALL)


@contextlib.contextmanager
def write_file(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Write one file completely or not at all.

    Yields the path of a temporary file beside ``path`` to write to. On a clean exit it is flushed to the disk and
    renamed to ``path`` in one step; on an exception it is removed. Each writer also removes the temporary files that
    killed writers of the same path left.

    Args:
        path: the file.
        replace: False: raise FileExistsError where there is a file of this name, be it that of a writer at work now.

    Raises:
        OSError: the file cannot be created, or the disk is full; an old file is intact.
    """
    path = Path(os.path.realpath(path))
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "there is a file of this name already", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory has the name of the file to write", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a device or a pipe has the name of the file to write", str(path))
    _sweep(path)
    partial = _partial(path)
    with explain_unwritable(path):
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _lock(handle)
        with explain_full_disk(path):
            yield partial
            _sync(partial)
            if replace or not _link(partial, path):
                os.replace(partial, path)
            _sync(path.parent)
    finally:
        os.close(handle)
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> bool:
    """Give a file a second name, unless that is taken. Returns False where the file system has no such names."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "there is a file of this name already", str(path)) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EPERM}:
            raise
        return False
    return True


@contextlib.contextmanager
def write_directory(path: str | Path) -> Iterator[Path]:
    """Write a directory completely or not at all: even after kill -9, ``path`` is either the old or the new one.

    Yields a temporary directory beside ``path`` (so on the same file system) to write into. On a clean exit its
    contents are flushed to the disk and it replaces ``path``; on an exception it is removed and ``path`` is unchanged.
    An old directory is replaced WITH ALL ITS CONTENTS by ``renameat2(RENAME_EXCHANGE)``, which is a single step of the
    kernel. Where it is not available (not Linux, an old file system), two renames are used, between which ``path`` is
    absent. :func:`recover_directory` repairs a kill between the two; the next writer calls it, and every loader should.

    Raises:
        OSError: the parent cannot be written, ``path`` is a file, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file has the name of the directory to write", str(path))
    with explain_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(path)
        _sweep(path)
        partial = _partial(path)
        partial.mkdir()
    handle = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(handle)
        with explain_full_disk(path):
            yield partial
            for folder, _, files in os.walk(partial):
                for file in files:
                    _sync(Path(folder, file))
                _sync(Path(folder))
            _put(partial, path)
            _sync(path.parent)
    finally:
        os.close(handle)
        # After an exchange the temporary name belongs to the old directory.
        shutil.rmtree(partial, ignore_errors=True)


def recover_directory(path: str | os.PathLike[str]) -> Path:
    """Repair a kill between the two renames of :func:`write_directory`, and return ``path``.

    If ``path`` is absent and the old directory still exists under its temporary name, it is renamed back.
    """
    real = Path(os.path.realpath(path))
    if not real.exists() and _aside(real).is_dir():
        with contextlib.suppress(FileNotFoundError):  # another process repaired it first
            os.rename(_aside(real), real)
    return Path(path)


def sweep_leftovers(folder: str | Path) -> None:
    """Remove all temporary files and directories that killed writers left in ``folder``.

    Those of live writers stay. On a file system without locks the two cannot be told apart, and nothing is removed.
    """
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            _remove_if_dead(path)


@contextlib.contextmanager
def explain_full_disk(path: str | Path) -> Iterator[None]:
    """Wrap code that writes ``path``, so that an error because of a full disk says so and names ``path``.

    torch.save hides the system's error ("unexpected pos 704 vs 598"), so a probe file is written to find it.

    Raises:
        OSError: no space is left, a quota is exhausted, or a file would exceed its size limit. Other errors are raised
            unchanged.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL or str(error.strerror).startswith("cannot write"):
            raise
        raise _cannot_write(path, error.errno) from error
    except RuntimeError as error:
        number = _probe(path.parent) if _TORCH_WRITE_FAILED.search(str(error)) else None
        if number is None:
            raise
        raise _cannot_write(path, number) from error


def _cannot_write(path: Path, number: int | None) -> OSError:
    number = errno.EIO if number is None else number
    name, cure = errno.errorcode.get(number, str(number)), ""
    if number in _DISK_FULL:
        with contextlib.suppress(OSError):
            cure = f", {shutil.disk_usage(path.parent).free:,} bytes are free there"
        cure += ": free some space, or write to another disk"
    return OSError(number, f"cannot write {path}: {os.strerror(number)} ({name}){cure}", str(path.parent))


def _probe(folder: Path) -> int | None:
    """Write a probe file in ``folder`` and return the error number, or None if it succeeds."""
    probe = _partial(folder / "probe")
    try:
        with open(probe, "xb", buffering=0) as file:
            left = _PROBE_BYTES
            while left:
                left -= file.write(bytes(left))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    finally:
        probe.unlink(missing_ok=True)
    return None


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
    """Exchange two names in one step. Returns False if the operating system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library older than glibc 2.28
        return False
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flags) == 0)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(6)}")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left."""
    start = f".{path.name}.partial-"
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if other.name.startswith(start) and _LEFTOVER.fullmatch(other.name):
            _remove_if_dead(other)
    if path.is_dir() and _aside(path).is_dir():
        _remove_if_dead(_aside(path))


def _remove_if_dead(path: Path) -> None:
    """Remove a file or directory unless a live writer holds its lock. The kernel releases the lock of a killed one."""
    with contextlib.suppress(OSError):
        # No writer makes a FIFO, which would block when opened, or a link, whose target would be locked.
        kind = os.lstat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if stat.S_ISDIR(kind) else path.unlink()
        finally:
            os.close(handle)


def _lock(handle: int) -> None:
    """Lock what is being written, so that no other writer removes it. Without support for locks none removes any."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk. File systems that do not support fsync of a directory are ignored."""
    kind = os.lstat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        return
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_unwritable(path: Path) -> Iterator[None]:
    """Wrap code that creates ``path``, so that every OSError says what could not be written and why."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error.errno) from error
