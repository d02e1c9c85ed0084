"""Run every block of a launch in the interpreter, one after the other, on CPU tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from ptx import Block, Kernel, Memory

Index = tuple[int, int, int]

#: Names which blocks of a launch to run, None being all. Takes the kernel's name and the grid.
Choice = Callable[[str, Sequence[int]], "Iterable[Index] | None"]

#: Changes a kernel's PTX before it is interpreted. Takes the kernel's name and the text.
Plant = Callable[[str, str], str]


@dataclasses.dataclass
class Ran:
    """One launch that was interpreted."""

    kernel: str
    grid: Index
    blocks: list[dict[str, int]]  #: what each block that ran counted
    hazards: list[str]  #: of all blocks
    lines: set[int]  #: of the PTX, counted from 1: those that some block executed

    def most(self, count: str) -> int:
        return max(block[count] for block in self.blocks)


def span_of(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the first behind it; strides are at least zero."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def memory_of(tensors: Mapping[str, Tensor | None]) -> Memory:
    """The memory that a kernel may touch: the given tensors and nothing between them.

    Views may overlap, and one tensor may be given twice. What overlaps becomes one region under all its names.
    """
    spans = sorted((*span_of(t), name) for name, t in tensors.items() if t is not None and t.numel())
    merged: list[list] = []
    for start, end, name in spans:
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
            merged[-1][2] += f" and {name}"
        else:
            merged.append([start, end, name])
    memory = Memory()
    for start, end, name in merged:
        memory.add(start, end - start, name)
    return memory


def all_blocks(name: str, grid: Sequence[int]) -> None:
    """The choice of every block."""


def unchanged(name: str, text: str) -> str:
    """The plant that changes nothing."""
    return text


def indices(grid: Sequence[int]) -> list[Index]:
    return [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]


def run_grid(
    kernel: Kernel,
    memory: Memory,
    parameters: Mapping[str, bytes],
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    hazards: bool = True,
    only: Iterable[Index] | None = None,
) -> Ran:
    """Interpret the blocks of a launch.

    Args:
        kernel: the parsed PTX.
        memory: the global memory that it may touch.
        parameters: the bytes of every kernel parameter, by name.
        grid: blocks along x, y and z; missing ones are 1.
        threads: per block.
        shared_bytes: the dynamic shared memory of a block.
        hazards: whether to look for unordered accesses to shared memory, which takes longer.
        only: the indices of the blocks to run, in this order. What the others would have written is then missing. By
            default all run, the last one first: a block that wrote into the rows of the next one would then spoil what
            is finished, where the other order would mend it.

    Raises:
        Fault: a block did what a GPU would not allow, for example an access outside ``memory``.
    """
    whole = (*grid, 1, 1)[:3]
    ran = Ran(kernel.name, whole, [], [], set())
    for index in reversed(indices(whole)) if only is None else only:
        block = Block(kernel, memory, parameters, index, whole, threads, shared_bytes, hazards=hazards)
        block.run()
        ran.blocks.append(dict(block.counts))
        ran.lines.update(s.line for s, times in zip(kernel.statements, block.executed) if times)
        ran.hazards += [f"{kernel.name}, block {index}: {hazard}" for hazard in block.hazards]
    return ran


def evenly(grid: Sequence[int], most: int) -> list[Index]:
    """At most ``most`` blocks of a grid, spread evenly, the last among them."""
    every = indices(grid)
    count = min(most, len(every))
    return [every[(i + 1) * len(every) // count - 1] for i in range(count)]
