"""CUDA C++ kernels on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .base import Request, refused_by_gpu_kernels
from .compiled import CompiledBackend

#: compute capability of the oldest architecture with cp.async and bfloat16 products (Ampere)
OLDEST = (8, 0)


#: The library's kernels, as its op ``shared_bytes`` counts them.
KERNELS = ("generate", "fold", "forward", "backward", "weight_gradients", "finish", "few_rows", "site")


#: Up to how many rows ``hyper_adapter`` is one launch: beyond, application outlasts the gaps between three, and its own
#: kernel, which keeps the rows in registers, does it sooner. An estimate, until a GPU measures it.
ONE_LAUNCH_ROWS = 1024


class CudaBackend(CompiledBackend):
    """The compiled library ``_hf_cuda``.

    Rows with a common stride are read where they lie; others are copied once. float32 products are three tf32 products
    each (to 2^-23, their sums rounded to nearest outside the tensor cores), whatever
    ``torch.get_float32_matmul_precision()`` says.
    """

    name = "cuda"
    device = "cuda"

    def library(self):
        return native.cuda_library()

    def unavailable(self) -> str | None:
        if self.library() is None:
            return native.status("cuda")["reason"]
        if not torch.cuda.is_available():
            return "torch sees no CUDA device; use backend 'auto' or 'reference'"
        if torch.version.hip:
            return "the CUDA library serves NVIDIA GPUs, and this is a ROCm build of torch; use backend 'auto'"
        seen = self.library().device_count()
        if seen <= 0:
            return (
                f"the library's own CUDA run-time finds no device (error {-seen}), as where the driver is older than "
                "the toolkit that compiled it: update the driver, or build with an older toolkit (CUDA_HOME)"
            )
        newest = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if newest < OLDEST:
            return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, got {newest[0]}.{newest[1]}; use 'auto'"
        return self.distrusted()

    def testable(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()  # a test reads results back, which ends a capture

    def circumstances(self) -> tuple[str, ...]:
        return torch.cuda.get_device_name(), str(torch.version.cuda)

    def refuses(self, request: Request) -> str | None:
        return self.misplaced(request) or refused_by_gpu_kernels(request)

    def passes(self, request: Request) -> str | None:
        return "no measurement on a GPU says that it is faster: ask for it by name"

    def in_one_call(self, x: Tensor) -> bool:
        return x.numel() <= ONE_LAUNCH_ROWS * x.shape[-1]
