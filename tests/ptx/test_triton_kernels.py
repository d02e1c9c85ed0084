"""The compiled Triton kernels in the PTX interpreter, at the shape of T5-base: values against float64, accesses out of
bounds, and unordered accesses to shared memory. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's own interpreter compiles nothing", allow_module_level=True)


from hyperformer_fast import reference
from hyperformer_fast.kernels import entry
from ptx.steps import Shape, Step, faults_of
from ptx.triton_kernels import interpreted

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: Folders that hold other Tritons to test, as PATH lists folders.
TRITONS = [folder for folder in os.environ.get("HYPERFORMER_FAST_TEST_TRITONS", "").split(os.pathsep) if folder]

BASE = [
    (90, Shape()),
    (90, Shape(dtype=FP16)),
    (90, Shape(dtype=FP32)),
    (90, Shape(pre_norm=True)),
    (90, Shape(tasks=None, rows=67)),
    (80, Shape()),
    (80, Shape(dtype=FP32)),
    (80, Shape(dtype=FP16, pre_norm=True)),
]

WIDE = [
    Shape(512, 48, BF16, activation="silu", rows=19),
    Shape(512, 64, FP16, activation="gelu", rows=19),
    Shape(512, 128, FP32, rows=19),
    Shape(768, 48, BF16, pre_norm=True, rows=19),
    Shape(768, 96, BF16, activation="relu", rows=19),
    Shape(768, 96, FP16, pre_norm=True, rows=19),
    Shape(1024, 32, FP32, activation="relu", rows=19),
    Shape(1024, 64, BF16, activation="gelu", rows=19),
    Shape(1024, 128, BF16, activation="silu", rows=19),
    Shape(97, 5, FP32, pre_norm=True, gap=3),
    Shape(97, 5, FP16, activation="gelu"),
    Shape(40, 3, BF16, post_norm=False, tasks=None),
    Shape(8, 1, FP32, pre_norm=True),
    Shape(2050, 16, BF16, rows=5),
]


def check(shape: Shape, arch: int) -> None:
    step = Step(shape)
    with interpreted(arch) as ran:
        results = step.run(entry)
    assert {launch.kernel for launch in ran} >= {"fold", "adapter_forward", "rows", "weights", "finish"}
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


@pytest.mark.parametrize("arch", [80, 90])
def test_generation(arch):
    """Of two embeddings, from a generator whose last rows fill no tile."""
    P = Step(Shape(97, 24)).spec.layout.numel
    E, G, g0 = torch.randn(1, 2, 64), torch.randn(1, P, 64) / 8, torch.randn(1, P)
    with interpreted(arch) as ran:
        packed = entry.generate_weights(E, G, g0)
    truth = reference.generate_weights(E.double(), G.double(), g0.double())
    assert not ran[0].hazards
    assert (packed.double() - truth).norm() <= 2 * torch.finfo(FP32).eps * truth.norm()


@pytest.mark.parametrize("arch", [80, 90])
def test_a_task_out_of_range(arch):
    """Nothing is read by such a task: its sample becomes NaN, and the others are what they would be without it."""
    step, without = Step(Shape(tasks=(1, 7, 0))), Step(Shape(tasks=(1, -1, 0)))
    without.packed, without.x, without.g = step.packed, step.x, step.g
    with interpreted(arch) as ran:
        results = step.run(entry)
    assert not any(launch.hazards for launch in ran)
    assert results["out"][1].isnan().all() and results["dx"][1].isnan().all()
    results["out"][1], results["dx"][1] = step.x[1], step.g[1]
    assert not faults_of(without, results)


@pytest.mark.skipif(not TRITONS, reason="HYPERFORMER_FAST_TEST_TRITONS names no folder with another Triton")
@pytest.mark.parametrize("folder", TRITONS)
def test_another_triton(folder):
    """The tests of this file again, with the Triton in ``folder``. It replaces the installed one in a child process."""
    code = (
        "import sys, triton, pytest\n"
        "print('triton', triton.__version__, triton.__file__)\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HYPERFORMER_FAST_TEST_TRITONS": ""}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, __file__], env=environment, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert str(Path(folder).resolve()) in done.stdout, "the child process took the installed Triton"
    assert done.returncode == 0, f"the tests fail with the Triton in {folder}: see the captured output"
