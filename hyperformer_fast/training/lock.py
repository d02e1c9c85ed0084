"""A lock that allows only one training at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType

from ..atomic import UNSUPPORTED
from .folder import RunError

LOCK_NAME = ".run.lock"

_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class RunLock:
    """Locks a run folder against other trainings. The folder is created if it does not exist.

    The kernel holds the lock (``flock``) and releases it when the process ends in any way, so the lock file that a
    killed process leaves is no obstacle. The file names the process, for the error message that others get. On a file
    system without locks a warning says that another training is not kept out.

    Args:
        folder: the run folder.

    Raises:
        RunError: another process trains into the folder, or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK_NAME
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            self._handle = self._acquire()
        except BaseException:
            self._remove_empty()
            raise

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock, and remove the lock file and the folders that were created but are still empty."""
        if self._is_ours(self._handle):
            self.path.unlink()
        os.close(self._handle)
        self._remove_empty()

    def renew(self) -> bool:
        """Lock the folder again if it or the lock file was deleted in the meantime, and return whether it was.

        Raises:
            RunError: another process now trains into the folder.
        """
        if self._is_ours(self._handle):
            return False
        anew = self._acquire()
        os.close(self._handle)
        self._handle = anew
        return True

    def _acquire(self) -> int:
        try:
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    self._lock(handle)
                    # The previous holder may have deleted the file after we opened it and before we locked it.
                    if self._is_ours(handle):
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                        return handle
                except BaseException:
                    os.close(handle)
                    raise
                os.close(handle)
        except OSError as error:
            raise RunError(f"cannot write to the output directory {self.folder}: {error.strerror}") from error

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = os.pread(handle, 300, 0).decode(errors="replace").strip() or "unknown"
                raise RunError(
                    f"another training writes to {self.folder} (process {holder}): let it finish, stop it, or choose "
                    "another --output-dir"
                ) from None
            if error.errno not in UNSUPPORTED:
                raise
            warnings.warn(
                f"the file system of {self.folder} has no locks ({error.strerror}): nothing keeps another training "
                "from writing to the same folder",
                stacklevel=5,
            )

    def _is_ours(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(handle))
        except FileNotFoundError:
            return False

    def _remove_empty(self) -> None:
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # the folder is not empty or does not exist
                return
