"""The backend ``cpu``: C++ kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..activations import ACTIVATIONS
from ..layout import AdapterSpec, Dropout, Folded, Saved
from .base import ADAPTER_OPS, Request, SiteCall, Support, kernel_dtype
from .compiled import CompiledBackend
from .cpu_attention import ATTENTION_OPS, CpuAttention

#: The environment variable that forces an instruction set, for comparisons and tests. By default the widest one of the
#: CPU is used.
ISA_VARIABLE = "HYPERFORMER_FAST_CPU_ISA"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")


class CpuBackend(CpuAttention, CompiledBackend):
    """The kernels of the compiled library ``_hf_cpu``.

    A tensor whose last dimension is contiguous is read in place, whatever its other strides; another one is copied
    once. Weight gradients are summed over fixed blocks of rows in a fixed order, whatever the number of threads.
    """

    name = "cpu"
    device = "cpu"
    serves = (
        *ADAPTER_OPS,
        "residual_forward",
        "residual_backward",
        "act_dropout_forward",
        "act_dropout_backward",
        "adapter_residual_forward",
        *ATTENTION_OPS,
    )

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

    def independent_rows(self, dtype: torch.dtype) -> int | None:
        # kFew of csrc/cpu/isa/generate-inl.h; another dtype is PyTorch's product
        return 4 if dtype == torch.float32 else None

    def prepare(self, folded: Sequence[Folded], spec: AdapterSpec) -> Sequence[Tensor] | None:
        op = self.library().prepare
        return [op(*(part.contiguous() for part in of_site), *spec.arguments) for of_site in folded]

    def site_call(self, weights: Tensor, task: int) -> SiteCall:
        library = self.library()
        adapter, residual = library.prepared_adapter.default, library.prepared_adapter_residual.default

        def of_adapter(x: Tensor, task_index: Tensor | None) -> Tensor:
            out: Tensor = adapter(x, weights, task_index, task)
            return out

        def of_residual(
            hidden: Tensor, y: Tensor, task_index: Tensor | None, weight: Tensor | None, eps: float
        ) -> tuple[Tensor, Tensor]:
            sums: tuple[Tensor, Tensor] = residual(hidden, y, weights, task_index, task, weight, eps)
            return sums

        return SiteCall(of_adapter, of_residual)

    def residual_forward(
        self,
        hidden: Tensor | None,
        y: Tensor,
        dropout: Dropout,
        weight: Tensor | None,
        eps: float,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = self.library().residual_forward(hidden, y, *dropout, weight, eps, save)
        return results

    def residual_backward(
        self,
        g_out: Tensor | None,
        g_normed: Tensor | None,
        out: Tensor | None,
        weight: Tensor | None,
        rstd: Tensor | None,
        dropout: Dropout,
        need_dy: bool,
        need_dweight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = self.library().residual_backward(
            g_out, g_normed, out, weight, rstd, *dropout, need_dy, need_dweight
        )
        return results

    def act_dropout_forward(self, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout) -> Tensor:
        out: Tensor = self.library().act_dropout_forward(a, c, ACTIVATIONS.index(activation), *dropout)
        return out

    def act_dropout_backward(
        self, g: Tensor, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout
    ) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = self.library().act_dropout_backward(
            g, a, c, ACTIVATIONS.index(activation), *dropout
        )
        return results

    def adapter_residual_forward(
        self,
        hidden: Tensor,
        y: Tensor,
        folded: Folded,
        spec: AdapterSpec,
        task_index: Tensor | None,
        dropout: Dropout,
        weight: Tensor | None,
        eps: float,
        save: bool,
    ) -> tuple[Tensor, Saved, Tensor, Tensor]:
        parts = (part.contiguous() for part in folded)
        out, *saved, normed, rstd = self.library().adapter_residual_forward(
            hidden, y, *parts, task_index, *spec.arguments, *dropout, weight, eps, save
        )
        return out, Saved(*saved), normed, rstd
