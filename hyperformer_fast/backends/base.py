"""The base class of backends: what their kernels compute, and how a backend says what it supports."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import AdapterLayout, AdapterSpec, Dropout, Folded, Saved
from .pieces import PIECE_OPS, PieceKernels

#: The names of the ops that make and apply adapters.
ADAPTER_OPS = ("generate_weights", "fold", "adapter_forward", "adapter_backward", "hyper_adapter")

#: The names of all ops. Each is a method of :class:`Backend`.
OPS = (*ADAPTER_OPS, *PIECE_OPS)

#: The largest bottleneck that the GPU kernels support. For a larger one R h~, which takes b^2 multiplications a row, is
#: no longer cheap beside the two projections, which take 2 d b. csrc/cuda has the same limit.
LARGEST_GPU_BOTTLENECK = 128

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """Raised if a backend that was asked for by name cannot serve a call. The message says why, and names the cure."""


class Request(NamedTuple):
    """The properties of a call on which the choice of a backend depends. The number of rows is not one of them."""

    op: str
    device: str
    dtype: torch.dtype
    d: int
    b: int


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether something is supported, and if not, why. It is true in a condition if it is supported."""

    reason: str | None = None

    @classmethod
    def yes(cls) -> Support:
        """It is supported."""
        return cls()

    @classmethod
    def no(cls, reason: str) -> Support:
        """It is not supported, for this reason. If there is a cure, the reason names it."""
        return cls(reason)

    def __bool__(self) -> bool:
        return self.reason is None


class Nodes(NamedTuple):
    """The autograd functions of a backend, which take the place of those in ``ops/eager.py`` where they can."""

    #: x, packed, folded, spec, task_index -> out
    adapter: Callable[[Tensor, Tensor, Folded, AdapterSpec, Tensor | None], Tensor]
    #: x, E, G, g0, spec, task_index -> out; None where the backend does not serve these inputs in one call
    hyper_adapter: Callable[[Tensor, Tensor, Tensor, Tensor, AdapterSpec, Tensor | None], Tensor | None]


class SiteCall(NamedTuple):
    """One site's forwards where nothing is saved for a backward, each with the site's weights bound to it. They take as
    little of the host's time as possible, check their arguments themselves, and raise RuntimeError where these do not
    fit."""

    #: x, task_index -> out
    adapter: Callable[[Tensor, Tensor | None], Tensor]
    #: hidden, y, task_index, weight, eps -> hidden + adapter(y), and its norm if there is a weight
    residual: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]]


