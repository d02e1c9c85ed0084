"""A GPU's machine code taken apart by the tools of Triton's wheel: what the gates read registers and instructions from.

Registers, stack and instructions are facts of the compiled code, and how many blocks fit on a multiprocessor follows.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

#: KiB of shared memory on a multiprocessor, of which each block takes one for the system, and threads (CUDA
#: programming guide, "compute capabilities"). All have 65,536 registers, given to warps by 256, and 32 blocks at most.
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


class Code(NamedTuple):
    """One kernel's."""

    name: str
    registers: int
    stack: int
    instructions: Counter

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def take_apart(cubin: Path) -> list[Code]:
    """Every kernel of a cubin."""
    usage, listing = (
        subprocess.run([_TOOLS / tool, *flags, cubin], capture_output=True, text=True, check=True).stdout
        for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
    )
    resources = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    sections = re.split(r"^\.text\.(\S+):", listing, flags=re.M)[1:]
    return [
        Code(name, *resources[name], Counter(_INSTRUCTION.findall(text)))
        for name, text in zip(sections[::2], sections[1::2])
        if name in resources
    ]


def cubins(library: Path, folder: Path) -> list[tuple[int, Path]]:
    """The machine code in a library that nvcc linked, put into ``folder``: (architecture, cubin) pairs."""
    subprocess.run([_TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
    found = ((re.search(r"\.sm_(\d+)", path.name), path) for path in sorted(folder.glob("*.cubin")))
    return [(int(arch[1]), path) for arch, path in found if arch]


def blocks_per_multiprocessor(registers: int, shared: int, warps: int, arch: int) -> int:
    """Blocks of ``shared`` bytes and ``warps`` warps that fit at a time."""
    by_registers = 65536 // ((registers + 7) // 8 * 256 * warps)
    return min(32, THREADS[arch] // 32 // warps, by_registers, (SHARED[arch] << 10) // (shared + 1024))
