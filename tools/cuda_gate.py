"""What the CUDA kernels compile to, for GPUs that need not be there.

    python tools/cuda_gate.py [--write] [--arch 80 86 89 90 100 120] [--library PATH]

Builds the library for these architectures with spills as errors, or takes one that is built, and takes its machine
code apart with the tools of Triton's wheel: registers, stack, shared memory and instructions are facts of it, and how
many blocks fit on a multiprocessor follows. How fast it is, only a GPU can say. ``--write`` puts the table in
docs/cuda_gate.md. Exits with 1 where a kernel spills, or lacks tensor-core products or 16-byte accesses.
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

import torch
from machine_code import Code, blocks_per_multiprocessor, cubins, take_apart

from hyperformer_fast.backends.cuda import KERNELS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cuda_gate.md"
sys.path.insert(0, str(ROOT / "build_tools"))
from native_build import build_libraries  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: In a kernel's mangled name: the number type, and the template's arguments.
_NAME = re.compile(rf"({'|'.join(KERNELS)})_kernel(?:I(?:NS_\d(F32|BF16|F16)E)?(.*?)E?EE?v)?")
#: Instantiated for bottlenecks up to some b; and those of them with the tensor cores at work.
BY_BOTTLENECK = ("forward", "backward", "weight_gradients", "few_rows", "site")
ON_TENSOR_CORES = tuple(set(BY_BOTTLENECK) - {"few_rows"})
#: Of few_rows and site, whose shared memory depends on it.
WIDTH = 768
WARPS = 8
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclasses.dataclass
class Compiled:
    kernel: str
    dtype: str
    arch: int
    registers: int
    stack: int
    shared: int  #: bytes of a block
    blocks: int  #: that fit on a multiprocessor at a time
    spills: int  #: local loads and stores
    tensor: int  #: tensor-core products
    wide_loads: int  #: of 16 bytes a thread
    copies: int  #: asynchronous
    wide_stores: int


def build(archs: list[int], folder: Path) -> Path:
    """The library for ``archs``; RuntimeError, of the build, where a kernel spills."""
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
                if re.search(_NAME, code.name):  # the run-time that is linked in has kernels, too
                    yield described(code, arch)


def described(code: Code, arch: int) -> Compiled:
    """A kernel of csrc/cuda by its mangled name."""
    kernel, dtype, arguments = re.search(_NAME, code.name).groups()
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E?", arguments or "")]
    name, b = kernel, 128  # the largest, where a kernel is one for all
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
    found = []
    if compiled.stack or compiled.spills:
        found.append(f"{compiled.stack} bytes of stack, {compiled.spills} local accesses")
    if not compiled.blocks:
        found.append("does not fit on a multiprocessor")
    if compiled.kernel.startswith(ON_TENSOR_CORES) and not compiled.tensor:
        found.append("no tensor-core products")
    if compiled.kernel.startswith(BY_BOTTLENECK):
        # the weights' gradients read by copies alone, and write sums of a few rows' width
        loads = compiled.copies and (compiled.wide_loads or compiled.kernel.startswith("weight"))
        stores = compiled.wide_stores or compiled.kernel.startswith("weight")
        if "not aligned" not in compiled.kernel and not (loads and stores):
            found.append("no 16-byte accesses")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--write", action="store_true", help=f"record in {PAGE.name}")
    parser.add_argument("--library", type=Path, help="one that is built; --arch is then not read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = options.library or build(options.arch, Path(folder))
        print(f"{library.stat().st_size / 2**20:.1f} MiB", flush=True)
        results = sorted(gate(library), key=lambda r: (r.arch, r.kernel, r.dtype))
    for result in results:
        print(result, *faults(result), flush=True)
    if options.write:
        names = [field.name for field in dataclasses.fields(Compiled)]
        rows = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
        rows += [[str(getattr(result, name)) for name in names] for result in results]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        head, _, rest = PAGE.read_text().partition("<!-- gate -->")
        PAGE.write_text(f"{head}<!-- gate -->\n{table}\n<!-- /gate -->{rest.partition('<!-- /gate -->')[2]}")
    sys.exit(not results or any(faults(result) for result in results))


if __name__ == "__main__":
    main()
