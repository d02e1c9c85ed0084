"""C++ kernels on a CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import native
from .. import reference as truth
from ..layout import AdapterLayout
from ..reference import Folded, Saved
from .base import FullBackend, Request, static_arguments

#: Forces an instruction set, for comparisons and tests; by default the widest that the CPU has.
ISA_VARIABLE = "HYPERFORMER_FAST_CPU_ISA"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")


class CpuBackend(FullBackend):
    """The compiled library ``_hf_cpu``; float64 is left to the reference.

    Rows whose last dimension is contiguous are read where they lie; others are copied once. Weight gradients are summed
    over fixed stretches of rows in a fixed order, whatever the number of threads.
    """

    name = "cpu"

    def unavailable(self) -> str | None:
        library = native.cpu_library()
        if library is None:
            return native.status()["reason"]
        asked = os.environ.get(ISA_VARIABLE)
        if asked and asked != self.instruction_set():
            return (
                f"{ISA_VARIABLE}={asked} is not one of {', '.join(INSTRUCTION_SETS)} that this CPU has "
                f"(it has {self.instruction_set()})"
            )
        return None

    def instruction_set(self) -> str:
        """The one in use."""
        return INSTRUCTION_SETS[native.cpu_library().instruction_set()]

    def refuses(self, request: Request) -> str | None:
        if request.device != "cpu":
            return f"the inputs are on {request.device}, not on cpu"
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {request.dtype} is not float32, bfloat16 or float16; use backend 'auto' or 'reference'"
        return None

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        if all(t.dtype == torch.float32 for t in (E, G, g0)):
            return native.cpu_library().generate_weights(E.contiguous(), G.contiguous(), g0.contiguous())
        with torch.autocast("cpu", enabled=False):
            return truth.generate_weights(E, G, g0)

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        library = native.cpu_library()
        return Folded(*library.fold(packed.float(), layout.d, layout.b, layout.pre_norm, layout.post_norm, dtype))

    def adapter_forward(
        self, x: Tensor, folded: Folded, layout: AdapterLayout, activation: str, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        folded = (part.contiguous() for part in folded)
        out, *saved = native.cpu_library().adapter_forward(
            x, *folded, task_index, *static_arguments(layout, activation), save
        )
        return out, Saved(*saved)

    def adapter_backward(
        self,
        g: Tensor,
        x: Tensor,
        saved: Saved,
        packed: Tensor,
        folded: Folded,
        layout: AdapterLayout,
        activation: str,
        task_index: Tensor | None,
        need_dx: bool,
        need_dpacked: bool,
    ) -> tuple[Tensor, Tensor]:
        parts = (part.contiguous() for part in (*saved, packed.float(), *folded))
        dx, dpacked = native.cpu_library().adapter_backward(
            g, x, *parts, task_index, *static_arguments(layout, activation), need_dx, need_dpacked
        )
        return dx, dpacked.to(packed.dtype)

    @torch.no_grad()
    def hyper_adapter(
        self,
        x: Tensor,
        E: Tensor,
        G: Tensor,
        g0: Tensor,
        layout: AdapterLayout,
        activation: str,
        task_index: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Saved, Tensor, Folded]:
        if not all(t.dtype == torch.float32 for t in (E, G, g0)):
            return super().hyper_adapter(x, E, G, g0, layout, activation, task_index, save)
        parts = (part.contiguous() for part in (E, G, g0))
        out, *rest = native.cpu_library().hyper_adapter(
            x, *parts, task_index, *static_arguments(layout, activation), save
        )
        return out, Saved(*rest[:4]), rest[4], Folded(*rest[5:])
