"""Compile report of the CUDA kernels: registers, shared memory, spills and instructions, without a GPU.

    python tools/cuda_gate.py [--write] [--arch 80 86 89 90 100 120] [--library PATH]

Builds the library for these architectures with spills as errors, or reads a built one. The report says nothing about
speed. ``--write`` records it in tools/results. Exits with 1 where a kernel has a fault (see ``faults``).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import records
import torch
from device import MULTIPROCESSORS, blocks_per_multiprocessor
from machine_code import Code, cubins, take_apart

from hyperformer_fast.backends.cuda import KERNELS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "build_tools"))
from native_build import build_libraries  # noqa: E402

ARCHITECTURES = tuple(MULTIPROCESSORS)
#: A kernel's mangled name; the groups are the kernel, its number type and the template's other arguments.
_NAME = re.compile(rf"({'|'.join(KERNELS)})_kernel(?:I(?:NS_\d(F32|BF16|F16)E)?(.*?)E?EE?v)?")
#: Kernels with an instantiation for each limit of b, and those of them that use tensor cores.
BY_BOTTLENECK = ("forward", "backward", "weight_gradients", "few_rows", "site")
ON_TENSOR_CORES = tuple(set(BY_BOTTLENECK) - {"few_rows"})
#: The width d for which the shared memory of few_rows and site is reported.
WIDTH = 768
WARPS = 8
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclasses.dataclass
class Compiled:
    """One kernel's machine code in numbers; the last five count instructions where they stand in the code."""

    kernel: str
    dtype: str
    arch: int
    registers: int
    stack: int
    shared: int  #: bytes a block
    blocks: int  #: that fit on a multiprocessor at a time
    spills: int  #: local loads and stores
    tensor: int  #: tensor-core products
    wide_loads: int  #: 16 bytes a thread
    copies: int  #: asynchronous, from global to shared memory
    wide_stores: int


def build(archs: list[int], folder: Path) -> Path:
    """Build the library for ``archs``.

    Raises:
        RuntimeError: a kernel spills, or the build fails otherwise.
    """
    os.environ |= {
        "HYPERFORMER_FAST_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": ";".join(f"{arch // 10}.{arch % 10}" for arch in archs),
        "NVCC_APPEND_FLAGS": "-Xptxas --warn-on-spills,--warning-as-error",
    }
    info = build_libraries(folder / "out", folder / "objects")
    return folder / "out" / info["libraries"]["cuda"]["file"]


def gate(library: Path) -> Iterator[Compiled]:
    """Every kernel of a built library."""
    torch.ops.load_library(str(library))
    with tempfile.TemporaryDirectory() as folder:
        for arch, cubin in cubins(library, Path(folder)):
            for code in take_apart(cubin):
                if re.search(_NAME, code.name):  # the CUDA runtime that is linked in has kernels of its own
                    yield described(code, arch)


def described(code: Code, arch: int) -> Compiled:
    """The report's row for a kernel of csrc/cuda, whose sizes are read from its mangled name."""
    kernel, dtype, arguments = re.search(_NAME, code.name).groups()
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E?", arguments or "")]
    name, b = kernel, 128  # the largest b, for the kernels that have one instantiation for all
    if kernel in BY_BOTTLENECK:
        b, *kept, aligned = numbers
        name += f", b <= {b}" + (f", {kept[0]} pieces kept" if any(kept) else "" if aligned else ", not aligned")
    shared_bytes = torch.ops.hyperformer_fast_cuda.shared_bytes
    shared = shared_bytes(KERNELS.index(kernel), WIDTH, b, DTYPES[dtype or "F32"])
    fits = blocks_per_multiprocessor(code.registers, shared, WARPS, arch)
    return Compiled(
        name, (dtype or "F32").lower(), arch, code.registers, code.stack, shared, fits, code.count("LDL|STL"),
        code.count("[HD]MMA"), code.count(r"LDG.*\.128"), code.count("LDGSTS"), code.count(r"STG.*\.128"),
    )  # fmt: skip


def faults(compiled: Compiled) -> list[str]:
    """Why this kernel must not be released; empty if it may be."""
    found = []
    if compiled.stack or compiled.spills:
        found.append(f"{compiled.stack} bytes of stack, {compiled.spills} local accesses")
    if not compiled.blocks:
        found.append("does not fit on a multiprocessor")
    if compiled.kernel.startswith(ON_TENSOR_CORES) and not compiled.tensor:
        found.append("no tensor-core products")
    if compiled.kernel.startswith(BY_BOTTLENECK):
        # weight_gradients reads by asynchronous copies alone, and writes sums that are narrow
        loads = compiled.copies and (compiled.wide_loads or compiled.kernel.startswith("weight"))
        stores = compiled.wide_stores or compiled.kernel.startswith("weight")
        if "not aligned" not in compiled.kernel and not (loads and stores):
            found.append("no 16-byte accesses")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--write", action="store_true", help=f"record in {records.RESULTS}")
    parser.add_argument(
        "--library", type=Path, help="read this library instead of building one; --arch is then ignored"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = options.library or build(options.arch, Path(folder))
        print(f"{library.stat().st_size / 2**20:.1f} MiB", flush=True)
        results = sorted(gate(library), key=lambda r: (r.arch, r.kernel, r.dtype))
    for result in results:
        print(result, *faults(result), flush=True)
    if options.write:
        records.write(
            "cuda_gate", "What the CUDA kernels compile to", "python tools/cuda_gate.py --write",
            [dataclasses.asdict(result) for result in results],
        )  # fmt: skip
    sys.exit(not results or any(faults(result) for result in results))


if __name__ == "__main__":
    main()
