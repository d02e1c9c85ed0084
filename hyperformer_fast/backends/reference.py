"""Plain PyTorch: serves everything, everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference as truth
from ..layout import AdapterLayout
from ..reference import Folded, Saved
from .base import FullBackend, Request


class ReferenceBackend(FullBackend):
    """The truth and the last resort. Autocast is switched off: the ops say themselves what each sum is computed in."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def refuses(self, request: Request) -> str | None:
        return None

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        with torch.autocast(E.device.type, enabled=False):
            return truth.generate_weights(E, G, g0)

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        with torch.autocast(packed.device.type, enabled=False):
            return truth.fold(packed, layout, dtype)

    @torch.no_grad()
    def adapter_forward(
        self, x: Tensor, folded: Folded, layout: AdapterLayout, activation: str, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        with torch.autocast(x.device.type, enabled=False):
            return truth.adapter_forward(x, folded, layout, activation, task_index, save)

    @torch.no_grad()
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
        with torch.autocast(x.device.type, enabled=False):
            return truth.adapter_backward(
                g, x, saved, packed, folded, layout, activation, task_index, need_dx, need_dpacked
            )
