"""C++ kernels on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..layout import AdapterLayout
from ..reference import Folded
from .base import Backend, Request


class CpuBackend(Backend):
    """The compiled library ``_hf_cpu``; float64 is left to the reference."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return None if native.cpu_library() is not None else native.status()["reason"]

    def refuses(self, request: Request) -> str | None:
        if request.op not in self.serves:
            return f"{request.op} has no C++ kernel yet; use backend 'auto' or 'reference'"
        if request.device != "cpu":
            return f"the inputs are on {request.device}, not on cpu"
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"dtype {request.dtype} is not float32, bfloat16 or float16; use backend 'auto' or 'reference'"
        return None

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        library = native.cpu_library()
        return Folded(*library.fold(packed.float(), layout.d, layout.b, layout.pre_norm, layout.post_norm, dtype))
