"""Finds and loads the compiled libraries, and warns once if they are missing or out of date.

Importing this module does not import torch; asking it for a library does. Nothing here raises: without its libraries
the package works in pure Python.
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
    """Read build_info.json, which the build writes beside the libraries. It is empty if the package was never built."""
    try:
        info = json.loads((_PACKAGE / _INFO).read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) and isinstance(info.get("libraries"), dict) else {}


def stale(library: str) -> bool:
    """Whether the sources of ``library`` ("cpu", "cuda" or "autograd") changed since it was built. False if there is no
    library, or if there are no sources, as in a wheel."""
    built = build_info().get("libraries", {}).get(library)
    csrc = _source_tree() / "csrc"
    if not built or not csrc.is_dir():
        return False
    try:
        return bool(built.get("source_hash") != source_hash(csrc, library))
    except OSError:
        return False


def rebuild_command() -> str:
    """The command that builds, or rebuilds, the libraries of this copy of the package."""
    root = _source_tree()
    if (root / "setup.py").is_file():
        return f"pip install --no-build-isolation --no-deps -e {root}"
    return "pip install --no-build-isolation --no-deps --force-reinstall <folder of the sources>"


def _source_tree() -> Path:
    """The folder that contains the package: in an editable install, the root of the sources."""
    return _PACKAGE.parent


@functools.cache
def _load(library: str) -> str | None:
    """Load ``library`` into torch, once. Returns None if that worked, otherwise the reason why it did not."""
    info = build_info()
    built = info.get("libraries", {}).get(library)
    if not built:
        why = info.get("not_built", {}).get(library)
        # The reason why CUDA was not built names its own cure. The CPU library needs nothing but the build command.
        cure = "" if why and library == "cuda" else f"; build it with: {rebuild_command()}"
        return f"the {library} library is not built: {why or 'the package was never built'}{cure}"
    import torch

    if library == "autograd" and info.get("torch") != torch.__version__:
        return (
            f"the autograd library was built against torch {info.get('torch')} and fits no other, "
            f"this is {torch.__version__}; rebuild it with: {rebuild_command()}"
        )
    subnormals = _has_subnormals()
    try:
        torch.ops.load_library(str(library_file(library)))
    except Exception as error:  # e.g. a missing file or another torch; the reference backend still works
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
    """The file of ``library`` ("cpu", "cuda" or "autograd"), or None if it was not built."""
    built = build_info().get("libraries", {}).get(library)
    return _PACKAGE / built["file"] if built else None


def _has_subnormals() -> bool:
    """Whether this thread computes with subnormal numbers rather than flushing them to zero."""
    return float("5e-324") * float("1") != 0


@functools.cache
def cpu_library() -> Any:
    """Load the CPU library. Returns ``torch.ops.hyperformer_fast_cpu``, or None if the library cannot be loaded
    (:func:`status` says why)."""
    if _load("cpu"):
        return None
    import torch

    return torch.ops.hyperformer_fast_cpu


@functools.cache
def cuda_library() -> Any:
    """Load the CUDA library. Returns ``torch.ops.hyperformer_fast_cuda``, or None if the library cannot be loaded
    (:func:`status` says why)."""
    if _load("cuda"):
        return None
    import torch

    return torch.ops.hyperformer_fast_cuda


@functools.cache
def autograd_library() -> Any:
    """Load the autograd nodes in C++. Returns ``torch.ops.hyperformer_fast_autograd``, or None if the library cannot be
    loaded (:func:`status` says why), as with a torch that is not the one it was built against."""
    if _load("autograd"):
        return None
    import torch

    return torch.ops.hyperformer_fast_autograd


def status(library: str = "cpu") -> dict[str, Any]:
    """Load ``library`` ("cpu", "cuda" or "autograd"), and report on it.

    Returns:
        ``built``: whether the build made it; ``loaded``: whether it loads; ``stale``: whether its sources changed since
        its build; ``reason``: why it is not loaded, or None if it is; ``build_info``: the content of build_info.json;
        ``rebuild``: the command that builds it.
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
    """Check, without loading a library, whether the libraries are missing or out of date.

    Returns:
        A sentence for the user. None if all is well, or if the user asked for pure Python with
        HYPERFORMER_FAST_BUILD=none, at the build or now.
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
    """Warn of what :func:`problem` finds, if anything, once per process. The package calls it when it is imported."""
    message = problem()
    if message:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
