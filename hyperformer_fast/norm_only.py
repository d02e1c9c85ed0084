"""Adapters without their blocks, the paper's ablation: of each adapter only the generated layer norms are left.

The layout and the stack here take the places of ``AdapterLayout`` and ``ops.Stack``. There is nothing to fuse, so that
both are plain PyTorch.

Letters: B samples, S sites of a stack, T tasks, P packed numbers per adapter, d width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .layout import EPS, AdapterLayout, accumulator_dtype
from .ops.checks import check_task_range


@dataclasses.dataclass(frozen=True)
class NormLayout(AdapterLayout):
    """The layout of packed norms: that of an adapter without its projections. ``b`` is not read."""

    b: int = 1

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part, in order."""
        return {name: shape for name, shape in super().shapes.items() if name.startswith(("pre_", "post_"))}


class NormStack:
    """The norms of a stack's sites in one forward: x + norm_post(norm_pre(x)), each norm where it is on.

    Args:
        packed: [S, T, P], the packed norms.
        layout: their layout.
        activation: not read.
    """

    def __init__(self, packed: Tensor, layout: NormLayout, activation: str):
        self.layout, self.activation = layout, activation
        self.packed = packed

    def __len__(self) -> int:
        return self.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes of all weights that it holds."""
        return self.packed.nbytes

    def of_task(self, task: int) -> NormStack:
        """The norms of one of the T tasks, which share the weights of this stack."""
        return NormStack(self.packed.narrow(1, task, 1), self.layout, self.activation)

    def make_ready(self, dtype: torch.dtype) -> None:
        """``ops.Stack.make_ready``: there is nothing to do."""

    @property
    def trains(self) -> bool:
        """Whether a backward is to reach the packed norms."""
        return torch.is_grad_enabled() and self.packed.requires_grad

    def adapter(self, x: Tensor, site: int, task_index: Tensor | None) -> Tensor:
        """Apply the norms of one site to x [B, ..., d], in x's dtype. Sums are in float32, in float64 for float64.

        ``task_index`` [B] is as in ``ops.adapter``: -1 returns the sample as it is, and a task out of range is an error
        on a CPU, NaN on a GPU.
        """
        packed = self.packed[site]
        exact = accumulator_dtype(x.dtype)
        tasks = packed.shape[0]
        if task_index is not None:
            if not torch.compiler.is_compiling():
                check_task_range(task_index, tasks)
            packed = packed[task_index.long().clamp(0, tasks - 1)]
            packed = packed.view(-1, *(1,) * (x.dim() - 2), packed.shape[-1])
        else:
            packed = packed[0]
        parts = self.layout.unpack(packed.to(exact))
        y = x.to(exact)
        for norm, on in (("pre", self.layout.pre_norm), ("post", self.layout.post_norm)):
            if on:
                y = F.layer_norm(y, (self.layout.d,), eps=EPS) * parts[f"{norm}_gamma"] + parts[f"{norm}_beta"]
        out = (x.to(exact) + y).to(x.dtype)
        if task_index is None:
            return out
        task = task_index.view(-1, *(1,) * (x.dim() - 1))
        out = torch.where(task >= 0, out, x)
        return torch.where((task >= tasks) | (task < -1), torch.nan, out)

    def adapter_residual(
        self,
        y: Tensor,
        hidden: Tensor,
        site: int,
        task_index: Tensor | None,
        dropout: ops.Dropout = ops.NO_DROPOUT,
        weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Any:
        """``ops.residual`` of ``hidden`` and of the norms of one site applied to y."""
        return ops.residual(hidden, self.adapter(y, site, task_index), dropout, weight, eps)
