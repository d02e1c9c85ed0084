"""The backend ``reference``: plain PyTorch, which supports every request on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference as truth
from ..layout import AdapterLayout, AdapterSpec, Folded, Saved
from .base import OPS, Backend, Request, Support


class ReferenceBackend(Backend):
    """Calls ``hyperformer_fast.reference``. It serves what no other backend supports.

    Autocast is switched off within, because the ops themselves define the dtype of every sum.
    """

    name = "reference"
    serves = OPS

    def availability(self) -> Support:
        return Support.yes()

    def supports(self, request: Request) -> Support:
        return Support.yes()

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        with torch.autocast(E.device.type, enabled=False):
            return truth.generate_weights(E, G, g0)

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        with torch.autocast(packed.device.type, enabled=False):
            return truth.fold(packed, layout, dtype)

    @torch.no_grad()
    def adapter_forward(
        self, x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        with torch.autocast(x.device.type, enabled=False):
            return truth.adapter_forward(x, folded, spec, task_index, save)

    @torch.no_grad()
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
        with torch.autocast(x.device.type, enabled=False):
            return truth.adapter_backward(g, x, saved, packed, folded, spec, task_index, need_dx, need_dpacked)
