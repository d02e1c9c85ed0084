"""The backend ``cuda``: CUDA C++ kernels for NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from .base import Request, Support, gpu_kernel
from .compiled import CompiledBackend

#: The compute capability of Ampere, the oldest architecture with cp.async and bfloat16 tensor cores.
OLDEST = (8, 0)

#: The names of the library's kernels. The index of a kernel is its number in the library's op ``shared_bytes``.
KERNELS = ("generate", "fold", "forward", "backward", "weight_gradients", "finish", "few_rows", "site")

#: The largest number of rows for which ``hyper_adapter`` is one launch. With more rows, applying the adapter takes
#: longer than the gaps between three launches, and the kernel ``forward`` is faster because it keeps the rows in
#: registers. This number is an estimate and has not been measured.
ONE_LAUNCH_ROWS = 1024


class CudaBackend(CompiledBackend):
    """The kernels of the compiled library ``_hf_cuda``.

    A tensor whose rows have a common stride is read in place; another one is copied once. A float32 product is computed
    as three tf32 products, to a relative error of 2^-23, whatever ``torch.get_float32_matmul_precision()`` says. Their
    sums are rounded to nearest, outside of the tensor cores.
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
        return not torch.cuda.is_current_stream_capturing()  # the test reads results back, which breaks a capture

    def circumstances(self) -> tuple[str, ...]:
        return torch.cuda.get_device_name(), str(torch.version.cuda)

    def supports(self, request: Request) -> Support:
        return gpu_kernel(request)

    def serves_by_default(self, request: Request) -> Support:
        return Support.no("it has not been measured to be faster on a GPU: ask for it by name")

    def in_one_call(self, x: Tensor) -> bool:
        return x.numel() <= ONE_LAUNCH_ROWS * x.shape[-1]
