"""What the Triton kernels compile to, for GPUs that are not there (tools/triton_gate.py has every combination)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture(scope="module")
def triton_gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        yield importlib.import_module("triton_gate")


@pytest.mark.parametrize(("arch", "dtypes"), [(80, ["bf16"]), (90, ["bf16", "fp16", "fp32", "tf32"]), (100, ["bf16"])])
def test_no_spills_and_tensor_cores(triton_gate, arch, dtypes):
    compiled = list(triton_gate.gate(["base"], dtypes, [arch]))
    assert len({result.kernel for result in compiled}) == 7
    rounded = [result for result in compiled if result.dtype == "tf32"]
    assert len(rounded) == ("tf32" in dtypes) * 3 and all(result.tf32 for result in rounded)
    recorded = triton_gate.recorded()
    for result in compiled:
        assert not triton_gate.faults(result), f"{result}: {triton_gate.faults(result)}"
        assert result.blocks >= recorded[triton_gate.key(result)], f"{result}: fewer blocks than recorded"


def test_faults_are_found(triton_gate):
    """A tile that spills, and rows whose starts are not aligned."""
    from hyperformer_fast.kernels import tiles

    with tiles.forced("forward", tiles.Tile(32, 32, 4, 3)):
        launches = triton_gate.launches_of(768, 24, torch.float32, 80)
    forward = next(launch for launch in launches if launch.kernel.__name__ == "adapter_forward_kernel")
    assert triton_gate.measure(triton_gate.compile_launch(forward, 80), 80)["spills"]

    forward = next(
        launch
        for launch in triton_gate.launches_of(768, 24, torch.bfloat16, 90)
        if launch.kernel.__name__ == "adapter_forward_kernel"
    )
    aligned = triton_gate.measure(triton_gate.compile_launch(forward, 90), 90)
    forward.arguments["ALIGN"] = 1
    ragged = triton_gate.measure(triton_gate.compile_launch(forward, 90), 90)
    assert ragged["wide_loads"] < aligned["wide_loads"]


@pytest.mark.parametrize("arch", [80, 90])
def test_kept_rows_go_straight_into_tensor_cores(triton_gate, arch):
    """The rows and the weight of the first product reach the tensor cores without shared memory, and only the warps'
    sums and the bottleneck wait at barriers (docs/design.md)."""
    barriers = {}
    for launch in triton_gate.launches_of(768, 24, torch.bfloat16, arch):
        name = launch.kernel.__name__.removesuffix("_kernel")
        if name in ("adapter_forward", "rows"):
            assert launch.arguments["KEEP"]
            ptx = triton_gate.compile_launch(launch, arch).asm["ptx"]
            barriers[name] = len(re.findall(r"\bbar(?:rier)?\.sync", ptx))
            if name == "adapter_forward":
                first, *_, last = (match.start() for match in re.finditer(r"\bmma\.sync", ptx))
                before, during = ptx[:first], ptx[first:last]
                assert "st.shared" not in before and "ldmatrix" not in before
                assert "ldmatrix.sync.aligned.m8n8.x4.trans" not in during  # nor does the second weight
    assert barriers["adapter_forward"] <= 16 and barriers["rows"] <= 30, barriers


def test_no_length_is_compiled_in(triton_gate):
    """A batch of another size, or another number of tasks, must find the kernels that are there."""

    def constants(launch):
        names = [parameter.name for parameter in launch.kernel.params if parameter.is_constexpr]
        return launch.kernel.__name__, {name: launch.arguments[name] for name in names}

    def keys(rows, B):
        return [constants(launch) for launch in triton_gate.launches_of(768, 24, torch.bfloat16, 90, rows=rows, B=B)]

    expected = keys(64, 4)
    assert len(expected) == 7
    for rows, B in ((1, 1), (16, 2), (33, 4), (1000, 7)):
        assert keys(rows, B) == expected
    for launch in triton_gate.launches_of(768, 24, torch.bfloat16, 90):
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, f"{launch.kernel.__name__} is compiled anew for {parameter.name}"
