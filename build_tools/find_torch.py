"""Where torch's headers and libraries are, without importing it."""

from __future__ import annotations

import importlib.util
import re
import site
import sysconfig
from pathlib import Path
from typing import NamedTuple


class Torch(NamedTuple):
    root: Path  #: the package's folder, with include/ and lib/
    version: str  #: as "2.13.0+cpu"
    cuda: str | None  #: as "13.0"; None in a build without CUDA


def find_torch(candidates: list[Path] | None = None) -> Torch | None:
    """The first torch with stable-ABI headers among ``candidates`` (default: this interpreter's places for packages).

    pip's isolated builds hide the target environment from ``sys.path``, but sysconfig and site still name its folders;
    and importing torch to ask would take seconds and, in a CUDA build, gigabytes of address space.
    """
    for root in _candidates() if candidates is None else candidates:
        version_file = root / "version.py"
        if version_file.is_file() and (root / "include/torch/csrc/stable/library.h").is_file():
            text = version_file.read_text()
            version = re.search(r"^__version__ = '([^']+)'", text, re.M)
            cuda = re.search(r"^cuda(?:: [^=]*)? = '([^']*)'", text, re.M)
            if version:
                return Torch(root, version[1], cuda[1] if cuda else None)
    return None


def _candidates() -> list[Path]:
    roots: list[Path] = []
    try:
        spec = importlib.util.find_spec("torch")
        roots += [Path(p) for p in (spec.submodule_search_locations if spec else None) or ()]
    except (ImportError, ValueError):
        pass
    paths = sysconfig.get_paths()
    folders = [paths["platlib"], paths["purelib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return roots + [Path(folder) / "torch" for folder in folders]
