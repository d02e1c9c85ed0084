"""A training step of one adapter through a backend's functions, and how far its results are from float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from support.cases import random_packed
from support.tolerance import FOLDED_EPS, INTERPRETED_EPS
from torch import Tensor

from hyperformer_fast import reference
from hyperformer_fast.layout import AdapterLayout, AdapterSpec, Folded, Saved


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a step is made of. The defaults are those of T5-base, with a few rows: one tile of rows and a bit."""

    d: int = 768
    b: int = 24
    dtype: torch.dtype = torch.bfloat16
    pre_norm: bool = False
    post_norm: bool = True
    activation: str = "gelu_new"
    tasks: tuple[int, ...] | None = (1, -1, 0)  #: of the samples; None is one task without an index
    rows: int = 33  #: per sample
    gap: int = 0  #: elements between the rows of x and of g

    def __str__(self) -> str:
        norms = ", pre-norm" * self.pre_norm + ", no post-norm" * (not self.post_norm)
        mixed = "" if self.tasks else ", one task"
        gap = f", gap {self.gap}" if self.gap else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.d}x{self.b} {dtype} {self.activation}{norms}{mixed}{gap}"


class Step:
    """The tensors of a step."""

    def __init__(self, shape: Shape, T: int = 2):
        self.shape = shape
        self.spec = AdapterSpec(AdapterLayout(shape.d, shape.b, shape.pre_norm, shape.post_norm), shape.activation)
        samples = len(shape.tasks) if shape.tasks else 1
        self.index = torch.tensor(shape.tasks) if shape.tasks else None
        self.packed = random_packed(self.spec.layout, T if shape.tasks else 1).float()
        wide = (samples, shape.rows, shape.d + shape.gap)
        self.x, self.g = (torch.randn(wide).to(shape.dtype)[..., : shape.d] for _ in range(2))

    def run(self, ops: Any) -> dict[str, Tensor]:
        """Every result of fold, forward and backward. ``ops`` has these functions, as a backend has."""
        inputs = [t.clone() for t in (self.packed, self.x, self.g)]
        folded = Folded(*ops.fold(self.packed, self.spec.layout, self.shape.dtype))
        out, saved = ops.adapter_forward(self.x, folded, self.spec, self.index, True)
        saved = Saved(*saved)
        dx, dpacked = ops.adapter_backward(
            self.g, self.x, saved, self.packed, folded, self.spec, self.index, True, True
        )
        for name, before, after in zip(("packed", "x", "g"), inputs, (self.packed, self.x, self.g)):
            assert torch.equal(before, after), f"{name} was written to"
        return self.named(folded, out, saved, dx, dpacked)

    def named(
        self, folded: Folded, out: Tensor, saved: Saved, dx: Tensor | None = None, dpacked: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Results by the names under which :meth:`errors` knows them."""
        found = {f"folded {name}": part for name, part in folded._asdict().items()}
        found |= {"out": out} | {f"saved {name}": part for name, part in saved._asdict().items()}
        if dx is not None and dpacked is not None:
            found |= {"dx": dx} | {f"d {name}": part for name, part in self.spec.layout.unpack(dpacked).items()}
        return {name: part for name, part in found.items() if part.numel()}

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        """What :meth:`run` should return, in float64."""
        spec, packed, x, g = self.spec, self.packed.double(), self.x.double(), self.g.double()
        folded = reference.fold(packed, spec.layout, torch.float64)
        out, saved = reference.adapter_forward(x, folded, spec, self.index, True)
        dx, dpacked = reference.adapter_backward(g, x, saved, packed, folded, spec, self.index)
        return self.named(folded, out, saved, dx, dpacked)

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """The error of every result over its tensor, relative to the truth and in units of the dtype's eps: that of
        the result, and that of x for what rests on the bottleneck, which is rounded to x's dtype. NaN where a result is
        not finite."""
        with_task = slice(None) if self.index is None else self.index >= 0
        errors = {}
        for name, got in results.items():
            truth = self.truth[name]
            if name.startswith("saved"):  # of a sample without a task nobody reads what was saved
                got, truth = got[with_task], truth[with_task]
            by_bottleneck = name.startswith("d ") or name == "saved r"
            eps = torch.finfo(self.shape.dtype if by_bottleneck else got.dtype).eps
            errors[name] = ((got.double() - truth).norm() / truth.norm() / eps).item()
        return errors


def faults_of(step: Step, results: dict[str, Tensor]) -> list[str]:
    """What is wrong with the results: errors beyond the tolerance, and samples without a task that are not exact
    copies. Empty if nothing is."""
    faults = []
    for name, error in step.errors(results).items():
        # The mean and deviation of a row are float32 sums, whatever the dtype of x.
        dtype = torch.float32 if name.startswith("saved pre_") else step.shape.dtype
        allowed = FOLDED_EPS if name.startswith("folded") else INTERPRETED_EPS[dtype]
        if not error <= allowed:
            faults.append(f"{name}: error of {error:.3g} eps, {allowed} allowed")
    if step.index is not None:
        none = step.index == -1
        for name, source in (("out", step.x), ("dx", step.g)):
            if name in results and not torch.equal(results[name][none], source[none]):
                faults.append(f"{name} of a sample without a task is no copy")
    return faults
