"""Who decides which backend serves a call: ``impl=``, ``use_backend``, the environment, the ranked order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import backends, ops, use_backend
from hyperformer_fast.backends import choice
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.layout import AdapterLayout

LAYOUT = AdapterLayout(8, 2)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    """No choice of the process around, and none left to the next test."""
    for variable in [name for name in os.environ if name.startswith(choice.ENVIRONMENT_VARIABLE)]:
        monkeypatch.delenv(variable)
    choice.forget()
    before = choice.chosen()
    choice._set_of_thread(None)
    yield
    choice._set_of_thread(before)
    monkeypatch.undo()
    choice.forget()


@pytest.fixture
def environment(monkeypatch):
    """Sets variables as if they had been there from the start."""

    def choose(**variables):
        for suffix, value in variables.items():
            monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE + suffix, value)
        choice.forget()

    return choose


@pytest.fixture
def served_by_reference(monkeypatch):
    """A list that grows with every forward of the reference backend."""
    calls, plain = [], ReferenceBackend.adapter_forward
    monkeypatch.setattr(ReferenceBackend, "adapter_forward", lambda self, *a: calls.append(1) or plain(self, *a))
    return calls


def asked(op="adapter_forward", **options):
    explanation = backends.explain(op, **options)
    return explanation.choice, explanation.source


def test_a_plain_call_chooses_from_then_on():
    use_backend("reference")
    assert backends.current_backend() == "reference" and backends.explain().chosen == "reference"
    with use_backend("auto"):
        assert backends.current_backend() == "auto"
    assert backends.current_backend() == "reference"
    use_backend("auto")
    assert backends.current_backend() == "auto"


def test_a_plain_call_is_what_the_ops_obey(served_by_reference):
    x, packed = torch.randn(3, 8), random_packed(LAYOUT).float()
    use_backend("reference")
    ops.adapter(x, packed, LAYOUT, "gelu_new")
    assert served_by_reference


def test_blocks_nest_and_unwind():
    with pytest.raises(KeyError):
        with use_backend("reference"):
            with use_backend("auto"):
                assert backends.current_backend() == "auto"
            assert backends.current_backend() == "reference"
            raise KeyError
    assert backends.current_backend() == "auto"


def test_one_object_for_several_blocks():
    chosen = use_backend("reference")
    with chosen:
        with chosen:
            assert backends.current_backend() == "reference"
        assert backends.current_backend() == "reference"
    assert backends.current_backend() == "auto"
    with chosen:
        assert backends.current_backend() == "reference"
    assert backends.current_backend() == "auto"


def test_a_decorator_chooses_for_the_function_alone():
    @use_backend("reference")
    def inside(x, *, y):
        """Documented."""
        return backends.current_backend(), x, y

    assert backends.current_backend() == "auto"
    assert inside(1, y=2) == ("reference", 1, 2) and inside.__doc__ == "Documented."
    assert backends.current_backend() == "auto"


@pytest.mark.parametrize("form", [lambda: use_backend("gpu"), lambda: use_backend("gpu").__enter__()])
def test_an_unknown_name_raises_at_the_call(form):
    with pytest.raises(ValueError, match="use_backend: .* auto, cuda, triton, cpu, reference, got 'gpu'"):
        form()
    assert backends.current_backend() == "auto"


def test_a_choice_is_its_threads():
    use_backend("reference")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(backends.current_backend()))
    thread.start()
    thread.join()
    assert seen == ["auto"] and backends.current_backend() == "reference"


def test_the_order_of_those_who_choose(environment):
    assert asked() == ("auto", "ranked order")
    environment(**{"": "reference"})
    assert asked() == ("reference", "HYPERFORMER_FAST_BACKEND")
    environment(_ADAPTER_FORWARD="cpu")
    assert asked() == ("cpu", "HYPERFORMER_FAST_BACKEND_ADAPTER_FORWARD")
    assert asked("fold") == ("reference", "HYPERFORMER_FAST_BACKEND")
    with use_backend("triton"):
        assert asked() == ("triton", "use_backend")
        assert asked(impl="reference") == ("reference", "impl=")
    environment(_ADAPTER_FORWARD="auto")
    assert asked() == ("auto", "HYPERFORMER_FAST_BACKEND_ADAPTER_FORWARD")
    assert "(asked for: auto, by HYPERFORMER_FAST_BACKEND_ADAPTER_FORWARD)" in str(backends.explain())


def test_the_ops_obey_the_variable_of_an_op(environment):
    environment(_ADAPTER_FORWARD="cuda")
    x, packed = torch.randn(3, 8), random_packed(LAYOUT).float()
    ops.fold(packed, LAYOUT, x.dtype)
    with pytest.raises(RuntimeError, match="'cuda' cannot serve adapter_forward: .*HYPERFORMER_FAST_BACKEND_ADAPTER_F"):
        ops.adapter(x, packed, LAYOUT, "gelu_new")
    ops.adapter(x, packed, LAYOUT, "gelu_new", impl="reference")


def test_a_block_within_a_compiled_function_is_not_lost(served_by_reference):
    """The graph breaks there; a whole graph, whose ops run after the block, is refused."""
    packed = random_packed(LAYOUT).float()

    def step(x):
        with use_backend("reference"):
            out = ops.adapter(x + 1, packed, LAYOUT, "gelu_new")
        return 2 * out

    torch._dynamo.reset()
    torch.compile(step, backend="aot_eager")(torch.randn(3, 8))
    assert served_by_reference
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="use it outside, or pass impl= to the op"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(torch.randn(3, 8))
    assert backends.current_backend() == "auto"


CALLS = {
    "generate_weights": lambda leaves, impl: ops.generate_weights(*(t.unsqueeze(0) for t in leaves[1:]), impl=impl),
    "fold": lambda leaves, impl: ops.fold(leaves[1] @ leaves[2].T + leaves[3], LAYOUT, torch.float32, impl=impl).wg,
    "adapter": lambda leaves, impl: ops.adapter(
        leaves[0], leaves[1] @ leaves[2].T + leaves[3], LAYOUT, "gelu_new", impl=impl
    ),
    "hyper_adapter": lambda leaves, impl: ops.hyper_adapter(*leaves, LAYOUT, "gelu_new", impl=impl),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_impl_at_the_call_of_every_op(name, compiled, monkeypatch):
    """It reaches the forward and the backward, and no other backend serves; what cannot serve or is unknown raises."""
    call = CALLS[name]
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [torch.randn(s) for s in ((3, 8), (1, 4), (LAYOUT.numel, 4), (LAYOUT.numel,))]
    served = []
    for op in ("generate_weights", "fold", "adapter_forward", "adapter_backward", "hyper_adapter"):
        for kind in (type(backend) for backend in choice.registry.ranked()):
            plain = getattr(kind, op)

            def spy(self, *arguments, _plain=plain, _op=op):
                served.append((_op, self.name))
                return _plain(self, *arguments)

            monkeypatch.setattr(kind, op, spy)
    out = call([t.requires_grad_() for t in leaves], "reference")
    if out.requires_grad:
        out.sum().backward()
        assert name == "generate_weights" or ("adapter_backward", "reference") in served
    assert served and all(by == "reference" for _, by in served)
    with pytest.raises((RuntimeError, ValueError), match="impl: backend must be one of .*got 'gpu'"):
        call(leaves, "gpu")
    with pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        call(leaves, "cuda")


def test_impl_under_functorch_transforms():
    x, packed = torch.randn(3, 8), random_packed(LAYOUT).float()
    loss = lambda x, impl: ops.adapter(x, packed, LAYOUT, "gelu_new", impl=impl).sum()  # noqa: E731
    assert torch.equal(torch.func.grad(loss)(x, "reference"), torch.func.grad(loss)(x, None))
    with pytest.raises(RuntimeError, match="'cpu' cannot serve adapter_forward under torch.func"):
        torch.func.grad(loss)(x, "cpu")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("", "reference", "reference reference"), ("_FOLD", "reference", "auto reference"), ("", "", "auto auto")],
)
def test_the_environment_of_a_process(variable, value, expected):
    code = "from hyperformer_fast import backends as b; print(b.current_backend(), b.current_backend('fold'))"
    environment = {**os.environ, choice.ENVIRONMENT_VARIABLE + variable: value}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == expected, ran.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("", "^HYPERFORMER_FAST_BACKEND: backend must be .*got 'nonsense'"),
        ("_FOLD", "^HYPERFORMER_FAST_BACKEND_FOLD: backend must be .*got 'nonsense'"),
        ("_ADAPTER", "^HYPERFORMER_FAST_BACKEND_ADAPTER names no op: .*HYPERFORMER_FAST_BACKEND_ADAPTER_FORWARD"),
    ],
)
def test_a_wrong_variable_is_named(environment, variable, message):
    environment(**{variable: "nonsense"})
    with pytest.raises(ValueError, match=message):
        ops.fold(random_packed(LAYOUT), LAYOUT, torch.float32)


def test_an_unknown_op_raises():
    with pytest.raises(ValueError, match="op must be one of .*'forward'"):
        backends.explain("forward")
