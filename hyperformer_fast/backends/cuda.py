"""CUDA C++ kernels on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from .base import Request, Support, gpu_kernel
from .compiled import CompiledBackend

#: Compute capability of the oldest architecture with cp.async and bfloat16 products (Ampere)
OLDEST = (8, 0)

#: The library's kernels, as its op ``shared_bytes`` counts them.
KERNELS = ("generate", "fold", "forward", "backward", "weight_gradients", "finish", "few_rows", "site")

#: The most rows for which ``hyper_adapter`` is one launch. With more, applying the adapter takes longer than the gaps
#: between three launches, and the forward's own kernel, which keeps the rows in registers, is faster. An estimate, to
#: be measured on a GPU.
ONE_LAUNCH_ROWS = 1024


class CudaBackend(CompiledBackend):
    """The compiled library ``_hf_cuda``.

    Rows with a common stride are read where they lie; others are copied once. float32 products are three tf32 products
    each (to 2^-23, their sums rounded to nearest outside the tensor cores), whatever
    ``torch.get_float32_matmul_precision()`` says.
    """

    name = "cuda"
    device = "cuda"

    def library(self) -> Any:
        return native.cuda_library()

    def availability(self) -> Support:
        if self.library() is None:
            return Support.no(native.status("cuda")["reason"])
        if not torch.cuda.is_available():
            return Support.no("torch sees no CUDA device; use backend 'auto' or 'reference'")
        if torch.version.hip:
            return Support.no(
                "the CUDA library serves NVIDIA GPUs, and this is a ROCm build of torch; use backend 'auto'"
            )
        seen = self.library().device_count()
        if seen <= 0:
            return Support.no(
                f"the library's own CUDA run-time finds no device (error {-seen}), as where the driver is older than "
                "the toolkit that compiled it: update the driver, or build with an older toolkit (CUDA_HOME)"
            )
        newest = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if newest < OLDEST:
            return Support.no(
                f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, got {newest[0]}.{newest[1]}; use 'auto'"
            )
        return self.trusted()

    def testable(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()  # a test reads results back, which ends a capture

    def circumstances(self) -> tuple[str, ...]:
        return torch.cuda.get_device_name(), str(torch.version.cuda)

    def supports(self, request: Request) -> Support:
        return gpu_kernel(request)

    def serves_by_default(self, request: Request) -> Support:
        return Support.no("no measurement on a GPU says that it is faster: ask for it by name")

    def in_one_call(self, x: Tensor) -> bool:
        return x.numel() <= ONE_LAUNCH_ROWS * x.shape[-1]
