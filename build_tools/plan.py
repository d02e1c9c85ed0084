"""Which libraries a build makes, and why not the others."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from find_torch import Torch

MODES = ("auto", "cpu", "cuda", "all", "none")
#: What each mode must make. The autograd library, which is C++ alone, goes with either library of kernels.
NEEDED: dict[str, tuple[str, ...]] = {
    "auto": (),
    "cpu": ("cpu", "autograd"),
    "cuda": ("cuda", "autograd"),
    "all": ("cpu", "cuda", "autograd"),
    "none": (),
}


class BuildError(Exception):
    """An explicit HYPERFORMER_FAST_BUILD that cannot be met: the cause and the cure."""


class Plan(NamedTuple):
    mode: str
    build: tuple[str, ...]  #: libraries to build, of "cpu", "cuda" and "autograd"
    reasons: dict[str, str]  #: library -> why it is not built


def requested_mode(environ: Mapping[str, str] = os.environ) -> str:
    """HYPERFORMER_FAST_BUILD, checked.

    auto    what can be built; nothing is an error
    cpu     the C++ library, or an error; no CUDA
    cuda    the CUDA library, or an error; no C++ library
    all     both, or an error, whether or not torch is a CUDA build
    none    pure Python
    """
    mode = environ.get("HYPERFORMER_FAST_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise BuildError(f"HYPERFORMER_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def make_plan(
    mode: str, torch: Torch | None, cxx: list[str] | None, cuda_home: Path | None, has_cuda_sources: bool
) -> Plan:
    """Decide, from what the machine has, what ``mode`` builds. BuildError where an explicit mode cannot be met."""
    no_torch = None if torch else "no torch with headers found in this environment (pip install 'torch>=2.11,<2.15')"
    no_cxx = None if cxx else "no C++ compiler found (install g++ or clang++, or set CXX)"
    no_nvcc = None if cuda_home else "no CUDA toolkit with nvcc and cuda_runtime.h found (set CUDA_HOME)"
    missing = {"cpu": no_torch or no_cxx}
    missing["cuda"] = (None if has_cuda_sources else "there are no CUDA sources in csrc/cuda yet") or no_torch
    if mode == "auto" and not missing["cuda"] and not torch.cuda:
        # A CUDA library compiles and loads beside a CPU-only torch, but nothing could call it.
        missing["cuda"] = (
            f"torch {torch.version} is a build without CUDA (HYPERFORMER_FAST_BUILD=all builds it all the same)"
        )
    missing["cuda"] = missing["cuda"] or no_nvcc or no_cxx
    missing["autograd"] = missing["cpu"]
    chosen = tuple(missing) if mode == "auto" else NEEDED[mode]
    for name in NEEDED[mode]:
        if missing[name]:
            raise BuildError(f"HYPERFORMER_FAST_BUILD={mode} cannot be met: {missing[name]}")
    unwanted = f"HYPERFORMER_FAST_BUILD={mode}"
    reasons = {name: why if name in chosen else unwanted for name, why in missing.items() if name not in chosen or why}
    return Plan(mode, tuple(name for name in chosen if name not in reasons), reasons)


def split_flags(name: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """A variable of flags, as a shell would split it."""
    return shlex.split(environ.get(name, ""))
