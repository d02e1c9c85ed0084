"""Compilers: where they are, and the command lines that make a library."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from find_torch import Torch
from plan import BuildError, split_flags

#: libtorch's stable ABI as of 2.11: one library then loads in every torch from 2.11 on.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
#: No -march=native: wheels travel; vector widths are chosen at run time.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", TARGET]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", TARGET]
#: Machine code for three architectures shrinks to a fifth. nvcc knows the first form, the tighter one, from 12.8 on.
NVCC_COMPRESSION = (["--compress-mode=size"], ["-Xfatbin", "-compress-all"])
#: 8.6's code runs on 8.9, whose instructions are the same; 9.0's PTX serves what is newer.
DEFAULT_ARCHS = "8.0;8.6;9.0+PTX"


def find_cxx(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler as the start of a command: CXX, else the first of g++, clang++ and c++ on PATH."""
    if environ.get("CXX", "").strip():
        command = shlex.split(environ["CXX"])
        return command if shutil.which(command[-1], path=environ.get("PATH")) else None
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name, path=environ.get("PATH")):
            return [name]
    return None


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


def version_line(compiler: str) -> str:
    """The line of ``--version`` that names the version; nvcc's is the last but one."""
    lines = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else "unknown")


class Compiler:
    """Objects from sources, a shared library from objects.

    Args:
        torch: whose headers and libraries.
        cxx: the C++ compiler.
        cuda_home: the CUDA toolkit, where the library has .cu sources.
    """

    def __init__(self, torch: Torch, cxx: list[str], cuda_home: Path | None = None):
        self.torch, self.cxx, self.cuda_home = torch, cxx, cuda_home
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHS
        self.cxx_flags = CXX_FLAGS + split_flags("CXXFLAGS")
        self.nvcc_flags = []
        if cuda_home:
            release = re.search(r"release (\d+)\.(\d+)", version_line(str(cuda_home / "bin/nvcc")))
            modern = release is not None and (int(release[1]), int(release[2])) >= (12, 8)
            compression = NVCC_COMPRESSION[0 if modern else 1]
            self.nvcc_flags = [*NVCC_FLAGS, *compression, "-ccbin", cxx[-1], *arch_flags(self.archs)]

    def info(self) -> dict:
        """What build_info.json says of the compiler."""
        info = {"compiler": version_line(self.cxx[-1]), "flags": self.cxx_flags + split_flags("LDFLAGS")}
        if self.cuda_home:
            info |= {
                "nvcc": version_line(str(self.cuda_home / "bin/nvcc")),
                "archs": self.archs,
                "nvcc_flags": self.nvcc_flags,
            }
        return info

    def build(self, sources: list[Path], objects: Path, library: Path) -> None:
        """Compile ``sources`` into ``objects``, MAX_JOBS at once, and link. BuildError quotes the compiler."""
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        made = [objects / f"{source.stem}{source.suffix.replace('.', '_')}.o" for source in sources]
        commands = [self._compile(source, out) for source, out in zip(sources, made, strict=True)]
        with ThreadPoolExecutor(max_jobs()) as pool:
            list(pool.map(_run, commands))
        libraries = [f"-L{self.torch.root / 'lib'}", "-ltorch_cpu", "-lc10"]
        linker = [*self.cxx, "-shared"]
        if self.cuda_home:
            linker = [str(self.cuda_home / "bin/nvcc"), "-shared", "-cudart", "static", "-ccbin", self.cxx[-1]]
        _run([*linker, *map(str, made), *libraries, *split_flags("LDFLAGS"), "-o", str(library)])

    def _compile(self, source: Path, out: Path) -> list[str]:
        include = ["-isystem", str(self.torch.root / "include"), "-c", str(source), "-o", str(out)]
        if source.suffix == ".cu":
            return [str(self.cuda_home / "bin/nvcc"), *self.nvcc_flags, *include]
        headers = ["-isystem", str(self.cuda_home / "include")] if self.cuda_home else []
        return [*self.cxx, *self.cxx_flags, *headers, *include]


def _run(command: list[str]) -> None:
    print(" ".join(map(shlex.quote, command)), file=sys.stderr, flush=True)
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    print(result.stdout + result.stderr, end="", file=sys.stderr, flush=True)
    if result.returncode:
        words = (result.stderr or result.stdout).strip().splitlines()
        first = next((line for line in words if "error" in line.lower()), words[0] if words else "no message")
        raise BuildError(f"{Path(command[0]).name} failed (exit status {result.returncode}): {first.strip()}")
