"""Tests the kernels of a compiled library before it is used, with the installed torch and on this machine.

Compiler flags, a compiler's bug or another CPU can make a library that loads, but computes wrong numbers. The test
takes some 80 milliseconds, so a pass is recorded in a file beside the library and the test is not repeated.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from . import selftest
from .base import Backend

#: The file in which passes are recorded. The build creates it empty, so that an uninstall removes it.
RECORD = "live_check.json"


def fault(backend: Backend, library: Path, circumstances: list[str], cure: str) -> str | None:
    """Test the kernels of ``library``, unless a pass is recorded for the same file, torch, self-test and
    ``circumstances``.

    Args:
        backend: the backend that calls the kernels.
        library: the library's file.
        circumstances: what the kernels' results depend on beside the file, such as the instruction set in use.
        cure: the command that rebuilds the library.

    Returns:
        None if the kernels are right; otherwise what is wrong, with the cure. The same is said in a RuntimeWarning.
    """
    stamp = library.stat()
    key = [stamp.st_size, stamp.st_mtime_ns, torch.__version__, _digest_of_the_test(), *circumstances]
    record = library.parent / RECORD
    passed = _read(record)
    if key in passed.get(backend.name, []):
        return None
    found = _found(backend)
    if not found:
        _remember(record, backend.name, key)
        return None
    message = f"{found}; rebuild the library with: {cure}"
    warnings.warn(f"hyperformer_fast: backend {backend.name!r} is not used: {message}", RuntimeWarning, stacklevel=2)
    return message


def _found(backend: Backend) -> str | None:
    """Run the self-test. Returns what is wrong, or None.

    The test runs in a thread of its own, because autocast, the default device and the inference and fake-tensor modes
    are settings of a thread, and those of the caller must not affect the test.
    """
    found: list[str] = []

    def test() -> None:
        try:
            wrong = selftest.faults(backend)
            found.extend(f"its kernels compute wrong numbers here ({fault})" for fault in wrong[:1])
        except Exception as error:
            found.append(f"its kernels do not run here ({type(error).__name__}: {error})")

    thread = threading.Thread(target=test, name="hyperformer_fast live check")
    thread.start()
    thread.join()
    return found[0] if found else None


@functools.cache
def _digest_of_the_test() -> str:
    """A digest of the self-test: what passed an earlier one, which saw less, is tested again."""
    return hashlib.sha256(Path(selftest.__file__).read_bytes()).hexdigest()[:16]


def _read(record: Path) -> dict[str, Any]:
    """Read the recorded passes, a list of keys by backend. An unreadable file counts as empty."""
    try:
        passed = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return passed if isinstance(passed, dict) and all(isinstance(keys, list) for keys in passed.values()) else {}


def _remember(record: Path, name: str, key: list[Any]) -> None:
    """Record the pass ``key``, and drop those of older files of the library. If the folder is not writable, nothing is
    recorded, and the next process tests again."""
    passed = _read(record)
    kept = [old for old in passed.get(name, []) if isinstance(old, list) and old[:2] == key[:2]]
    text = json.dumps({**passed, name: [*kept, key]}, indent=1)
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=record.parent, prefix=f".{RECORD}-", delete=False) as fresh:
            fresh.write(text)
        try:
            os.chmod(fresh.name, 0o644)
            os.replace(fresh.name, record)
        except OSError:
            os.unlink(fresh.name)
