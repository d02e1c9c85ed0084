"""A file that is written stretch by stretch, beside the file whose place it takes when it is whole.

``out.csv`` is written as ``out.csv.partial``. Beside it, ``out.csv.partial.json`` says what it is part of (its stamp),
and how many rows and bytes are known to be on the disk. Whoever asks for the same again goes on there; what a kill left
behind these bytes is cut off. Whoever asks for something else is told the difference.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import UNSUPPORTED, explain_full_disk, explain_unwritable, write_file
from ..json_files import parse
from .folder import RunError


def partial_names(path: Path) -> tuple[Path, Path]:
    """Return the names under which a file is written: its own while it is partial, and that of its state."""
    real = Path(os.path.realpath(path))
    return real.with_name(f"{real.name}.partial"), real.with_name(f"{real.name}.partial.json")


class PartialFile:
    """A file that is written stretch by stretch. Use it in a ``with`` block, at whose end what is not whole stays.

    Args:
        path: the file that it becomes.
        stamp: what it is part of, as plain JSON types.

    Raises:
        RunError: another process writes it, it is part of something else, or a file of another kind is in its place.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, stamp: Mapping[str, Any]):
        self.path = Path(os.path.realpath(path))
        self.partial, self._state = partial_names(path)
        self.stamp = dict(stamp)
        with explain_unwritable(self.partial):
            self._file = self._locked()
        try:
            self.rows, self._bytes = self._found()
            os.ftruncate(self._file, self._bytes)
            os.lseek(self._file, 0, os.SEEK_END)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.rows:
            self.discard()
        os.close(self._file)

    def append(self, content: bytes, rows: int) -> None:
        """Append some rows, which are on the disk when this returns."""
        with explain_full_disk(self.partial):
            self._write(content)
            os.fsync(self._file)
        self.rows += rows
        self._bytes += len(content)
        self._keep_state()

    def finish(self, content: bytes) -> None:
        """Append what ends the file, and give it its name."""
        with explain_full_disk(self.partial):
            self._write(content)
            os.fsync(self._file)
        os.replace(self.partial, self.path)
        self._state.unlink(missing_ok=True)

    def content(self) -> bytes:
        """Return what was written."""
        return self.partial.read_bytes()

    def discard(self) -> None:
        """Remove it."""
        self._state.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[os.write(self._file, left) :]

    def _keep_state(self) -> None:
        with write_file(self._state) as fresh:
            state = {"stamp": self.stamp, "rows": self.rows, "bytes": self._bytes}
            fresh.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _locked(self) -> int:
        """Open the partial file and keep others out. The kernel lets go of the lock when the process ends."""
        while True:
            handle = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise RunError(f"another process writes {self.path} now: wait for it, or give another name") from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    os.close(handle)
                    raise
            try:
                # Another process may have finished it before it was locked: then this is the whole file.
                if os.path.samestat(os.stat(self.partial), os.fstat(handle)):
                    return handle
            except FileNotFoundError:
                pass
            os.close(handle)

    def _found(self) -> tuple[int, int]:
        """Return the rows and bytes that are there of what this is part of."""
        size = os.fstat(self._file).st_size
        if not size:
            return 0, 0  # a state beside it is of one that was finished, by a process that was killed then
        try:
            state = parse(self._state.read_text(encoding="utf-8"))
            stamp, rows, known = dict(state["stamp"]), int(state["rows"]), int(state["bytes"])
        except FileNotFoundError:
            raise RunError(
                f"{self.partial} is in the way: it is not the unfinished output of a prediction; move it away"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._state} does not say what {self.partial.name} is part of ({error!r}): delete both"
            ) from None
        for name in dict.fromkeys([*stamp, *self.stamp]):
            before, now = stamp.get(name), self.stamp.get(name)
            if before != now:
                raise RunError(
                    f"{self.partial} is unfinished, but it is the output of another prediction: {name} was {before!r} "
                    f"and is {now!r}; repeat the command that began it, or delete {self.partial.name} and "
                    f"{self._state.name} to start anew"
                )
        if size < known:
            raise RunError(
                f"{self.partial} has {size} bytes, but {known} were written: delete it and {self._state.name} to start "
                "anew"
            )
        return rows, known
