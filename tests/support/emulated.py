"""The CUDA backend on a CPU: its kernels compiled by the C++ compiler against the emulator in tests/emulator."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from hyperformer_fast.backends.cuda import CudaBackend
from support.environment import setting

ROOT = Path(__file__).resolve().parents[2]
select = importlib.import_module("hyperformer_fast.backends.select")  # the package has a function of that name
EMULATOR, CSRC = ROOT / "tests/emulator", ROOT / "csrc"
BUILT = ROOT / "build/emulator"
#: Added to the compiler's and the linker's command lines, as "-fsanitize=address".
FLAGS = setting("HFF_EMULATOR_FLAGS").split()

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler (g++, or CXX)"
)


def build(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """A shared library of ``sources``, .cu files taken for C++; each built once for what it may read, the flags and
    torch."""
    compiler = os.environ.get("CXX", "g++")
    always = ["-std=c++20", "-O1", "-g1", "-pthread", "-fPIC", "-fvisibility=hidden"]
    common = [compiler, *always, f"-I{EMULATOR}", *flags, *FLAGS]
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests' processes need the same one
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _object(source, common), sources))
        command = [compiler, "-shared", "-pthread", *FLAGS, *map(str, objects), *link]
        library = BUILT / f"{name}-{_digest(repr(command))}.so"
        if not library.exists():
            _make(library, command)
    return library


def _object(source: Path, common: list[str]) -> Path:
    # bindings.cpp, whose torch headers take longer than all kernels, reads none of theirs
    headers = [*EMULATOR.glob("*.h"), *CSRC.rglob("*.h"), *(CSRC.rglob("*.cuh") if source.suffix == ".cu" else [])]
    read = [path.read_bytes() for path in sorted({source, *headers})]
    made = BUILT / f"{source.stem}-{_digest(repr((common, torch.__version__)), *read)}.o"
    if not made.exists():
        _make(made, [*common, "-x", "c++", "-c", str(source)])
    return made


def _digest(first: str, *more: bytes) -> str:
    return hashlib.sha256(b"".join((first.encode(), *more))).hexdigest()[:16]


def _make(made: Path, command: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        fresh = Path(folder) / made.name
        _run([*command, "-o", str(fresh)])
        fresh.replace(made)


def _run(command: list[str]) -> None:
    # a sanitizer that is loaded into the tests is not for the compiler
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    assert done.returncode == 0, done.stderr[-3000:]


@functools.cache
def library():
    """The raw ops of the CUDA library, on CPU tensors."""
    root = Path(torch.__file__).parent
    sources = sorted((CSRC / "cuda").glob("*.cu")) + [CSRC / "cuda/bindings.cpp"]
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    path = build(
        "cuda", sources, ["-DHF_EMULATED", target, "-isystem", str(root / "include")],
        [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"],
    )  # fmt: skip
    torch.ops.load_library(str(path))
    return torch.ops.hyperformer_fast_cuda_emulated


class EmulatedCuda(CudaBackend):
    name = "cuda-emulated"
    device = "cpu"

    def library(self):
        return library()

    def unavailable(self) -> str | None:
        return None


@contextlib.contextmanager
def registered() -> Iterator[EmulatedCuda]:
    """Within it ``use_backend("cuda-emulated")`` works."""
    backend = EmulatedCuda()
    with mock.patch.dict(select._BACKENDS, {backend.name: backend}):
        select._select.cache_clear()
        yield backend
    select._select.cache_clear()


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
