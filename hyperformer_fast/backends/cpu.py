"""C++ kernels on a CPU."""

from __future__ import annotations

import os

import torch

from .. import native
from .base import Request
from .compiled import CompiledBackend

#: Forces an instruction set, for comparisons and tests; by default the widest that the CPU has.
ISA_VARIABLE = "HYPERFORMER_FAST_CPU_ISA"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")


class CpuBackend(CompiledBackend):
    """The compiled library ``_hf_cpu``.

    Rows whose last dimension is contiguous are read where they lie; others are copied once. Weight gradients are summed
    over fixed stretches of rows in a fixed order, whatever the number of threads.
    """

    name = "cpu"
    device = "cpu"

    def library(self):
        return native.cpu_library()

    def unavailable(self) -> str | None:
        if self.library() is None:
            return native.status()["reason"]
        asked = os.environ.get(ISA_VARIABLE)
        if asked and asked != self.instruction_set():
            return (
                f"{ISA_VARIABLE}={asked} is not one of {', '.join(INSTRUCTION_SETS)} that this CPU has "
                f"(it has {self.instruction_set()})"
            )
        return self.distrusted()

    def circumstances(self) -> tuple[str, ...]:
        return torch.backends.cpu.get_cpu_capability(), self.instruction_set()

    def instruction_set(self) -> str:
        """The one in use."""
        return INSTRUCTION_SETS[self.library().instruction_set()]

    def refuses(self, request: Request) -> str | None:
        if wrong := self.misplaced(request):
            return wrong
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {request.dtype} is not float32, bfloat16 or float16; use backend 'auto' or 'reference'"
        return None
