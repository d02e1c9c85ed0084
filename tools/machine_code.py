"""Take a GPU's machine code apart with the tools of Triton's wheel: what the compile reports read."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", re.M)


class Code(NamedTuple):
    """One kernel's registers a thread, bytes of stack, and instructions by name, counted where they stand."""

    name: str
    registers: int
    stack: int
    instructions: Counter

    def count(self, pattern: str) -> int:
        """Instructions whose name starts with ``pattern``, a regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def take_apart(cubin: Path) -> list[Code]:
    """Every kernel of a cubin, in the file's order."""
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
    """Extract a library's machine code into ``folder``; returns (architecture, cubin) pairs."""
    subprocess.run([_TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
    found = ((re.search(r"\.sm_(\d+)", path.name), path) for path in sorted(folder.glob("*.cubin")))
    return [(int(arch[1]), path) for arch, path in found if arch]
