"""The Triton backend without a GPU: when it is refused and why; and tests/interpreted/, each file in a process of its
own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperformer_fast import backends

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)


def run(arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, cwd=HERE.parent
    )


@needs_triton
@pytest.mark.parametrize("file", sorted(path.name for path in (HERE / "interpreted").glob("test_*.py")))
def test_in_the_interpreter(file):
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "interpreted" / file)]
    done = run(command, TRITON_INTERPRET="1", HYPERFORMER_FAST_BACKEND="triton")
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, f"{file} failed in the interpreter: see the captured output"


@needs_triton
def test_auto_leaves_the_interpreter_alone():
    code = """
import torch
from hyperformer_fast import backends
print(backends.explain("adapter_forward"))
with backends.use_backend("triton"):
    for device, dtype, b in (("cpu", torch.bfloat16, 24), ("cuda", torch.float32, 24), ("cpu", torch.float64, 24),
                             ("cpu", torch.float32, 129)):
        explanation = backends.explain("adapter_forward", device=device, dtype=dtype, b=b)
        print(explanation.chosen, explanation.reasons.get("triton"))
errors = backends.live_check("triton")
assert set(errors) == set(backends.backend_report()[-1]["serves"]) and max(errors.values()) < 1e-5, errors
"""
    done = run(["-c", code], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for expected in (
        "not triton: Triton's interpreter is for tests only: ask for it by name",
        "triton None",
        "None the inputs are on cuda, not on cpu: move them, or use backend 'auto'",
        "None dtype torch.float64 is not",
        "None bottleneck 129 is beyond 128",
    ):
        assert expected in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_unavailable_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = {r["name"]: r for r in backends.backend_report()}["triton"]
    assert not report["available"] and "use backend 'auto'" in report["reason"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = {r["name"]: r for r in backends.backend_report()}["triton"]
    assert "pip install" in report["reason"]
