"""Launches of the Triton kernels on CPU tensors: compiled as for a GPU, then interpreted."""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ptx import Kernel
from ptx.grids import Choice, Index, Plant, Ran, all_blocks, memory_of, run_grid, unchanged

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from triton_launches import Launch, caught_launches, compile_launch, signature_of


def starts_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


_compiled: dict[tuple, Any] = {}


def compiled_for(launch: Launch, arch: int):
    """The compiled kernel, and its parameters' names in order. Equal launches share one compilation."""
    signature, constants, attributes = signature_of(launch, aligned=starts_aligned)
    key = (launch.kernel, arch, str(signature), str(constants), str(attributes), str(launch.options))
    if key not in _compiled:
        _compiled[key] = compile_launch(launch, arch, aligned=starts_aligned)
    return _compiled[key], signature


def parameters_of(kernel: Kernel, signature: dict[str, str], arguments: dict[str, object]) -> dict[str, bytes]:
    """The bytes of every parameter. Triton appends pointers to scratch memory that these kernels do not use: null."""
    packed = []
    for name, kind in signature.items():
        value = arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            packed.append(struct.pack("<Q", value.data_ptr() if value.numel() else 0))
        else:
            packed.append(struct.pack({"i32": "<i", "i64": "<q", "fp32": "<f"}[kind], value))
    found = {}
    for i, (name, _, size) in enumerate(kernel.parameters):
        found[name] = packed[i] if i < len(packed) else bytes(size)
        assert len(found[name]) == size, f"{kernel.name}: parameter {i} has {size} bytes, got {len(found[name])}"
    return found


def interpret(
    launch: Launch,
    arch: int,
    plant: Plant = unchanged,
    hazards: bool = True,
    only: Iterable[Index] | None = None,
) -> Ran:
    """Run one caught launch."""
    binary, signature = compiled_for(launch, arch)
    kernel = Kernel(plant(launch.name, binary.asm["ptx"]))
    memory = memory_of({n: value for n, value in launch.arguments.items() if isinstance(value, Tensor)})
    ran = run_grid(
        kernel, memory, parameters_of(kernel, signature, launch.arguments), launch.grid,
        32 * binary.metadata.num_warps, binary.metadata.shared, hazards, only,
    )  # fmt: skip
    ran.kernel = launch.name
    return ran


@contextlib.contextmanager
def interpreted(
    arch: int, plant: Plant = unchanged, hazards: bool = True, choose: Choice = all_blocks
) -> Iterator[list[Ran]]:
    """Within the block the hosts of the Triton kernels take CPU tensors, and their launches are interpreted as on a GPU
    of ``arch``. The list grows by every launch.

    Args:
        arch: such as 90.
        plant: changes the PTX, to see that the interpreter finds it.
        hazards: whether to look for unordered accesses to shared memory.
        choose: which blocks of a launch run. What the others would have written is then missing.
    """
    ran: list[Ran] = []

    def take(launch: Launch) -> None:
        ran.append(interpret(launch, arch, plant, hazards, choose(launch.name, (*launch.grid, 1, 1)[:3])))

    with caught_launches(arch, take):
        yield ran
