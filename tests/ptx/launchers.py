"""Either family of GPU kernels, interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ptx.grids import Choice, Plant, Ran, all_blocks, unchanged


@contextlib.contextmanager
def interpreted(
    kernels: str, arch: int, plant: Plant = unchanged, hazards: bool = True, choose: Choice = all_blocks
) -> Iterator[tuple[Any, list[Ran]]]:
    """The functions of a backend whose launches are interpreted, and the list of what they launched, which grows.

    Args:
        kernels: "triton" or "cuda". The first needs Triton, the second nvcc and a C++ compiler.
        arch: such as 90.
        plant: changes the PTX before it is interpreted.
        hazards: whether to look for unordered accesses to shared memory.
        choose: which blocks of a launch run.
    """
    if kernels == "triton":
        from hyperformer_fast.kernels import entry
        from ptx import triton_kernels

        with triton_kernels.interpreted(arch, plant, hazards, choose) as ran:
            yield entry, ran
    else:
        from ptx import cuda_kernels

        with cuda_kernels.interpreted(arch, plant, hazards, choose) as (ops, ran):
            yield ops, ran
