"""CUDA C++ kernels on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .. import reference as truth
from ..layout import AdapterLayout
from ..reference import Folded, Saved
from .base import FullBackend, Request, refused_by_gpu_kernels, static_arguments

#: compute capability of the oldest architecture with cp.async and bfloat16 products (Ampere)
OLDEST = (8, 0)


#: The library's kernels, as its op ``shared_bytes`` counts them.
KERNELS = ("generate", "fold", "forward", "backward", "weight_gradients", "finish")


class CudaBackend(FullBackend):
    """The compiled library ``_hf_cuda``.

    float64 is left to the reference. Rows with a common stride are read where they lie; others are copied once. float32
    products are three tf32 products each (to 2^-23), whatever ``torch.get_float32_matmul_precision()`` says.
    """

    name = "cuda"
    device = "cuda"

    def library(self):
        """The raw ops."""
        return native.cuda_library()

    def unavailable(self) -> str | None:
        if self.library() is None:
            return native.status("cuda")["reason"]
        if not torch.cuda.is_available():
            return "torch sees no CUDA device; use backend 'auto' or 'reference'"
        if torch.version.hip:
            return "the CUDA library serves NVIDIA GPUs, and this is a ROCm build of torch; use backend 'auto'"
        found = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if found < OLDEST:
            return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, got {found[0]}.{found[1]}; use 'auto'"
        return None

    def refuses(self, request: Request) -> str | None:
        if request.device != self.device:
            return f"the inputs are on {request.device}, not on {self.device}"
        return refused_by_gpu_kernels(request)

    def passes(self, request: Request) -> str | None:
        return "no measurement on a GPU says that it is faster: ask for it by name"

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        if all(t.dtype == torch.float32 for t in (E, G, g0)):
            return self.library().generate_weights(E.contiguous(), G.contiguous(), g0.contiguous())
        with torch.autocast(E.device.type, enabled=False):
            return truth.generate_weights(E, G, g0)

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        packed = packed.float().contiguous()
        return Folded(*self.library().fold(packed, layout.d, layout.b, layout.pre_norm, layout.post_norm, dtype))

    def adapter_forward(
        self, x: Tensor, folded: Folded, layout: AdapterLayout, activation: str, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        folded = (part.contiguous() for part in folded)
        static = static_arguments(layout, activation)
        out, *saved = self.library().adapter_forward(x, *folded, task_index, *static, save)
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
        dx, dpacked = self.library().adapter_backward(
            g, x, *parts, task_index, *static_arguments(layout, activation), need_dx, need_dpacked
        )
        return dx, dpacked.to(packed.dtype)
