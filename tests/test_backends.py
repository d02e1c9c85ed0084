"""What each backend serves, its contract and its self-test. How one is chosen: test_backend_choice.py."""

from __future__ import annotations

import contextlib
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import backends, ops
from hyperformer_fast.backends.cuda import CudaBackend
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.layout import AdapterLayout, AdapterSpec, Folded, Saved

LAYOUT = AdapterLayout(8, 2)


@contextlib.contextmanager
def registered(backend, **options):
    backends.register(backend, **options)
    try:
        yield backend
    finally:
        backends.unregister(backend.name)


def apply():
    return ops.adapter(torch.randn(3, 8), random_packed(LAYOUT).float(), LAYOUT, "gelu_new")


def test_the_reference_serves_everything():
    for device in ("cpu", "cuda", "mps"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for op in backends.backend_report()[-1]["serves"]:
                assert backends.explain(op, device=device, dtype=dtype).chosen is not None
                with backends.use_backend("reference"):
                    assert backends.explain(op, device=device, dtype=dtype).chosen == "reference"


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


def test_explanation_gives_a_reason_for_every_other_backend():
    explanation = backends.explain("adapter_forward", torch.zeros(2, 8, dtype=torch.bfloat16))
    names = {report["name"] for report in backends.backend_report()}
    assert set(explanation.reasons) == names - {explanation.chosen}
    assert all(explanation.reasons.values()) and explanation.chosen in str(explanation)
    assert explanation.request.dtype == torch.bfloat16 and explanation.request.d == 8


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


def test_live_check_works_on_the_backends_own_device():
    class Elsewhere(ReferenceBackend):
        name, device = "elsewhere", "meta"

        def fold(self, packed, layout, dtype):
            raise NotImplementedError(packed.device.type)

    with registered(Elsewhere()), pytest.raises(NotImplementedError, match="meta"):
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
    monkeypatch.setattr(backend, "trusted", backends.Support.yes)  # this library has no kernels to test
    found = backend.availability()
    assert found if reason is None else re.search(reason, found.reason)


@pytest.mark.parametrize("name", backends.backend_names()[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outputs_are_those_of_the_tables(name, dtype):
    for pre, post, save in itertools.product([False, True], repeat=3):
        layout = AdapterLayout(13, 4, pre, post)
        if backends.explain("adapter_forward", dtype=dtype, d=13, b=4, impl=name).chosen != name:
            pytest.skip(f"{name} does not serve {dtype} here")
        backend = backends.select(backends.Request("fold", "cpu", dtype, 13, 4), name)
        packed, x, index = random_packed(layout, 2).float(), torch.randn(3, 5, 13).to(dtype), torch.tensor([1, -1, 0])
        folded = backend.fold(packed, layout, dtype)
        _, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "relu"), index, save)
        for made, table in (
            (folded, Folded.table(layout, (2,), dtype)),
            (saved, Saved.table(layout, (3, 5), dtype, save)),
        ):
            assert [(tuple(t.shape), t.dtype) for t in made] == [(tuple(part.shape), part.dtype) for part in table]


class Doubled(ReferenceBackend):
    """A backend with a kernel for one op only."""

    name = "doubled"
    serves = ("adapter_forward",)

    def supports(self, request):
        return backends.Support.yes() if request.b <= 4 else backends.Support.no(f"bottleneck {request.b} is beyond 4")

    def adapter_forward(self, x, folded, spec, task_index, save):
        out, saved = super().adapter_forward(x, folded, spec, task_index, save)
        return 2 * out, saved


def test_a_registered_backend_serves():
    x, packed = torch.randn(3, 8), random_packed(LAYOUT).float()
    plain = ops.adapter(x, packed, LAYOUT, "gelu_new")
    compiled = torch.compile(
        lambda x, impl: ops.adapter(x, packed, LAYOUT, "gelu_new", ops.fold(packed, LAYOUT, x.dtype), impl=impl),
        fullgraph=True,
        backend="aot_eager",
    )
    with registered(Doubled()):
        assert "doubled" in backends.backend_names()
        assert torch.equal(ops.adapter(x, packed, LAYOUT, "gelu_new"), plain), "auto prefers the others by default"
        folded = ops.fold(packed, LAYOUT, x.dtype)
        twice = ops.adapter(x, packed, LAYOUT, "gelu_new", folded, impl="doubled")
        assert torch.allclose(twice, 2 * plain, atol=1e-6) and torch.equal(compiled(x, "doubled"), twice)
        assert backends.explain("adapter_forward", b=5, impl="doubled").reasons["doubled"] == "bottleneck 5 is beyond 4"
        with pytest.raises(RuntimeError, match="'doubled' cannot serve fold: it has kernels for adapter_forward only"):
            ops.fold(packed, LAYOUT, x.dtype, impl="doubled")
        assert backends.live_check("doubled")["adapter_forward"] == pytest.approx(1, abs=0.01)
    with registered(Doubled(), before="cuda"):
        assert torch.equal(ops.adapter(x, packed, LAYOUT, "gelu_new"), twice)
    assert torch.equal(ops.adapter(x, packed, LAYOUT, "gelu_new"), plain)


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="the name 'reference' is taken"):
        backends.register(ReferenceBackend())
    with pytest.raises(ValueError, match="must be one of .*got 'nobody'"):
        backends.register(Doubled(), before="nobody")
    with pytest.raises(TypeError, match="instance of .*Backend, got <class"):
        backends.register(Doubled)
    with pytest.raises(ValueError, match="'cpu' comes with the library"):
        backends.unregister("cpu")
    with pytest.raises(ValueError, match="got 'doubled'"):
        backends.unregister("doubled")


def test_a_backend_that_lacks_a_kernel_cannot_be_made():
    class Partial(backends.Backend):
        def availability(self):
            return backends.Support.yes()

    with pytest.raises(TypeError, match="adapter_backward.*fold.*supports"):
        Partial()


def test_support_is_true_where_it_is_yes():
    assert backends.Support.yes() and backends.Support.yes().reason is None
    assert not backends.Support.no("because") and backends.Support.no("because").reason == "because"
