"""What a backend is: the contract that its kernels fulfil, and how it says what it serves."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import AdapterLayout, AdapterSpec, Folded, Saved

#: The ops: each is a method of :class:`Backend`.
OPS = ("generate_weights", "fold", "adapter_forward", "adapter_backward", "hyper_adapter")

#: The largest bottleneck of the GPU kernels: beyond it R h~ (b^2 a row) is no longer small beside the two projections
#: (2 d b). csrc/cuda has the same limit.
LARGEST_GPU_BOTTLENECK = 128

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend that was asked for by name and cannot serve; the message says why, with the cure."""


class Request(NamedTuple):
    """The static facts of a call. The choice of a backend depends on them alone, never on the number of rows."""

    op: str
    device: str
    dtype: torch.dtype
    d: int
    b: int


@dataclasses.dataclass(frozen=True)
class Support:
    """Yes, or no with the reason; true where it is yes."""

    reason: str | None = None

    @classmethod
    def yes(cls) -> Support:
        """It is supported."""
        return cls()

    @classmethod
    def no(cls, reason: str) -> Support:
        """It is not, for this reason; where there is a cure, the reason names it."""
        return cls(reason)

    def __bool__(self) -> bool:
        return self.reason is None


class Backend(abc.ABC):
    """A set of kernels.

    Inputs come checked: shapes, dtypes and devices fit. Outputs are new tensors, with the shapes and dtypes of
    ``Folded.table`` and ``Saved.table``. Autograd is not the backend's concern.

    A backend with kernels for some of the ops only inherits the rest from ``ReferenceBackend`` and lists its own in
    ``serves``.
    """

    name: str
    #: The type of the device on which its kernels run; None: any.
    device: str | None = None
    #: The ops for which it may be chosen.
    serves: Sequence[str] = OPS
    #: Whether its kernels failed their self-test, for which reason it is not available.
    wrong: bool = False

    @abc.abstractmethod
    def availability(self) -> Support:
        """Whether anything at all can run on this machine."""

    @abc.abstractmethod
    def supports(self, request: Request) -> Support:
        """Whether this request can be served. Asked only of an available backend, about an op in ``serves`` with
        inputs on its device."""

    def serves_by_default(self, request: Request) -> Support:
        """Whether ``"auto"`` may take this backend for a request that it supports; no: it must be asked for by name."""
        return Support.yes()

    @abc.abstractmethod
    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        """E [Q, n, k], G [Q, P, k], g0 [Q, P], of one dtype -> packed [Q, n, P] in it."""

    @abc.abstractmethod
    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        """packed [..., P] of any floating dtype, folded for an x of ``dtype``."""

    @abc.abstractmethod
    def adapter_forward(
        self, x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        """The adapter through its folded weights.

        Args:
            x: [..., d], or [B, ..., d] with ``task_index``; any strides.
            folded: of T tasks; T = 1 without ``task_index``.
            spec: the adapter.
            task_index: [B] int32 or int64; -1: the sample's output is its input, bit for bit; outside -1 .. T-1 (on a
                device, where nobody looks): NaN.
            save: whether a backward will follow; without it all of ``Saved`` is empty.

        Returns:
            out, like x and contiguous; what the backward needs.
        """

    @abc.abstractmethod
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
        """Gradients of :meth:`adapter_forward` for the output's gradient g [..., d].

        Returns:
            dx like x and dpacked like ``packed`` [T, P], the whole gradient of the adapter's weights; empty where not
            needed. The same bits at every run.
        """

    @torch.no_grad()
    def hyper_adapter(
        self,
        x: Tensor,
        E: Tensor,
        G: Tensor,
        g0: Tensor,
        spec: AdapterSpec,
        task_index: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Saved, Tensor, Folded]:
        """Generate, fold and apply one adapter: E [T, k], G [P, k], g0 [P] -> out, saved, packed [T, P], folded.

        By default the other ops in turn.
        """
        packed = self.generate_weights(E.unsqueeze(0), G.unsqueeze(0), g0.unsqueeze(0)).squeeze(0)
        folded = self.fold(packed, spec.layout, x.dtype)
        out, saved = self.adapter_forward(x, folded, spec, task_index, save)
        return out, saved, packed, folded


def kernel_dtype(request: Request) -> Support:
    """Whether x has one of the three dtypes that compiled kernels serve."""
    if request.dtype in _KERNEL_DTYPES:
        return Support.yes()
    return Support.no(f"dtype {request.dtype} is not float32, bfloat16 or float16; use backend 'auto' or 'reference'")


def gpu_kernel(request: Request) -> Support:
    """Whether the Triton kernels and those of the CUDA library, which have the same limits, can serve a request."""
    if request.b > LARGEST_GPU_BOTTLENECK:
        return Support.no(
            f"bottleneck {request.b} is beyond {LARGEST_GPU_BOTTLENECK}; use backend 'auto' or 'reference'"
        )
    return kernel_dtype(request)
