"""nvcc's PTX of the CUDA kernels in the PTX interpreter, at the shape of T5-base: values against float64, accesses out
of bounds, and unordered accesses to shared memory. No GPU is needed, but nvcc is."""

from __future__ import annotations

import pytest
import torch
from support import emulated

from hyperformer_fast import reference
from hyperformer_fast.layout import Folded
from ptx.cuda_kernels import CUDA_HOME, interpreted
from ptx.steps import Shape, Step, faults_of

pytestmark = [
    emulated.needs_compiler,
    pytest.mark.skipif(CUDA_HOME is None, reason="needs a CUDA toolkit with nvcc"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

BASE = [(90, Shape()), (90, Shape(dtype=FP32, tasks=None, rows=35)), (80, Shape(dtype=FP16, pre_norm=True))]

WIDE = [
    Shape(512, 48, BF16, activation="silu", rows=19),
    Shape(512, 64, FP16, activation="gelu", rows=19),
    Shape(512, 128, FP32, rows=19),
    Shape(768, 96, BF16, pre_norm=True, rows=19),
    Shape(1024, 32, BF16, activation="relu", rows=19),
    Shape(1024, 64, FP32, activation="gelu", rows=19),
    Shape(1024, 128, BF16, activation="silu", rows=19),
    Shape(97, 5, FP32, pre_norm=True, gap=3),
    Shape(97, 5, FP16, post_norm=False, tasks=None),
]


def check(shape: Shape, arch: int) -> None:
    step = Step(shape)
    with interpreted(arch) as (ops, ran), emulated.few_rows(0):
        results = step.run(ops)
    assert {launch.kernel for launch in ran} >= {"fold", "forward", "backward", "weight_gradients", "finish"}
    assert not (found := [hazard for launch in ran for hazard in launch.hazards]), found[:5]
    assert not faults_of(step, results)


@pytest.mark.parametrize(("arch", "shape"), BASE, ids=lambda value: str(value))
def test_a_step(arch, shape):
    check(shape, arch)


@pytest.mark.ptx_wide
@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_step_of_another_width(arch, shape):
    check(shape, arch)


@pytest.mark.parametrize("few", [64, 0], ids=["few rows", "tiles"])
def test_one_site_in_one_launch(few):
    """Generation, folding and application by a grid of one block, as a device makes that holds one at a time."""
    step = Step(Shape(256, 16, rows=2))
    layout = step.spec.layout
    E, G, g0 = torch.randn(2, 64), torch.randn(layout.numel, 64) * 0.01, step.packed[0].clone()
    with interpreted(90) as (ops, ran), emulated.few_rows(few):
        out, saved, packed, folded = ops.hyper_adapter(step.x, E, G, g0, step.spec, step.index, True)
    assert [launch.kernel for launch in ran] == ["site"]
    assert not ran[0].hazards, ran[0].hazards[:5]
    truth = reference.generate_weights(*(t.double()[None] for t in (E, G, g0)))[0]
    assert (packed.double() - truth).norm() <= 2 * torch.finfo(FP32).eps * truth.norm()
    step.packed = packed
    results = step.named(Folded(*folded), out, saved)
    assert not faults_of(step, results)
