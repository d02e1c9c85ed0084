"""The common part of the two backends whose kernels are in a compiled library: both call the same raw ops."""

from __future__ import annotations

import abc
import functools
from typing import Any

import torch
from torch import Tensor

from .. import native
from .. import reference as truth
from ..layout import AdapterLayout, AdapterSpec, Folded, Saved
from . import trust
from .base import Backend, Nodes, Support

#: The compiled libraries, in the order of their numbers in csrc/autograd.
_LIBRARIES = ("cpu", "cuda")


@functools.lru_cache(maxsize=256)
def _integers(spec: AdapterSpec) -> list[int]:
    return [int(value) for value in spec.arguments]


class CompiledBackend(Backend):
    """A backend with the kernels of a library that is built from csrc/. The schemas of the raw ops are defined there.

    float64 is not supported: it is served by the reference backend.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[str, ...], str | None] = {}

    @functools.cached_property
    def nodes(self) -> Nodes | None:
        library = native.autograd_library()
        if library is None or self.name not in _LIBRARIES or self.library() is None:
            return None
        which = _LIBRARIES.index(self.name)
        adapter, hyper_adapter = library.adapter.default, library.hyper_adapter.default

        def of_adapter(x: Tensor, packed: Tensor, folded: Folded, spec: AdapterSpec, index: Tensor | None) -> Tensor:
            out: Tensor = adapter(x, packed, folded, index, _integers(spec), which)
            return out

        def of_hyper_adapter(
            x: Tensor, E: Tensor, G: Tensor, g0: Tensor, spec: AdapterSpec, index: Tensor | None
        ) -> Tensor | None:
            if not self._one_call(x, E, G, g0):
                return None
            out: Tensor = hyper_adapter(x, E, G, g0, index, _integers(spec), which)
            return out

        return Nodes(of_adapter, of_hyper_adapter)

    @abc.abstractmethod
    def library(self) -> Any:
        """The raw ops, or None if the library cannot be loaded."""

    @abc.abstractmethod
    def circumstances(self) -> tuple[str, ...]:
        """What the kernels' results depend on beside the library's file. The self-test runs once for each value."""

    def testable(self) -> bool:
        """Whether the self-test can run at this moment."""
        return True

    def trusted(self) -> Support:
        """Whether the kernels of the loaded library pass their self-test, which runs at the first call."""
        file = native.library_file(self.name)
        if file is None:
            return Support.yes()
        key = self.circumstances()
        if key not in self._verdicts:
            if not self.testable():
                return Support.no(
                    "its kernels have not been tested yet, and cannot be while a CUDA graph is captured: "
                    "call an op once before the capture"
                )
            self._verdicts[key] = trust.fault(self, file, list(key), native.rebuild_command())
        fault = self._verdicts[key]
        self.wrong = fault is not None
        return Support.yes() if fault is None else Support.no(fault)

    def generate_weights(self, E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
        packed: Tensor
        if all(t.dtype == torch.float32 for t in (E, G, g0)):
            packed = self.library().generate_weights(E.contiguous(), G.contiguous(), g0.contiguous())
            return packed
        with torch.autocast(E.device.type, enabled=False):
            return truth.generate_weights(E, G, g0)

    def fold(self, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
        return Folded(*self.library().fold(packed.float().contiguous(), *layout.arguments, dtype))

    def adapter_forward(
        self, x: Tensor, folded: Folded, spec: AdapterSpec, task_index: Tensor | None, save: bool
    ) -> tuple[Tensor, Saved]:
        parts = (part.contiguous() for part in folded)
        out, *saved = self.library().adapter_forward(x, *parts, task_index, *spec.arguments, save)
        return out, Saved(*saved)

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
        parts = (part.contiguous() for part in (*saved, packed.float(), *folded))
        dx, dpacked = self.library().adapter_backward(g, x, *parts, task_index, *spec.arguments, need_dx, need_dpacked)
        return dx, dpacked.to(packed.dtype)

    def in_one_call(self, x: Tensor) -> bool:
        """Whether the library's op ``hyper_adapter`` serves x. Otherwise its other ops are called in turn."""
        return True

    def _one_call(self, x: Tensor, E: Tensor, G: Tensor, g0: Tensor) -> bool:
        return self.in_one_call(x) and E.dtype == G.dtype == g0.dtype == torch.float32

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
        if not self._one_call(x, E, G, g0):
            return super().hyper_adapter(x, E, G, g0, spec, task_index, save)
        parts = (part.contiguous() for part in (E, G, g0))
        out, *rest = self.library().hyper_adapter(x, *parts, task_index, *spec.arguments, save)
        return out, Saved(*rest[:4]), rest[4], Folded(*rest[5:])
