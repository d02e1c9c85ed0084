"""A GPU for Triton that compiles and runs nothing: it shows what a call costs the host, on a machine without a GPU.

Kernels are compiled for a real architecture. Loading and launching them do nothing, so results are not computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hyperformer_fast.backends import choice
from hyperformer_fast.backends.base import Support
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.kernels import tiles
from hyperformer_fast.ops import public, stack


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Launcher:
    """What Triton calls to launch a kernel. ``launches`` keeps the arguments of each launch where it is a list."""

    launches: list[tuple[Any, ...]] | None = None

    def __init__(self, src: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        if Launcher.launches is not None:
            Launcher.launches.append((self.name, *arguments))


class Driver:
    """The part of a Triton driver that a launch uses."""

    launcher_cls = Launcher

    def __init__(self, arch: int):
        self.utils, self.target = _Utils(), GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -1  # what a tensor on the CPU calls its device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def stub_gpu(arch: int = 90) -> Iterator[None]:
    """Within the block, the Triton backend serves CPU tensors as if they lay on a GPU of this compute capability."""
    runtime, unchecked = triton.runtime.driver, lambda task_index, T: None
    before = runtime._active
    runtime.set_active(Driver(arch))
    choice.forget()
    try:
        with (
            mock.patch.object(TritonBackend, "device", "cpu"),
            mock.patch.object(TritonBackend, "availability", lambda self: Support.yes()),
            mock.patch.object(tiles, "architecture", lambda device: arch),
            # The tasks' range is checked on a CPU only, because it takes reading them.
            mock.patch.object(stack.Stack, "_check_range", lambda self, task_index: None),
            mock.patch.object(public, "check_task_range", unchecked),
        ):
            yield
    finally:
        choice.forget()
        runtime._active = before
