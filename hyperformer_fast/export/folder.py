"""Folders that an export writes: replaced as a whole, if an export wrote them."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path


def check_replaceable(folder: str | Path, mark: str, names: Sequence[str]) -> None:
    """Raise OSError if ``folder`` holds anything but what an earlier export would have left there.

    A folder is replaced with everything in it, which must not be somebody's home, nor another library's adapter.

    Args:
        folder: the folder.
        mark: the name of a file that every export writes.
        names: patterns of what else it writes.
    """
    folder = Path(folder)
    found = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    ours = (mark, *names, "__pycache__")
    other = next((name for name in found if not any(fnmatchcase(name, each) for each in ours)), None)
    if found and not (folder / mark).is_file():
        what = f"other files in it, and no {mark} of an earlier export"
    elif other is not None:
        what = f"other files in it than an export writes, {other} for one"
    else:
        return
    raise OSError(errno.ENOTEMPTY, f"the folder has {what}: give a new folder, or empty it", str(folder))
