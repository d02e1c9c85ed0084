"""Launches of the CUDA kernels on CPU tensors: nvcc's PTX of csrc/cuda, interpreted.

The host code is the library's own, compiled for the emulator of tests/emulator. It prepares every launch (geometry,
shared memory, the bytes of the parameters) and hands it over instead of running it, so that nothing about the launches
is written down a second time. nvcc then compiles only the instantiations that were launched.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from support import emulated
from torch import Tensor

from ptx import Kernel, Memory
from ptx.grids import Choice, Plant, Ran, all_blocks, memory_of, run_grid, unchanged

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc/cuda"
sys.path.insert(0, str(ROOT / "build_tools"))
import arithmetic  # noqa: E402
import toolchain  # noqa: E402

CUDA_HOME = toolchain.find_cuda_home()

#: Where PTX is kept between runs, by the digest of all that it depends on.
CACHE = ROOT / "build/ptx"


@functools.cache
def _facts() -> bytes:
    """Everything but its own source that the PTX depends on."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
    version = toolchain.version_line([str(CUDA_HOME / "bin/nvcc")])
    return b"\0".join([version.encode(), *(path.read_bytes() for path in files)])


def ptx_of(source: str, arch: int) -> str:
    """The PTX of CUDA code for ``arch``, compiled with the library's flags."""
    command = [str(CUDA_HOME / "bin/nvcc"), *toolchain.NVCC_FLAGS, "-include", str(arithmetic.HEADER), f"-I{CUDA}"]
    command += ["-ptx", f"-arch=compute_{arch}"]
    digest = hashlib.sha256("\0".join([source, *command]).encode() + _facts()).hexdigest()[:20]
    kept = CACHE / f"{digest}.ptx"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            path = Path(folder, "kernel.cu")
            path.write_text(source)
            done = subprocess.run([*command, str(path), "-o", f"{folder}/kernel.ptx"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            os.replace(f"{folder}/kernel.ptx", kept)  # another process may make the same
    return kept.read_text()


def source_of(demangled: str) -> str:
    """CUDA code that has the kernel: an instantiation of a template from a header, or the file that defines it."""
    name = re.search(r"\w+_kernel\b", demangled)[0]
    definition = re.compile(rf"__global__[^;{{]*\b{name}\(")
    (file,) = (path for path in sorted(CUDA.glob("*.cu*")) if definition.search(path.read_text()))
    if file.suffix == ".cu":
        return f'#include "{file.name}"\n'
    return f'#include "{file.name}"\ntemplate __global__ {demangled};\n'


def canonical(mangled: str) -> str:
    """A mangled name without the anonymous namespace, which every compiler names in its own way."""
    found = re.search(r"(\d+)_GLOBAL__N_", mangled)
    if not found:
        return mangled
    start = found.start() + len(found[1])
    return mangled[: found.start()] + "{anonymous}" + mangled[start + int(found[1]) :]


@functools.cache
def text_of(mangled: str, arch: int) -> tuple[str, str, str]:
    """A kernel's name without ``_kernel``, the PTX that holds it, and its name there."""
    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = ptx_of(source_of(demangled), arch)
    entries = re.findall(r"\.entry\s+([\w$]+)", text)
    (entry,) = (entry for entry in entries if canonical(entry) == canonical(mangled))
    return re.search(r"(\w+)_kernel\b", demangled)[1], text, entry


def with_workspace(text: str, workspace: Tensor) -> str:
    """PTX in which a cooperative grid finds its workspace: a GPU's driver passes its address in two registers."""
    high, low = divmod(workspace.data_ptr(), 1 << 32)
    return text.replace("%envreg1;", f"{high:#x};").replace("%envreg2;", f"{low:#x};")


@functools.cache
def _symbols() -> tuple[list[int], list[str]]:
    """The functions of the emulated library by their offsets, local ones included."""
    listed = subprocess.run(
        ["nm", "--defined-only", str(emulated.library_file())], capture_output=True, text=True, check=True
    )
    found = sorted((int(line.split()[0], 16), line.split()[2]) for line in listed.stdout.splitlines())
    return [at for at, _ in found], [name for _, name in found]


def name_of(address: int, library: ctypes.CDLL) -> str:
    """The mangled name of the function at ``address``."""
    offsets, names = _symbols()
    known = names.index("hff_emulator_take")
    base = ctypes.cast(library.hff_emulator_take, ctypes.c_void_p).value - offsets[known]
    at = bisect.bisect_left(offsets, address - base)
    assert offsets[at] == address - base, "a launch of a function that the library does not define"
    return names[at]


_TAKE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p,
    ctypes.c_size_t,
)  # fmt: skip
_NOTE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


class InterpretedLibrary:
    """The raw ops of the CUDA library, with every launch interpreted. Each op has the bounds of its own tensors."""

    def __init__(self, arch: int, plant: Plant, hazards: bool, choose: Choice):
        self._arch, self._plant, self._hazards, self._choose = arch, plant, hazards, choose
        self._workspace = torch.zeros(2, dtype=torch.int32)
        self._inputs: dict[str, Tensor] = {}
        self._made: list[tuple[int, int]] = []
        self._fault: BaseException | None = None
        self._file = ctypes.CDLL(str(emulated.library_file()))
        self._callbacks = _TAKE(self._take), _NOTE(lambda address, nbytes: self._made.append((address, nbytes)))
        self.ran: list[Ran] = []

    def hook(self, on: bool) -> None:
        take, note = self._callbacks if on else (_TAKE(), _NOTE())
        self._file.hff_emulator_take(take, note)

    def __getattr__(self, op: str):
        def call(*arguments):
            self._inputs = {f"argument {i}": t for i, t in enumerate(arguments) if isinstance(t, Tensor)}
            self._made.clear()
            self._fault = None
            try:
                return getattr(emulated.library(), op)(*arguments)
            except RuntimeError:
                if self._fault is None:
                    raise
            raise self._fault  # the interpreter's, in place of the library's word that a launch failed

        return call

    def _memory(self) -> Memory:
        memory = memory_of(self._inputs | {"the grid's workspace": self._workspace})
        for i, (address, nbytes) in enumerate(self._made):
            memory.add(address, nbytes, f"tensor {i} that the op made")
        return memory

    def _take(self, address: int, grid, threads: int, shared: int, parameters: int, nbytes: int) -> int:
        try:
            mangled = name_of(address, self._file)
            name, text, entry = text_of(mangled, self._arch)
            text = with_workspace(text, self._workspace)
            kernel = Kernel(self._plant(name, text), entry)
            ((parameter, _, size),) = kernel.parameters
            assert size == nbytes, f"{name}: nvcc's parameters have {size} bytes, the host compiler's {nbytes}"
            packed = ctypes.string_at(parameters, nbytes)
            whole = tuple(grid[:3])
            ran = run_grid(
                kernel, self._memory(), {parameter: packed}, whole, threads, shared, self._hazards,
                self._choose(name, whole),
            )  # fmt: skip
            ran.kernel = name
            self.ran.append(ran)
        except BaseException as fault:  # C++ cannot carry it: __getattr__ raises it
            self._fault = fault
            return 1
        return 0


class InterpretedCuda(emulated.EmulatedCuda):
    """The CUDA backend's functions over an :class:`InterpretedLibrary`."""

    def __init__(self, library: InterpretedLibrary):
        super().__init__()
        self._library = library

    def library(self):
        return self._library


@contextlib.contextmanager
def interpreted(
    arch: int, plant: Plant = unchanged, hazards: bool = True, choose: Choice = all_blocks
) -> Iterator[tuple[InterpretedCuda, list[Ran]]]:
    """The CUDA backend for CPU tensors as on a GPU of ``arch``, and the list of what it launched, which grows.

    Args:
        arch: such as 90.
        plant: changes the PTX before it is interpreted.
        hazards: whether to look for unordered accesses to shared memory.
        choose: which blocks of a launch run. What the others would have written is then missing.
    """
    emulated.library()
    library = InterpretedLibrary(arch, plant, hazards, choose)
    library.hook(True)
    try:
        # one block stands for the grid of a cooperative launch, because blocks run one after the other
        with emulated.device_of(1), torch.no_grad():
            yield InterpretedCuda(library), library.ran
    finally:
        library.hook(False)
