"""A compiled library serves only after its kernels were right once: with this torch, on this machine.

Flags, a compiler's fault or another CPU can make a library that loads and computes wrong numbers. The test takes some
ten milliseconds, so what passed is remembered in a file beside the library.
"""

from __future__ import annotations

import contextlib
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

#: Written empty by the build, so that an uninstall finds it.
RECORD = "live_check.json"


def fault(backend: Backend, library: Path, circumstances: list[str], cure: str) -> str | None:
    """Why the kernels of ``library`` must not serve, with the cure; None where they compute what they should.

    Args:
        backend: calls the kernels.
        library: the file they are in.
        circumstances: what else than the file the kernels' results rest on, as the instruction set in use.
        cure: the command that builds the library anew.
    """
    stamp = library.stat()
    key = [stamp.st_size, stamp.st_mtime_ns, torch.__version__, *circumstances]
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
    """What is wrong. In a thread of its own: autocast, default devices, inference and fake-tensor modes are a thread's,
    and the caller's must not reach the test."""
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


def _read(record: Path) -> dict[str, Any]:
    try:
        passed = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return passed if isinstance(passed, dict) and all(isinstance(keys, list) for keys in passed.values()) else {}


def _remember(record: Path, name: str, key: list[Any]) -> None:
    """Add ``key``, and drop what was remembered of older files. A folder that cannot be written is no fault."""
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
