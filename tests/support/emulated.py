"""The CUDA backend on a CPU: its kernels compiled by the C++ compiler against the emulator in tests/emulator."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from hyperformer_fast import backends
from hyperformer_fast.backends.cuda import CudaBackend
from support.environment import setting

ROOT = Path(__file__).resolve().parents[2]
EMULATOR, CSRC = ROOT / "tests/emulator", ROOT / "csrc"
sys.path.insert(0, str(ROOT / "build_tools"))
import arithmetic  # noqa: E402
import ninja_build  # noqa: E402
import toolchain  # noqa: E402

#: Added to the compiler's and the linker's command lines, as "-fsanitize=address".
FLAGS = setting("HFF_EMULATOR_FLAGS").split()

CXX = toolchain.find_cxx()

needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler (g++, clang++, or CXX)")


def build(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """A shared library of ``sources``, .cu files taken for C++."""
    always = ["-std=c++20", "-O1", "-g1", "-pthread", "-fPIC", "-fvisibility=hidden"]
    command = [*CXX, *always, f"-I{EMULATOR}", *flags, *FLAGS, *arithmetic.ieee_flags(CXX), "-x", "c++"]
    units = [ninja_build.Unit(source, command) for source in sources]
    linker = ninja_build.Link([*CXX, "-shared", "-pthread", *FLAGS], link)
    headers = [path for folder in (CSRC, EMULATOR) for path in folder.rglob("*") if path.suffix in (".h", ".cuh")]
    facts = [torch.__version__, toolchain.version_line(CXX)]
    return ninja_build.build_library(
        f"emulator_{name}", units, linker, [*sources, *headers], facts, toolchain.max_jobs()
    )


@functools.cache
def library_file() -> Path:
    """The CUDA library, compiled for CPU tensors."""
    root = Path(torch.__file__).parent
    sources = sorted((CSRC / "cuda").glob("*.cu")) + [CSRC / "cuda/bindings.cpp"]
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    flags = ["-DHFF_EMULATED", target, "-isystem", str(root / "include"), "-include", str(EMULATOR / "allocations.h")]
    return build("cuda", sources, flags, [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"])


@functools.cache
def library():
    """The raw ops of the CUDA library, on CPU tensors."""
    torch.ops.load_library(str(library_file()))
    return torch.ops.hyperformer_fast_cuda_emulated


class EmulatedCuda(CudaBackend):
    name = "cuda-emulated"
    device = "cpu"

    def library(self):
        return library()

    def availability(self) -> backends.Support:
        return backends.Support.yes()

    def serves_by_default(self, request: backends.Request) -> backends.Support:
        return backends.Support.no("the emulator is for tests: ask for it by name")


@contextlib.contextmanager
def registered() -> Iterator[EmulatedCuda]:
    """Within it ``use_backend("cuda-emulated")`` works."""
    backend = EmulatedCuda()
    backends.register(backend)
    try:
        yield backend
    finally:
        backends.unregister(backend.name)


@contextlib.contextmanager
def thread_order(name: str, copies: str = "late", turns: str = "greedy") -> Iterator[None]:
    """The order in which a block's threads, and a grid's blocks, run: "forward", "reverse", or a seed; whether
    asynchronous copies arrive "late", at their wait, or "early", at once; and whether the first that may go on does
    ("greedy") or the next ("fair")."""
    settings = {"HFF_EMULATOR_ORDER": name, "HFF_EMULATOR_COPIES": copies, "HFF_EMULATOR_TURNS": turns}
    with mock.patch.dict(os.environ, settings):
        yield


def device_of(blocks: int):
    """So many blocks fit on the device at a time: what a cooperative launch gets."""
    return mock.patch.dict(os.environ, {"HFF_EMULATOR_BLOCKS": str(blocks)})


@contextlib.contextmanager
def few_rows(limit: int) -> Iterator[None]:
    """The forward's kernel for few rows serves up to ``limit``."""
    before = library().use_few_rows(limit)
    try:
        yield
    finally:
        library().use_few_rows(before)
