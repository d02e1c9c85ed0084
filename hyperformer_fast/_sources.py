"""What the compiled libraries are made of: read by the build, and at import to see whether they are out of date.

Standard library only, and no import from the package: the build runs this file where torch may be absent.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

#: library name -> patterns below csrc/ of every file that goes into it.
PATTERNS = {
    "cpu": ("*.h", "cpu/*.cpp", "cpu/*.h", "cpu/isa/*.cpp", "cpu/isa/*.h"),
    "cuda": ("*.h", "cuda/*.cpp", "cuda/*.cu", "cuda/*.cuh", "cuda/*.h"),
    "autograd": ("autograd/*.cpp",),
}


def source_files(csrc: Path, library: str) -> list[Path]:
    """Every source and header of ``library``, a key of ``PATTERNS``, in a fixed order."""
    return sorted(path for pattern in PATTERNS[library] for path in csrc.glob(pattern))


def source_hash(csrc: Path, library: str) -> str:
    """A digest of the names and contents of the library's files, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in source_files(csrc, library):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
