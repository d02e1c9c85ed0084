"""The compiled libraries: found, loaded once, and, where they are missing or out of date, said so once.

Importing this module imports no torch; asking it for a library does. Nothing here raises: without a library the package
is pure Python.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ._sources import source_hash

_PACKAGE = Path(__file__).resolve().parent
_INFO = "build_info.json"


@functools.cache
def build_info() -> dict[str, Any]:
    """build_info.json, as the build wrote it beside the libraries; empty where the package was never built."""
    try:
        info = json.loads((_PACKAGE / _INFO).read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) and isinstance(info.get("libraries"), dict) else {}


def stale(library: str) -> bool:
    """Whether the sources of ``library`` ("cpu" or "cuda") changed since its build. False without, as in a wheel."""
    built = build_info().get("libraries", {}).get(library)
    csrc = _source_tree() / "csrc"
    if not built or not csrc.is_dir():
        return False
    try:
        return bool(built.get("source_hash") != source_hash(csrc, library))
    except OSError:
        return False


def rebuild_command() -> str:
    """What to type to (re)build the libraries of this very copy of the package."""
    root = _source_tree()
    if (root / "setup.py").is_file():
        return f"pip install --no-build-isolation --no-deps -e {root}"
    return "pip install --no-build-isolation --no-deps --force-reinstall <folder of the sources>"


def _source_tree() -> Path:
    return _PACKAGE.parent


@functools.cache
def _load(library: str) -> str | None:
    """Load ``library`` into torch; None where that worked, else the reason why not."""
    info = build_info()
    built = info.get("libraries", {}).get(library)
    if not built:
        why = info.get("not_built", {}).get(library)
        # A reason for not building CUDA names its own cure; the C++ library needs no more than the command.
        cure = "" if why and library == "cuda" else f"; build it with: {rebuild_command()}"
        return f"the {library} library is not built: {why or 'the package was never built'}{cure}"
    import torch

    subnormals = _has_subnormals()
    try:
        torch.ops.load_library(str(library_file(library)))
    except Exception as error:  # a missing file, another torch, another machine: the reference still serves
        words = str(error).strip().splitlines()
        cause = words[0] if words else repr(error)
        what = f"the {library} library does not load in torch {torch.__version__}"
        return f"{what}: {cause}; rebuild it with: {rebuild_command()}"
    if subnormals and not _has_subnormals():
        torch.set_flush_denormal(False)
        return (
            f"the {library} library was linked with -ffast-math and switched this thread's subnormal numbers off "
            f"(they are on again); rebuild it without such flags: {rebuild_command()}"
        )
    return None


def library_file(library: str) -> Path | None:
    """The file of ``library`` ("cpu" or "cuda"); None where the build made none."""
    built = build_info().get("libraries", {}).get(library)
    return _PACKAGE / built["file"] if built else None


def _has_subnormals() -> bool:
    return float("5e-324") * float("1") != 0


@functools.cache
def cpu_library() -> Any:
    """``torch.ops.hyperformer_fast_cpu``, its library loaded; None where there is none (:func:`status` says why)."""
    if _load("cpu"):
        return None
    import torch

    return torch.ops.hyperformer_fast_cpu


@functools.cache
def cuda_library() -> Any:
    """``torch.ops.hyperformer_fast_cuda``, its library loaded; None where there is none (:func:`status` says why)."""
    if _load("cuda"):
        return None
    import torch

    return torch.ops.hyperformer_fast_cuda


def status(library: str = "cpu") -> dict[str, Any]:
    """What is known of ``library`` ("cpu" or "cuda"): loads it.

    Returns:
        ``built``: whether the build made it; ``loaded``; ``stale``: whether its sources changed; ``reason``: why it is
        not loaded, None where it is; ``build_info``: the whole of build_info.json; ``rebuild``: the command.
    """
    reason = _load(library)
    return {
        "built": library in build_info().get("libraries", {}),
        "loaded": reason is None,
        "stale": stale(library),
        "reason": reason,
        "build_info": build_info(),
        "rebuild": rebuild_command(),
    }


def problem() -> str | None:
    """One line on what a user should know at import, without loading anything: no kernels, or outdated ones.

    None where all is well, and where pure Python was asked for: HYPERFORMER_FAST_BUILD=none at the build, or now.
    """
    info = build_info()
    if "none" in (info.get("mode"), os.environ.get("HYPERFORMER_FAST_BUILD", "").strip().lower()):
        return None
    if not info.get("libraries"):
        why = info.get("not_built", {}).get("cpu", "the package was never built")
        return f"hyperformer_fast runs without its compiled kernels ({why}). To build them: {rebuild_command()}"
    old = [library for library in info["libraries"] if stale(library)]
    if old:
        return (
            f"the sources of the {' and '.join(old)} library changed since its build. To rebuild: {rebuild_command()}"
        )
    return None


@functools.cache
def warn_once() -> None:
    """Warn of :func:`problem`, at the first import of the package and never again."""
    message = problem()
    if message:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
