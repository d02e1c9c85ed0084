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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton_gate import _INSTRUCTION, _TOOLS, blocks_per_multiprocessor

from hyperformer_fast import native

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cuda_gate.md"
sys.path.insert(0, str(ROOT / "build_tools"))
from toolchain import NVCC_FLAGS, find_cuda_home  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: Bytes of shared memory on a multiprocessor, and threads (CUDA programming guide, "compute capabilities").
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_FORWARD = re.compile(r"forward_kernelINS_\d(F32|BF16|F16)ELi(\d+)ELi(\d+)ELb([01])")


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


def take_apart(cubin: Path, arch: int) -> list[Compiled]:
    usage, code = (
        subprocess.run([_TOOLS / tool, *flags, cubin], capture_output=True, text=True, check=True).stdout
        for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
    )
    resources = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    sections = re.split(r"^\.text\.(\S+):", code, flags=re.M)[1:]
    found = []
    for name, text in zip(sections[::2], sections[1::2]):
        if name not in resources:
            continue
        registers, stack = resources[name]
        instructions = Counter(_INSTRUCTION.findall(text))

        def count(pattern: str, instructions=instructions) -> int:
            return sum(n for instruction, n in instructions.items() if re.match(pattern, instruction))

        forward = _FORWARD.search(name)
        if forward:
            dtype, b, kept, aligned = forward[1].lower(), *map(int, forward.groups()[1:])
            kernel = f"forward, b <= {b}" + (f", {kept} pieces kept" if kept else "" if aligned else ", not aligned")
            kind = torch.float32 if dtype == "f32" else torch.bfloat16
            threads, shared = 256, native.cuda_library().forward_shared_bytes(b, kind)
        else:
            kernel = re.search(r"(fold|generate)", name)[1]
            dtype = next((kind.lower() for kind in ("BF16", "F16", "F32") if kind in name), "f32")
            # of the fold at b = 128, its largest
            threads, shared = (256, 8 * (3 * 129 + 129 * 65 + 16 * 129)) if kernel == "fold" else (128, 18944)
        fits = blocks_per_multiprocessor(registers, shared, threads // 32, arch, SHARED[arch] << 10, THREADS[arch])
        found.append(
            Compiled(
                kernel, dtype, arch, registers, stack, shared, fits, count("LDL|STL"), count("[HD]MMA"),
                count(r"LDG.*\.128"), count("LDGSTS"), count(r"STG.*\.128"),
            )
        )  # fmt: skip
    return found


def faults(compiled: Compiled) -> list[str]:
    found = []
    if compiled.stack or compiled.spills:
        found.append(f"{compiled.stack} bytes of stack, {compiled.spills} local accesses")
    if compiled.kernel.startswith("forward"):
        if not compiled.tensor:
            found.append("no tensor-core products")
        if "not aligned" not in compiled.kernel and not (
            compiled.wide_loads and compiled.wide_stores and compiled.copies
        ):
            found.append("no 16-byte accesses")
        if not compiled.blocks:
            found.append("does not fit on a multiprocessor")
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
            for result in sorted(take_apart(cubin, arch), key=lambda r: r.kernel):
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
