from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import backends, ops
from hyperformer_fast.backends.cuda import CudaBackend
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.layout import AdapterLayout

select = importlib.import_module("hyperformer_fast.backends.select")  # the package has a function of that name
LAYOUT = AdapterLayout(8, 2)


def apply():
    return ops.adapter(torch.randn(3, 8), random_packed(LAYOUT).float(), LAYOUT, "gelu_new")


def test_the_reference_serves_everything():
    for device in ("cpu", "cuda", "mps"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for op in backends.backend_report()[-1]["serves"]:
                assert backends.explain(op, device=device, dtype=dtype).chosen is not None
                with backends.use_backend("reference"):
                    assert backends.explain(op, device=device, dtype=dtype).chosen == "reference"


def test_use_backend_nests_and_unwinds():
    assert backends.current_backend() == "auto"
    with pytest.raises(KeyError):
        with backends.use_backend("reference"):
            with backends.use_backend("auto"):
                assert backends.current_backend() == "auto"
            assert backends.current_backend() == "reference"
            raise KeyError
    assert backends.current_backend() == "auto"


def test_an_explicit_choice_that_cannot_serve_raises():
    with (
        backends.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' cannot serve .*use backend 'auto'"),
    ):
        apply()
    with backends.use_backend("cpu"):
        explanation = backends.explain("fold", device="cpu", dtype=torch.float64)
        assert explanation.chosen is None and explanation.reasons["cpu"]
        with pytest.raises(RuntimeError, match="'cpu' cannot serve fold"):
            ops.fold(random_packed(LAYOUT), LAYOUT, torch.float64)


def test_unknown_names():
    with pytest.raises(ValueError, match="auto, cuda, triton, cpu, reference, got 'gpu'"):
        backends.use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match="op must be one of .*'forward'"):
        backends.explain("forward")


def test_explanation_gives_a_reason_for_every_other_backend():
    explanation = backends.explain("adapter_forward", torch.zeros(2, 8, dtype=torch.bfloat16))
    names = {report["name"] for report in backends.backend_report()}
    assert set(explanation.reasons) == names - {explanation.chosen}
    assert all(explanation.reasons.values()) and explanation.chosen in str(explanation)
    assert explanation.request.dtype == torch.bfloat16 and explanation.request.d == 8


@pytest.mark.parametrize(
    ("value", "expected"), [("reference", "reference"), ("nonsense", "got 'nonsense'"), ("", "auto")]
)
def test_the_environment_chooses(value, expected):
    code = "from hyperformer_fast import backends; print(backends.current_backend())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HYPERFORMER_FAST_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert expected in ran.stdout + ran.stderr


def test_the_backward_keeps_the_forwards_backend():
    packed = random_packed(LAYOUT).float().requires_grad_()
    with backends.use_backend("reference"):
        out = ops.adapter(torch.randn(3, 8), packed, LAYOUT, "gelu_new")
    with backends.use_backend("triton"):
        out.sum().backward()
    assert packed.grad is not None


def test_live_check_of_available_backends():
    for report in backends.backend_report():
        if report["available"]:
            errors = backends.live_check(report["name"])
            assert set(errors) == set(report["serves"]) and max(errors.values()) < 1e-5
        else:
            assert report["reason"]
            with pytest.raises(RuntimeError, match="not available"):
                backends.live_check(report["name"])


def test_live_check_works_on_the_backends_own_device(monkeypatch):
    class Elsewhere(ReferenceBackend):
        device = "meta"

        def fold(self, packed, layout, dtype):
            raise NotImplementedError(packed.device.type)

    monkeypatch.setitem(select._BACKENDS, "elsewhere", Elsewhere())
    with pytest.raises(NotImplementedError, match="meta"):
        backends.live_check("elsewhere")


@pytest.mark.parametrize(("count", "capability", "reason"), [
    (-35, (9, 0), "own CUDA run-time finds no device .error 35.*: update the driver"),
    (1, (7, 5), "needs compute capability 8.0, got 7.5"),
    (1, (8, 0), None),
])  # fmt: skip
def test_cuda_says_what_is_wrong_with_a_machine(monkeypatch, count, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    backend = CudaBackend()
    monkeypatch.setattr(backend, "library", lambda: SimpleNamespace(device_count=lambda: count))
    monkeypatch.setattr(backend, "distrusted", lambda: None)  # this library has no kernels to test
    found = backend.unavailable()
    assert found is None if reason is None else re.search(reason, found)
