"""What a backend is, and what a call asks of it."""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import AdapterLayout
from ..reference import Folded, Saved

#: The kernels a full backend has.
OPS = ("generate_weights", "fold", "adapter_forward", "adapter_backward", "hyper_adapter")


#: What the GPU kernels serve of bottlenecks: beyond it R h~ (b^2 a row) is no longer small beside the two projections
#: (2 d b). csrc/cuda/params.h says the same.
LARGEST_GPU_BOTTLENECK = 128


class BackendError(RuntimeError):
    """A backend that was asked for by name and cannot serve; the message says why, with the cure."""


class Request(NamedTuple):
    """The static facts of a call, on which alone the choice of a backend rests: never the number of rows."""

    op: str
    device: str
    dtype: torch.dtype
    d: int
    b: int


def refused_by_gpu_kernels(request: Request) -> str | None:
    """Why neither Triton's nor the CUDA library's kernels can serve a request of their own device."""
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {request.dtype} is not float32, bfloat16 or float16; use backend 'auto' or 'reference'"
    if request.b > LARGEST_GPU_BOTTLENECK:
        return f"bottleneck {request.b} is beyond {LARGEST_GPU_BOTTLENECK}; use backend 'auto' or 'reference'"
    return None


class Backend(abc.ABC):
    """A set of kernels. Those that it has, it offers as methods named as in ``OPS`` (signatures:
    ``ReferenceBackend``)."""

    name: str
    #: The type of the device that its kernels run on; None: of any.
    device: str | None = None
    #: Whether its kernels were tried and failed: then it is unavailable.
    wrong: bool = False

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why nothing at all can run here, with the cure; None where something can."""

    @abc.abstractmethod
    def refuses(self, request: Request) -> str | None:
        """Why this request can't be served, with the cure; None where it can. Only asked of an available backend."""

    def misplaced(self, request: Request) -> str | None:
        """Why inputs on the request's device are not for this backend; None where they are."""
        if self.device in (None, request.device):
            return None
        return f"the inputs are on {request.device}, not on {self.device}"

    def passes(self, request: Request) -> str | None:
        """Why ``auto`` leaves to others what this backend could serve; None where it does not."""
        return None

    @property
    def serves(self) -> list[str]:
        """The ops this backend has kernels for."""
        return [op for op in OPS if hasattr(self, op)]


class FullBackend(Backend):
    """One that has every kernel; ``hyper_adapter`` is the others in turn where it has none of its own."""

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
        packed = self.generate_weights(E.unsqueeze(0), G.unsqueeze(0), g0.unsqueeze(0)).squeeze(0)
        folded = self.fold(packed, layout, x.dtype)
        out, saved = self.adapter_forward(x, folded, layout, activation, task_index, save)
        return out, saved, packed, folded
