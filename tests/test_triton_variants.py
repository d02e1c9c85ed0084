"""How often a model compiles each Triton kernel, counted without a GPU: the driver and the compiler are stubs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)

#: Prints, for each number of tasks and each kernel, how often it was compiled for 24 sites' forward and backward.
SCRIPT = """
import collections, json, sys, types
import torch
from triton import runtime
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from hyperformer_fast import backends
from hyperformer_fast.backends.base import Support
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.kernels import tiles
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.sites import StackWeights

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

compiled = collections.Counter()
nothing = lambda *arguments: None

def compile_nothing(self, key, *rest):
    compiled[self.__name__] += 1
    kernel = types.SimpleNamespace(
        run=nothing, launch_metadata=nothing, function=0, packed_metadata=(),
        metadata=types.SimpleNamespace(shared=0, target=GPUTarget("cuda", 90, 32)),
        result=lambda: kernel)
    self.device_caches[0][0][key] = kernel
    return kernel

runtime.driver.set_active(Driver())
JITFunction._do_compile = compile_nothing
TritonBackend.availability = lambda self: Support.yes()
TritonBackend.device = "cpu"
tiles.architecture = lambda device: 90

d, b, sites = 768, int(sys.argv[1]), 24
layout = AdapterLayout(d, b)
net = types.SimpleNamespace(layout=layout, num_layers=sites // 2)
with backends.use_backend("triton"):
    for T in (1, 2, 3, 8):
        compiled.clear()
        packed = torch.zeros(sites, T, layout.numel, requires_grad=True)
        x = torch.zeros(8, 4, d, dtype=torch.bfloat16, requires_grad=True)
        index = torch.arange(8) % T if T > 1 else None
        weights, h = StackWeights(net, packed, "gelu_new"), x
        for site in range(sites):
            h = weights.adapt(h, site, index)
        torch.autograd.grad(h, (x, packed), torch.ones_like(h))
        print(json.dumps([T, compiled]), flush=True)
"""


@pytest.mark.parametrize("b", [24, 16])
def test_each_kernel_is_compiled_once(b):

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(b)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    counts = dict(json.loads(line) for line in done.stdout.splitlines())
    # one task; then a batch of several, whose kernels read task_index; more tasks compile nothing
    for T in (1, 2):
        assert {"adapter_forward_kernel", "rows_kernel", "weights_kernel"} <= set(counts[T])
        assert set(counts[T].values()) == {1}, f"{T} tasks compiled kernels several times: {counts[T]}"
    assert set(counts[2]) == set(counts[1]) - {"gram_kernel", "fold_kernel"} | {"schedule_kernel"}
    assert counts[3] == counts[8] == {}, counts
