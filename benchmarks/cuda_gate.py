"""Compile the CUDA kernels for GPUs that are not there, and report what comes out.

    python benchmarks/cuda_gate.py [--write] [--arch 80 86 89 90 100 120]

Registers, stack, shared memory and instructions are facts of the machine code, taken apart by the tools of Triton's
wheel; how many blocks fit on a multiprocessor follows from them. How fast it is, only a GPU can say. ``--write`` puts
the table in docs/cuda_gate.md. Exits with 1 where a kernel spills, or lacks tensor-core products or 16-byte accesses.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine_code import Code, blocks_per_multiprocessor, take_apart

from hyperformer_fast import native
from hyperformer_fast.backends.cuda import KERNELS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cuda_gate.md"
sys.path.insert(0, str(ROOT / "build_tools"))
from toolchain import NVCC_FLAGS, find_cuda_home  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: In a kernel's mangled name: the number type, and the template's arguments.
_NAME = re.compile(
    r"(generate|fold|forward|backward|weight_gradients|finish)_kernel(?:I(?:NS_\d(F32|BF16|F16)E)?(.*?)E?EE?v)?"
)
#: Of those that have the tensor cores at work, the threads of a block; the others'.
ON_TENSOR_CORES = ("forward", "backward", "weight_gradients")
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


def compile_for(source: Path, arch: int, folder: Path) -> Path:
    out = folder / f"{source.stem}.{arch}.cubin"
    command = [find_cuda_home() / "bin/nvcc", *NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin", source, "-o", out]
    subprocess.run(list(map(str, command)), check=True)
    return out


def described(code: Code, arch: int) -> Compiled:
    """A kernel of csrc/cuda by its mangled name."""
    kernel, dtype, arguments = re.search(_NAME, code.name).groups()
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E?", arguments or "")]
    name, b = kernel, 128  # the largest, where a kernel is one for all
    if kernel in ON_TENSOR_CORES:
        b, *kept, aligned = numbers
        name += f", b <= {b}" + (f", {kept[0]} pieces kept" if any(kept) else "" if aligned else ", not aligned")
    elif kernel == "finish":
        b = {32: 64, 16: 128}[numbers[0]]
        name += f", b <= {b}"
    shared = native.cuda_library().shared_bytes(KERNELS.index(kernel), b, DTYPES[dtype or "F32"])
    fits = blocks_per_multiprocessor(code.registers, shared, 4 if kernel == "generate" else 8, arch)
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
    if compiled.kernel.startswith(ON_TENSOR_CORES):
        if not compiled.tensor:
            found.append("no tensor-core products")
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
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [(s, a) for a in options.arch for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        cubins = pool.map(lambda job: compile_for(*job, Path(folder)), jobs)
        for (_, arch), cubin in zip(jobs, cubins, strict=True):
            for result in sorted((described(code, arch) for code in take_apart(cubin)), key=lambda r: r.kernel):
                results.append(result)
                print(result, *faults(result), flush=True)
    if options.write:
        names = [field.name for field in dataclasses.fields(Compiled)]
        rows = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
        rows += [[str(getattr(result, name)) for name in names] for result in results]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        head, _, rest = PAGE.read_text().partition("<!-- gate -->")
        PAGE.write_text(f"{head}<!-- gate -->\n{table}\n<!-- /gate -->{rest.partition('<!-- /gate -->')[2]}")
    sys.exit(any(faults(result) for result in results))


if __name__ == "__main__":
    main()
