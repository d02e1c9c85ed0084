"""The backend ``triton``: Triton kernels for NVIDIA and AMD GPUs, and for tests in Triton's interpreter on a CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..layout import AdapterLayout, AdapterSpec, Dropout, Folded, Saved
from .base import OPS, Backend, Request, StackKernels, Support, gpu_kernel

#: The environment variable that switches Triton's interpreter on. Triton reads it when it decorates a kernel, so it
#: must be set before the first call.
INTERPRET_VARIABLE = "TRITON_INTERPRET"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return os.environ.get(INTERPRET_VARIABLE, "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _kernels() -> Any:
    """Import the kernels. Only a call that needs them does so, because importing triton takes half a second."""
    from ..kernels import entry

    if interpreted():
        from ..kernels import interpreter

        interpreter.mend()
        interpreter.check()
    return entry


class TritonBackend(Backend):
    """The kernels of ``hyperformer_fast.kernels``: float32, bfloat16 and float16, with a bottleneck of at most 128.

    A tensor whose rows are contiguous and have a common stride is read in place; another one is copied once. The ops
    of an attention are the defaults: torch.matmul around the softmax's kernels.
    """

    name = "triton"
    serves = OPS

    @property
    def device(self) -> str:  # type: ignore[override]  # a property, because it depends on the environment
        return "cpu" if interpreted() else "cuda"

    def availability(self) -> Support:
        if importlib.util.find_spec("triton") is None:
            return Support.no(
                "triton is not installed: pip install 'triton>=3.6,<3.10'; or use backend 'auto' or 'reference'"
            )
        if not interpreted() and not torch.cuda.is_available():
            return Support.no(
                "torch sees no CUDA or HIP device; use backend 'auto', "
                f"or set {INTERPRET_VARIABLE}=1 to run the kernels, slowly, in Triton's interpreter"
            )
        return Support.yes()

    def supports(self, request: Request) -> Support:
        return gpu_kernel(request)

    def serves_by_default(self, request: Request) -> Support:
        if interpreted():
            return Support.no("Triton's interpreter is for tests only: ask for it by name")
        return Support.yes()

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        packed: Tensor = _kernels().generate_weights(E, G, g0)
        return packed

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        folded: Folded = _kernels().fold(packed, layout, dtype)
        return folded

    def stack(self, packed: Tensor, spec: AdapterSpec, dtype: torch.dtype) -> StackKernels | None:
        if packed.dtype == torch.float64 or packed.numel() == 0:
            return None
        stack: StackKernels = _kernels().TritonStack(packed.contiguous(), spec, dtype)
        return stack

    def adapter_forward(
        self, x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        out, saved = _kernels().adapter_forward(x, folded, spec, task_index, save)
        return out, saved

    def adapter_backward(
        self,
        g: Tensor,
        x: Tensor,
        saved: Saved,
        packed: Tensor,
        folded: Folded,
        spec: AdapterSpec,
        task_index: Tensor | None,
        need_dx: bool,
        need_dpacked: bool,
    ) -> tuple[Tensor, Tensor]:
        kernel = _kernels().adapter_backward
        dx, dpacked = kernel(g, x, saved, packed, folded, spec, task_index, need_dx, need_dpacked)
        return dx, dpacked

    def residual_forward(
        self, hidden: Tensor | None, y: Tensor, dropout: Dropout, weight: Tensor | None, eps: float, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, normed, rstd = _kernels().residual_forward(hidden, y, dropout, weight, eps, save)
        return out, normed, rstd

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
        kernel = _kernels().residual_backward
        dhidden, dy, dweight = kernel(g_out, g_normed, out, weight, rstd, dropout, need_dy, need_dweight)
        return dhidden, dy, dweight

    def act_dropout_forward(self, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout) -> Tensor:
        out: Tensor = _kernels().act_dropout_forward(a, c, activation, dropout)
        return out

    def act_dropout_backward(
        self, g: Tensor, a: Tensor, c: Tensor | None, activation: str, dropout: Dropout
    ) -> tuple[Tensor, Tensor]:
        da, dc = _kernels().act_dropout_backward(g, a, c, activation, dropout)
        return da, dc

    def softmax_dropout_forward(
        self, scores: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: Dropout, save: bool
    ) -> tuple[Tensor, Tensor]:
        out, probabilities = _kernels().softmax_dropout_forward(scores, bias, mask, dropout, save)
        return out, probabilities

    def softmax_dropout_backward(self, g: Tensor, probabilities: Tensor, dropout: Dropout) -> Tensor:
        dscores: Tensor = _kernels().softmax_dropout_backward(g, probabilities, dropout)
        return dscores

    def cross_entropy_forward(
        self, logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int, need_grad: bool
    ) -> tuple[Tensor, Tensor]:
        kernel = _kernels().cross_entropy_forward
        loss, dlogits = kernel(logits, labels, label_smoothing, ignore_index, need_grad)
        return loss, dlogits
