"""Folders that an export writes: replaced as a whole, if an export wrote them."""

from __future__ import annotations

import errno
from pathlib import Path


def check_replaceable(folder: str | Path, mark: str) -> None:
    """Raise OSError if ``folder`` holds files, but not the file ``mark`` that an earlier export would have left there.

    A folder is replaced with everything in it, which must not be somebody's home.
    """
    folder = Path(folder)
    if folder.is_dir() and not (folder / mark).is_file() and any(folder.iterdir()):
        raise OSError(
            errno.ENOTEMPTY,
            f"the folder has other files in it, and no {mark} of an earlier export: give a new folder, or empty it",
            str(folder),
        )
