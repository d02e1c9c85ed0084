"""The emulator itself: tensor-core products against PyTorch's, and every kind of fault it is there to find."""

from __future__ import annotations

import ctypes
import os
import subprocess

import pytest
import torch
from support.emulated import EMULATOR, build, device_of, needs_compiler, thread_order
from support.environment import setting

pytestmark = needs_compiler

FAULTS = ["none", "no barrier", "no wait", "divergent", "half", "beyond", "before", "lanes", "left over", "misaligned"]
FOUND = {
    "divergent": "divergent barrier",
    "half": "divergent barrier",
    "beyond": "wrote beyond shared memory",
    "before": "wrote beyond shared memory",
    "lanes": "divergent warp|waits for ever|ended while others wait|divergent barrier",
    "left over": "copies in flight",
    "misaligned": "misaligned",
}
ORDERS = ["forward", "reverse", "1", "2"]


@pytest.fixture(scope="module", params=["", "-DHFF_UCONTEXT"], ids=["own switch", "ucontext"])
def kernels(request):
    """With the stacks switched as on this machine, and as on one that is not x86-64."""
    flags = [request.param] if request.param else []
    library = ctypes.CDLL(str(build("kernels", [EMULATOR / "kernels.cu"], flags, [])))
    for name in ("reverse", "count", "add", "product", "product_tf32"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def reverse(kernels, fault: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    source, result = torch.arange(64.0), torch.full((64,), -1.0)
    said = kernels.reverse(pointer(source), pointer(result), FAULTS.index(fault)).decode()
    return source.flip(0), result, said


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel(kernels, order):
    with thread_order(order):
        expected, result, said = reverse(kernels, "none")
    assert said == "" and torch.equal(expected, result)


@pytest.mark.parametrize("fault", ["no barrier", "no wait"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_was_not_waited_for_is_not_there(kernels, fault, order):
    with thread_order(order):
        expected, result, said = reverse(kernels, fault)
    assert said == "" and not torch.equal(expected, result) and result.isnan().any()


@pytest.mark.parametrize("fault", FOUND)
def test_faults_end_the_launch(kernels, fault):
    import re

    said = reverse(kernels, fault)[2]
    assert said.startswith("emulator: ") and re.search(FOUND[fault], said), said
    assert reverse(kernels, "none")[2] == ""  # and nothing of it is left


@pytest.mark.parametrize("order", ORDERS)
def test_a_grid_waits_for_all_its_blocks(kernels, order):
    counts = torch.zeros(3, dtype=torch.int32)
    with thread_order(order), device_of(3):
        assert kernels.count(pointer(counts), 10, FAULTS.index("none")) == b""
    assert counts.tolist() == [3 * 64, 2, 3]  # of ten useful blocks as many as the device holds


@pytest.mark.parametrize("order", ORDERS)
def test_a_grid_without_a_barrier_sees_too_little(kernels, order):
    counts = torch.zeros(3, dtype=torch.int32)
    with thread_order(order):
        assert kernels.count(pointer(counts), 3, FAULTS.index("no barrier")) == b""
    assert counts[0] == 3 * 64 and counts[2] < 3


@pytest.mark.parametrize(
    ("fault", "blocks", "words"),
    [("divergent", 3, "divergent barrier of the grid"), ("half", 2, "divergent barrier of the grid"),
     ("none", 0, "in a launch that is not cooperative")],
)  # fmt: skip
def test_faults_of_a_grid_end_the_launch(kernels, fault, blocks, words):
    counts = torch.zeros(3, dtype=torch.int32)
    assert words in kernels.count(pointer(counts), blocks, FAULTS.index(fault)).decode()
    assert kernels.count(pointer(counts), 3, FAULTS.index("none")) == b""


def test_the_old_names_of_variables_work_and_warn(kernels, monkeypatch, capfd):
    monkeypatch.setenv("HF_EMULATOR_ORDER", "neither forward nor reverse nor a seed")
    assert "stoul" in reverse(kernels, "none")[2]
    assert "HF_EMULATOR_ORDER is now called HFF_EMULATOR_ORDER" in capfd.readouterr().err
    monkeypatch.setenv("HFF_EMULATOR_ORDER", "forward")
    assert reverse(kernels, "none")[2] == ""

    monkeypatch.delenv("HFF_EMULATOR_FLAGS", raising=False)
    monkeypatch.setenv("HF_EMULATOR_FLAGS", "-g3")
    with pytest.warns(DeprecationWarning, match="HF_EMULATOR_FLAGS is now called HFF_EMULATOR_FLAGS"):
        assert setting("HFF_EMULATOR_FLAGS") == "-g3"


@pytest.mark.parametrize("hosts", ["1", "4"])
def test_blocks_on_several_host_threads_add_up(kernels, hosts, monkeypatch):
    monkeypatch.setenv("HFF_EMULATOR_THREADS", hosts)
    counts = torch.zeros(3, dtype=torch.int32)
    assert kernels.add(pointer(counts), 40) == b""
    assert counts.tolist() == [40 * 64 * 100, 40 * 64, 40 * 64 - 1]


def test_sanitizer_sees_what_is_beyond_global_memory(tmp_path):
    program = tmp_path / "kernels"
    made = subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", "-fsanitize=address", "-DHFF_MAIN", f"-I{EMULATOR}",
         "-x", "c++", EMULATOR / "kernels.cu", "-o", program], capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode and "asan" in made.stderr:
        pytest.skip("needs libasan")
    assert made.returncode == 0, made.stderr[-2000:]
    right = subprocess.run([program, "0"], capture_output=True, text=True)
    assert right.returncode == 0, right.stderr[-2000:]
    wrong = subprocess.run([program, "10"], capture_output=True, text=True)
    assert wrong.returncode and "heap-buffer-overflow" in wrong.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_products(kernels, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.empty(16, 8)
    assert kernels.product(pointer(a), pointer(b), pointer(c), int(dtype == torch.float16)) == b""
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_tf32_products(kernels):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    assert kernels.product_tf32(pointer(a), pointer(b), pointer(c)) == b""
    cut = lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32)  # noqa: E731
    torch.testing.assert_close(c, cut(a) @ cut(b), rtol=1e-5, atol=1e-5)
    assert not torch.equal(c, a @ b)
