"""The backend ``cpu``: C++ kernels."""

from __future__ import annotations

import os
from typing import Any

import torch

from .. import native
from .base import Request, Support, kernel_dtype
from .compiled import CompiledBackend

#: The environment variable that forces an instruction set, for comparisons and tests. By default the widest one of the
#: CPU is used.
ISA_VARIABLE = "HYPERFORMER_FAST_CPU_ISA"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")


class CpuBackend(CompiledBackend):
    """The kernels of the compiled library ``_hf_cpu``.

    A tensor whose last dimension is contiguous is read in place, whatever its other strides; another one is copied
    once. Weight gradients are summed over fixed blocks of rows in a fixed order, whatever the number of threads.
    """

    name = "cpu"
    device = "cpu"

    def library(self) -> Any:
        return native.cpu_library()

    def availability(self) -> Support:
        if self.library() is None:
            return Support.no(native.status()["reason"])
        asked = os.environ.get(ISA_VARIABLE)
        if asked and asked != self.instruction_set():
            return Support.no(
                f"{ISA_VARIABLE}={asked} is not one of {', '.join(INSTRUCTION_SETS)} that this CPU has "
                f"(it has {self.instruction_set()})"
            )
        return self.trusted()

    def circumstances(self) -> tuple[str, ...]:
        return torch.backends.cpu.get_cpu_capability(), self.instruction_set()

    def instruction_set(self) -> str:
        """The name of the instruction set in use."""
        return INSTRUCTION_SETS[self.library().instruction_set()]

    def supports(self, request: Request) -> Support:
        return kernel_dtype(request)