class StackKernels(abc.ABC):
    """A backend's own way to run the adapters of a stack, for inputs of one dtype (ops/stack.py says when it is used).

    Letters: S sites, T tasks, P packed numbers per adapter.
    """

    @abc.abstractmethod
    def forward(
        self, x: Tensor, site: int, task_index: Tensor | None, save: bool, check: Callable[[], None]
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`Backend.adapter_forward` of one site.

        Args:
            x: as there.
            site: the index of the adapter in the stack.
            task_index: as there.
            save: as there.
            check: raises where the arguments do not fit together. It must be called, unless arguments of these shapes,
                strides, dtypes and devices passed before.

        Returns:
            The output, and one tensor with all that the backward needs beside x; None unless ``save``.
        """

    @abc.abstractmethod
    def backward(
        self,
        g: Tensor,
        x: Tensor,
        saved: Tensor,
        site: int,
        task_index: Tensor | None,
        need_dx: bool,
        need_dpacked: bool,
        leave: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`Backend.adapter_backward` of one site.

        Args:
            leave: whether the gradient of the weights is left to :meth:`collect`. It belongs to this backward pass
                alone, whose number is ``torch._C._current_graph_task_id()``.

        Returns:
            dx, or None; and the gradient [S, T, P] of all packed weights, with zeros for the other sites, or None where
            it is left or not needed.
        """

    @abc.abstractmethod
    def collect(self, g: Tensor | None) -> Tensor | None:
        """The gradient [S, T, P] of all packed weights: what was left in this backward pass, plus ``g``, the sum of
        what was returned. None where there is nothing. Called once, after all backwards of the pass."""


class Backend(PieceKernels, abc.ABC):
    """A set of kernels.

    The methods get checked inputs, whose shapes, dtypes and devices fit together. They return new tensors with the
    shapes and dtypes of ``Folded.table`` and ``Saved.table``. They do not deal with autograd.

    A backend that has kernels for only some of the ops inherits the other ops from ``ReferenceBackend``, and lists its
    own in ``serves``. The pieces of a T5 (``PieceKernels``) have defaults in plain PyTorch.
    """

    name: str
    #: The type of the device on which its kernels run, as "cuda"; None for any device.
    device: str | None = None
    #: The ops for which it may be chosen.
    serves: Sequence[str] = ADAPTER_OPS
    #: Whether its kernels failed their self-test. Such a backend is not available.
    wrong: bool = False

    @property
    def nodes(self) -> Nodes | None:
        """Autograd functions of its own; None if those in Python of ``ops/eager.py`` call the backend."""
        return None

    @abc.abstractmethod
    def availability(self) -> Support:
        """Whether the backend can run on this machine at all."""

    @abc.abstractmethod
    def supports(self, request: Request) -> Support:
        """Whether the backend can serve this request. It is called only if the backend is available, the op is in
        ``serves`` and the inputs are on its device."""

    def serves_by_default(self, request: Request) -> Support:
        """Whether ``"auto"`` may choose this backend for a request that it supports. Otherwise it serves only if it is
        asked for by name."""
        return Support.yes()

    @abc.abstractmethod
    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        """Compute packed[q, i] = G[q] @ E[q, i] + g0[q].

        E is [Q, n, k], G [Q, P, k] and g0 [Q, P], all of one dtype; packed is [Q, n, P] in that dtype.
        """

    def independent_rows(self, dtype: torch.dtype) -> int | None:
        """From how many embeddings of a generator on :meth:`generate_weights` gives each of them the same bits, in
        ``dtype``, whatever the others are and however many. None, the default: the bits may always depend on them."""
        return None

    @abc.abstractmethod
    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        """Fold packed [..., P], which has any floating dtype, for an x of ``dtype``."""

    @abc.abstractmethod
    def adapter_forward(
        self, x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        """Apply the adapter with its folded weights.

        Args:
            x: [..., d], or [B, ..., d] with ``task_index``; with any strides.
            folded: the folded weights of T tasks; T = 1 without ``task_index``.
            spec: the adapter's layout and activation.
            task_index: [B] int32 or int64, the task of each sample. The output of a sample with -1 is its input, bit
                for bit. A value outside -1 .. T-1 can occur on a GPU, where it is not checked, and gives NaN.
            save: whether a backward will follow. If not, all fields of ``Saved`` are empty.

        Returns:
            The output, contiguous and otherwise like x, and what the backward needs.
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
        """Compute the gradients of :meth:`adapter_forward`, given the gradient g [..., d] of its output.

        Returns:
            dx like x, and dpacked like ``packed`` [T, P], which is the whole gradient of the adapter's weights; an
            empty tensor in place of one that is not needed. Every run gives the same bits.
        """

    @torch.no_grad()
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
        """Compute ``hidden + dropout(adapter(y))``, and its layer norm if there is a ``weight``.

        This default calls the other ops in turn. The backward is ``residual_backward``, then ``adapter_backward``.

        Args:
            hidden: of y's shape and dtype.
            y: the adapter's input; this, ``folded``, ``spec`` and ``task_index`` are as in :meth:`adapter_forward`.
            dropout: as in ``residual_forward``, as are ``weight`` and ``eps``.
            save: whether a backward will follow.

        Returns:
            ``out``, what :meth:`adapter_backward` needs, and ``normed`` and ``rstd`` of ``residual_forward``.
        """
        adapted, saved = self.adapter_forward(y, folded, spec, task_index, save)
        out, normed, rstd = self.residual_forward(hidden, adapted, dropout, weight, eps, save)
        return out, saved, normed, rstd

    def stack(self, packed: Tensor, spec: AdapterSpec, dtype: torch.dtype) -> StackKernels | None:
        """A way of its own to run the adapters of a stack, whose packed weights [S, T, P] these are, for inputs of
        ``dtype`` on their device. None, the default: each adapter is run by itself."""
        return None

    def prepare(self, folded: Sequence[Folded], spec: AdapterSpec) -> Sequence[Tensor] | None:
        """The weights of a stack's sites, each [T, ...], in the form that :meth:`site_call` takes: one tensor for each
        site. None, the default: there is nothing faster than :meth:`adapter_forward`."""
        return None

    def site_call(self, weights: Tensor, task: int) -> SiteCall:
        """The forwards of one site.

        Args:
            weights: of the site, from :meth:`prepare`.
            task: of all rows; negative for those that a task index names.
        """
        raise NotImplementedError(f"backend {self.name!r} prepares no weights")

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
        """Generate, fold and apply one adapter, from E [T, k], G [P, k] and g0 [P].

        This default calls the other ops in turn.

        Returns:
            The output, what the backward needs, packed [T, P], and the folded weights.
        """
        packed = self.generate_weights(E.unsqueeze(0), G.unsqueeze(0), g0.unsqueeze(0)).squeeze(0)
        folded = self.fold(packed, spec.layout, x.dtype)
        out, saved = self.adapter_forward(x, folded, spec, task_index, save)
        return out, saved, packed, folded


def kernel_dtype(request: Request) -> Support:
    """Whether the request has one of the three dtypes that fused kernels support."""
    if request.dtype in _KERNEL_DTYPES:
        return Support.yes()
    return Support.no(f"dtype {request.dtype} is not float32, bfloat16 or float16; use backend 'auto' or 'reference'")


def gpu_kernel(request: Request) -> Support:
    """Whether the GPU kernels can serve a request. Those in Triton and those in CUDA C++ have the same limits."""
    if request.b > LARGEST_GPU_BOTTLENECK:
        return Support.no(
            f"bottleneck {request.b} is beyond {LARGEST_GPU_BOTTLENECK}; use backend 'auto' or 'reference'"
        )
    return kernel_dtype(request)
