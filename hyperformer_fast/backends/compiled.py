"""What the two compiled libraries share: the same raw ops, called the same way."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from .. import native
from .. import reference as truth
from ..activations import ACTIVATIONS
from ..layout import AdapterLayout
from ..reference import Folded, Saved
from . import trust
from .base import FullBackend


def static_arguments(layout: AdapterLayout, activation: str) -> tuple[int, int, bool, bool, int]:
    """What the raw ops are told of an adapter."""
    return layout.d, layout.b, layout.pre_norm, layout.post_norm, ACTIVATIONS.index(activation)


class CompiledBackend(FullBackend):
    """Kernels of a library of csrc/; its schemas are in csrc/tensors.h. float64 is left to the reference."""

    def __init__(self) -> None:
        self._verdicts: dict[tuple[str, ...], str | None] = {}

    @abc.abstractmethod
    def library(self):
        """The raw ops; None where the library is not there."""

    @abc.abstractmethod
    def circumstances(self) -> tuple[str, ...]:
        """What the results of one and the same library file rest on, for which it is tested once."""

    def testable(self) -> bool:
        """Whether the kernels may be tried right now."""
        return True

    def distrusted(self) -> str | None:
        """Why the loaded library's kernels must not serve: what they computed. Tests them at the first call."""
        file = native.library_file(self.name)
        if file is None or not self.testable():
            return None
        key = self.circumstances()
        if key not in self._verdicts:
            self._verdicts[key] = trust.fault(self, file, list(key), native.rebuild_command())
        self.wrong = self._verdicts[key] is not None
        return self._verdicts[key]

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        if all(t.dtype == torch.float32 for t in (E, G, g0)):
            return self.library().generate_weights(E.contiguous(), G.contiguous(), g0.contiguous())
        with torch.autocast(E.device.type, enabled=False):
            return truth.generate_weights(E, G, g0)

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        packed = packed.float().contiguous()
        return Folded(*self.library().fold(packed, layout.d, layout.b, layout.pre_norm, layout.post_norm, dtype))

    def adapter_forward(
        self, x: Tensor, folded: Folded, layout: AdapterLayout, activation: str, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        folded = (part.contiguous() for part in folded)
        static = static_arguments(layout, activation)
        out, *saved = self.library().adapter_forward(x, *folded, task_index, *static, save)
        return out, Saved(*saved)

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
        parts = (part.contiguous() for part in (*saved, packed.float(), *folded))
        dx, dpacked = self.library().adapter_backward(
            g, x, *parts, task_index, *static_arguments(layout, activation), need_dx, need_dpacked
        )
        return dx, dpacked.to(packed.dtype)

    def in_one_call(self, x: Tensor) -> bool:
        """Whether the library's own ``hyper_adapter`` takes these rows, or its other ops in turn."""
        return True

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
        if not self.in_one_call(x) or any(t.dtype != torch.float32 for t in (E, G, g0)):
            return super().hyper_adapter(x, E, G, g0, layout, activation, task_index, save)
        parts = (part.contiguous() for part in (E, G, g0))
        static = static_arguments(layout, activation)
        out, *rest = self.library().hyper_adapter(x, *parts, task_index, *static, save)
        return out, Saved(*rest[:4]), rest[4], Folded(*rest[5:])
