"""Whether the Triton kernels may round float32 products to tf32, whichever of torch's settings was used."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)

#: For each setting that it is given, in a process of its own: runs an adapter forward and backward in two dtypes, and
#: prints what float32 products may be.
SCRIPT = """
import os, sys, warnings
import torch
from hyperformer_fast import ops
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.kernels.common import matmul_precision
from hyperformer_fast.layout import AdapterLayout

warnings.simplefilter("ignore")
torch.set_num_threads(1)
layout = AdapterLayout(16, 3)
for setting in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(setting)
        for dtype in (torch.float32, torch.bfloat16):
            E, G, g0 = torch.randn(1, 1, 4), torch.randn(1, layout.numel, 4), torch.zeros(1, layout.numel)
            packed = ops.generate_weights(E, G, g0, impl="triton")[0].requires_grad_()
            out = ops.adapter(torch.randn(5, 16).to(dtype), packed, layout, "gelu_new", impl="triton")
            torch.autograd.grad(out.float().sum(), packed)
        print(*map(matmul_precision, (torch.float32, torch.bfloat16, torch.float16)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed after {setting}")
"""

TRAINER = """
import transformers.training_args
transformers.training_args.is_torch_tf32_available = lambda: True
transformers.TrainingArguments(output_dir="unused", report_to=[], tf32=True)
"""


#: What users do, and what float32 products may be then.
SETTINGS = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    TRAINER: "tf32",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_whichever_setting_was_used():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *SETTINGS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for (setting, expected), answers in zip(SETTINGS.items(), done.stdout.splitlines(), strict=True):
        assert answers.split() == [expected, "ieee", "ieee"], setting


def test_sixteen_bits_do_not_ask(monkeypatch):
    import torch

    from hyperformer_fast.kernels.common import matmul_precision

    class Settings:
        @property
        def fp32_precision(self):
            raise AssertionError("torch's setting for float32 was read")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Settings())
    assert matmul_precision(torch.bfloat16) == matmul_precision(torch.float16) == "ieee"
    with pytest.raises(AssertionError):
        matmul_precision(torch.float32)
