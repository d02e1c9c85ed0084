"""How many calls of the CUDA run-time a launch makes, counted with a run-time that launches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support.emulated import EMULATOR, ROOT, needs_compiler

sys.path.insert(0, str(ROOT / "build_tools"))
from toolchain import find_cuda_home

pytestmark = [needs_compiler, pytest.mark.skipif(find_cuda_home() is None, reason="needs a CUDA toolkit with nvcc")]


def run(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_driver_is_asked_about_a_kernel_once_for_each_device(tmp_path):
    """Later launches are one call each, whatever shared memory they need and whether their blocks wait for others."""
    home, program, fake = find_cuda_home(), tmp_path / "launches", tmp_path / "fake.o"
    run(
        os.environ.get("CXX", "g++"), "-std=c++20", "-c", f"-I{home}/include", "-o", fake, EMULATOR / "fake_runtime.cpp"
    )
    run(
        home / "bin/nvcc", "-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90", "-cudart", "none", "-o", program,
        EMULATOR / "launches.cu", fake,
    )  # fmt: skip
    said = run(program)
    calls = {tuple(found[:3]): int(found[3]) for found in re.findall(r"(.+), device (\d+), (first|again): (\d+)", said)}
    for device in ("0", "1"):  # beyond as many as are remembered, a kernel is asked about each time
        for what in ("small", "large", "together"):
            assert calls[what, device, "again"] == 1, said
    assert calls["less shared", "0", "again"] == 1 and calls["small", "0", "first"] == 1
    assert calls["large", "64", "again"] == 2 and calls["together", "64", "again"] == 5
    assert re.findall(r"together (\d+)", said) == ["10"] * 6 + ["20"] * 2
