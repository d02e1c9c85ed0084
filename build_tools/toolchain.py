"""Compilers: where they are, and the commands that make a library."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from arithmetic import HEADER, ieee_flags, refuse_fast_nvcc, refuse_fast_start, without_ofast
from find_torch import Torch
from ninja_build import CACHE, Link, Unit, build_library
from plan import BuildError, split_flags

#: libtorch's stable ABI as of 2.11: one library then loads in every torch from 2.11 on.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
#: No -march=native: wheels travel; vector widths are chosen at run time.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", TARGET]
#: Machine code for three architectures shrinks to a fifth. nvcc knows the first form, the tighter one, from 12.8 on.
NVCC_COMPRESSION = (["--compress-mode=size"], ["-Xfatbin", "-compress-all"])
#: 8.6's code runs on 8.9, whose instructions are the same; 9.0's PTX serves what is newer.
DEFAULT_ARCHS = "8.0;8.6;9.0+PTX"


def find_cxx(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler as the start of a command: CXX, else the first of g++, clang++ and c++ on PATH.

    CXX may hold launchers before the compiler ("ccache g++") and flags after it ("g++ -pthread"). BuildError where it
    names what is not there: a user who sets it does not mean a package without kernels.
    """
    path = environ.get("PATH")
    asked = environ.get("CXX", "").strip()
    if not asked:
        return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name, path=path)), None)
    try:
        # A path with spaces may come without quotes.
        command = [asked] if shutil.which(asked, path=path) else shlex.split(asked)
        done = subprocess.run([*command, "--version"], env=environ, capture_output=True, text=True)
    except (ValueError, OSError) as error:
        raise BuildError(f"CXX={asked!r} cannot be run ({error}): correct it or unset it") from None
    if done.returncode:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise BuildError(f"CXX={asked!r} is no compiler that runs ({words[0]}): correct it or unset it")
    return without_ofast(command)


def compiler_and_flags(cxx: Sequence[str]) -> tuple[str, list[str]]:
    """The compiler itself in a command such as "ccache g++ -pthread", and its flags: what nvcc takes for its host."""
    programs = list(itertools.takewhile(lambda word: not word.startswith("-"), cxx))
    return (programs[-1] if shutil.which(programs[-1]) else programs[0]), list(cxx[len(programs) :])


def find_cuda_home(environ: Mapping[str, str] = os.environ) -> Path | None:
    """A toolkit that holds both nvcc and the run-time's header: an nvcc on PATH may be a wrapper script elsewhere."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    candidates = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates.append(str(Path(nvcc).resolve().parents[1]) if nvcc else None)
    for home in candidates:
        if home and Path(home, "bin/nvcc").is_file() and Path(home, "include/cuda_runtime.h").is_file():
            return Path(home)
    return None


def arch_flags(archs: str) -> list[str]:
    """nvcc's -gencode flags for a list "8.0;9.0+PTX" (TORCH_CUDA_ARCH_LIST); BuildError names a misspelt one.

    What is older than the kernels need (cp.async: 8.0) is left out of the list, which is often written for torch.
    """
    flags = []
    for arch in archs.replace(" ", ";").replace(",", ";").split(";"):
        if not arch:
            continue
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must be a list such as {DEFAULT_ARCHS}, got {arch!r} in {archs!r}")
        if int(number.rstrip("af")) < 80:
            print(f"hyperformer_fast: TORCH_CUDA_ARCH_LIST: {arch} is left out, 8.0 is the oldest served", flush=True)
            continue
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    if not flags:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST must name an architecture of 8.0 or later, got {archs!r}")
    return flags


def max_jobs(environ: Mapping[str, str] = os.environ) -> int:
    """MAX_JOBS, or the number of processors."""
    value = environ.get("MAX_JOBS", "").strip()
    if value and not (value.isdigit() and int(value) > 0):
        raise BuildError(f"MAX_JOBS must be a whole number of at least 1, got {value!r}")
    return int(value) if value else os.cpu_count() or 1


def version_line(command: Sequence[str]) -> str:
    """The line of ``--version`` that names the version; nvcc's is the last but one."""
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else "unknown")


class Compiler:
    """The commands that make a library, run through ninja. BuildError where a flag would change the arithmetic.

    Args:
        torch: whose headers and libraries.
        cxx: the C++ compiler.
        cuda_home: the CUDA toolkit, where the library has .cu sources.
        stable: whether the library keeps to libtorch's stable ABI. One that does not fits only the torch in ``torch``.
    """

    def __init__(self, torch: Torch, cxx: list[str], cuda_home: Path | None = None, stable: bool = True):
        self.torch, self.cxx, self.cuda_home = torch, cxx, cuda_home
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHS
        self.version = version_line(cxx)
        ieee = ieee_flags(cxx)
        self.cxx_flags = [*CXX_FLAGS, *([TARGET] if stable else []), *without_ofast(split_flags("CXXFLAGS")), *ieee]
        self.link_flags = without_ofast(split_flags("LDFLAGS"))
        refuse_fast_start([*cxx, "-shared", *self.link_flags])
        self.nvcc, self.nvcc_flags = [], []
        if cuda_home:
            self.nvcc = [str(cuda_home / "bin/nvcc")]
            self.nvcc_version = version_line(self.nvcc)
            release = re.search(r"release (\d+)\.(\d+)", self.nvcc_version)
            modern = release is not None and (int(release[1]), int(release[2])) >= (12, 8)
            host, flags = compiler_and_flags(cxx)
            self.nvcc_host = ["-ccbin", host, *(f"-Xcompiler={flag}" for flag in flags)]
            compression = NVCC_COMPRESSION[0 if modern else 1]
            self.nvcc_flags = [*NVCC_FLAGS, *compression, *self.nvcc_host, *arch_flags(self.archs)]
            self.nvcc_flags += ["-include", str(HEADER)]
            refuse_fast_nvcc([*self.nvcc, *self.nvcc_flags])

    def info(self) -> dict:
        """What build_info.json says of the compiler."""
        info = {"compiler": self.version, "flags": self.cxx_flags + self.link_flags}
        if self.cuda_home:
            info |= {"nvcc": self.nvcc_version, "archs": self.archs, "nvcc_flags": self.nvcc_flags}
        return info

    def build(self, name: str, inputs: list[Path], cache: Path = CACHE) -> Path:
        """The library of every .cpp and .cu file in ``inputs``, whose other files they may include."""
        units = [Unit(path, self._command(path)) for path in inputs if path.suffix in (".cpp", ".cu")]
        libraries = [f"-L{self.torch.root / 'lib'}", "-ltorch_cpu", "-lc10"]
        linker = [*self.cxx, "-shared"]
        if self.cuda_home:
            linker = [*self.nvcc, "-shared", "-cudart", "static", *self.nvcc_host]
        link = Link(linker, [*libraries, *self.link_flags])
        facts = [self.torch.version, self.version, self.nvcc_version if self.cuda_home else ""]
        return build_library(name, units, link, inputs, facts, max_jobs(), cache)

    def _command(self, source: Path) -> list[str]:
        include = ["-isystem", str(self.torch.root / "include")]
        if source.suffix == ".cu":
            return [*self.nvcc, *self.nvcc_flags, *include]
        headers = ["-isystem", str(self.cuda_home / "include")] if self.cuda_home else []
        return [*self.cxx, *self.cxx_flags, *headers, *include]
