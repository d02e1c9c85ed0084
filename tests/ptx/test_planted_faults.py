"""Faults planted in the compiled forward kernels: the interpreter must find every one, by a wrong value, by an access
out of bounds, or by unordered accesses to shared memory."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from support import emulated

import ptx
from hyperformer_fast.layout import Folded, Saved
from ptx import plants
from ptx.cuda_kernels import CUDA_HOME
from ptx.grids import Plant, unchanged
from ptx.launchers import interpreted
from ptx.steps import Shape, Step, faults_of

#: Of every kind but barriers, each is found wherever it is.
FAULTS = [
    value for value in vars(plants).values() if isinstance(value, plants.Fault) and value is not plants.NO_BARRIER
]

#: Whether other faults have a place in a kernel is up to its compiler: Triton may do without asynchronous copies, and
#: nvcc branches around stores.
EVERYWHERE = (plants.FRAGMENT, plants.LANE, plants.ADDRESS)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its own interpreter",
)
needs_nvcc = pytest.mark.skipif(
    CUDA_HOME is None or emulated.CXX is None, reason="needs a C++ compiler and a CUDA toolkit with nvcc"
)


class Subject:
    """A forward kernel, on rows of two samples of which one has no task. The bottleneck fills its tile, because a
    wrong register of a padded column does not matter, and there are more than 64 rows, so that no other kernel serves
    them."""

    def __init__(self, kernels: str, arch: int):
        self.kernels, self.arch = kernels, arch
        self.step = Step(Shape(512, 32, rows=35, tasks=(1, -1)))
        with interpreted(kernels, arch) as (ops, _):
            self.folded = Folded(*ops.fold(self.step.packed, self.step.spec.layout, torch.bfloat16))
        self.text, self.executed = "", set()
        found = self.found(self._look)
        assert not found, f"without a planted fault: {found}"

    def _look(self, name: str, text: str) -> str:
        self.text = text
        return text

    def found(self, plant: Plant = unchanged) -> str:
        """What the interpreter finds in the kernel with ``plant``; empty if nothing."""
        with interpreted(self.kernels, self.arch, plant) as (ops, ran):
            try:
                out, saved = ops.adapter_forward(self.step.x, self.folded, self.step.spec, self.step.index, True)
            except ptx.Fault as fault:
                return str(fault)
        self.executed = self.executed or ran[0].lines
        if hazards := [hazard for launch in ran for hazard in launch.hazards]:
            return hazards[0]
        results = self.step.named(self.folded, out, Saved(*saved))
        return "; ".join(faults_of(self.step, results))

    def places(self, fault: plants.Fault, most: int) -> list[int]:
        """At most ``most`` of the lines that ``fault`` can spoil and that are executed, spread evenly."""
        executed = [line for line in fault.places(self.text) if line in self.executed]
        count = min(most, len(executed))
        return [executed[i * len(executed) // count] for i in range(count)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("triton", 80), marks=needs_triton, id="Triton, sm_80"),
        pytest.param(("triton", 90), marks=needs_triton, id="Triton, sm_90"),
        pytest.param(("cuda", 90), marks=needs_nvcc, id="nvcc, sm_90"),
    ],
)
def subject(request):
    torch.manual_seed(0)
    return Subject(*request.param)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(subject, fault):
    lines = subject.places(fault, 3)
    if not lines and fault not in EVERYWHERE:
        pytest.skip(f"this kernel has no instruction for {fault.name}")
    assert lines
    missed = [line for line in lines if not subject.found(lambda _, text: fault.planted(text, line))]
    assert not missed, f"{fault.name} is not found in the lines {missed}"


def test_missing_barriers_are_found(subject):
    """Not every one: of an unrolled loop, the last turn has barriers that nothing needs."""
    lines = subject.places(plants.NO_BARRIER, 8)
    missed = [line for line in lines if not subject.found(lambda _, text: plants.NO_BARRIER.planted(text, line))]
    assert len(lines) >= 6 and len(missed) <= 2, f"the barriers in the lines {missed} of {lines} are not missed"
