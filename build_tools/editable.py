"""Editable installs that type checkers and editors can follow.

setuptools' editable wheel registers an import hook, which mypy and editors do not run: they would see every name of the
package as Any. A path file does for both. It names a folder that holds nothing but a link to the package, because the
project's root must stay off the path: ``kernels/``, ``tests/`` and ``benchmarks/`` would become importable there.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path

#: Below the project's root, ignored by git; an editable install is gone when it is deleted.
FOLDER = ".editable"
PACKAGE = "hyperformer_fast"


def link_package(root: Path) -> Path:
    """Make the folder with the link to the package, and return it."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    link = folder / PACKAGE
    if not link.is_symlink():
        link.symlink_to(os.path.join("..", PACKAGE), target_is_directory=True)
    return folder


def use_path_file(wheel: Path, root: Path) -> None:
    """Replace the import hook in an editable wheel by a path file; a wheel without the hook is left as it is."""
    with zipfile.ZipFile(wheel) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    hook = {info.filename for info, _ in entries if info.filename.startswith("__editable__")}
    if not any(name.endswith("_finder.py") for name in hook):
        return
    name, content = f"__editable__.{PACKAGE}.pth", f"{link_package(root)}\n".encode()
    partial = wheel.with_name(f"{wheel.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        for info, data in entries:
            if info.filename.endswith(".dist-info/RECORD"):
                kept = [line for line in data.decode().splitlines() if line.partition(",")[0] not in hook]
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                data = "\n".join([f"{name},sha256={digest},{len(content)}", *kept, ""]).encode()
            if info.filename not in hook:
                archive.writestr(info, data)
    os.replace(partial, wheel)
