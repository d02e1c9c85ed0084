"""The CUDA library compiles and links without a GPU and beside a CPU-only torch, loads, and says what is not there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_tools"))
from toolchain import find_cuda_home  # noqa: E402

#: As TORCH_CUDA_ARCH_LIST has it. Each takes a minute and more on two cores, so by default it is one.
ARCHS = os.environ.get("HYPERFORMER_FAST_TEST_CUDA_ARCHS", "9.0")

pytestmark = pytest.mark.skipif(find_cuda_home() is None, reason="needs a CUDA toolkit with nvcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """For ARCHS. A spill is an error."""
    folder = tmp_path_factory.mktemp("cuda")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_tools')!r})\n"
        "from pathlib import Path\nfrom native_build import build_libraries\n"
        f"build_libraries(Path({str(folder)!r}) / 'out')"
    )
    environment = {
        **os.environ, "HYPERFORMER_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ARCHS,
        "NVCC_APPEND_FLAGS": "-Xptxas --warn-on-spills,--warning-as-error",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out/_hf_cuda.so"


def test_it_is_built(library):
    info = json.loads((library.parent / "build_info.json").read_text())["libraries"]["cuda"]
    assert info["archs"] == ARCHS and "nvcc" in info
    assert library.stat().st_size < 20 << 20


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton's disassembler")
def test_its_machine_code_is_what_was_meant(library, monkeypatch):
    """Tensor cores at work, 16-byte accesses, no stack: of every kernel for every architecture."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    cuda_gate = importlib.import_module("cuda_gate")
    compiled = list(cuda_gate.gate(library))
    assert {result.kernel.partition(",")[0] for result in compiled} == set(cuda_gate.KERNELS)
    assert {result.arch for result in compiled} == {int(arch.replace(".", "")) for arch in ARCHS.split(";")}
    for result in compiled:
        assert not cuda_gate.faults(result), f"{result}: {cuda_gate.faults(result)}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_it_loads_where_there_is_no_gpu(library):
    code = (
        f"import torch\ntorch.ops.load_library({str(library)!r})\nops = torch.ops.hyperformer_fast_cuda\n"
        "print('devices', ops.device_count(), 'shared', ops.shared_bytes(2, 768, 24, torch.bfloat16))\n"
        "try:\n    ops.generate_weights(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1))\n"
        "except NotImplementedError as error:\n    print('refused', 'CPU' in str(error))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    words = said.stdout.split()
    assert int(words[1]) <= 0 and 0 < int(words[3]) <= 99 << 10 and words[5] == "True"
