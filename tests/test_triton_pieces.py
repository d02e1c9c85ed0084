"""The Triton kernels of the pieces between a T5's matrix products, without a GPU: what they compile to, and how often
their launches are repeated without asking Triton (tests/interpreted/test_pieces.py has what they compute)."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture(scope="module")
def tool():
    """Imports a module of tools/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        yield importlib.import_module


@pytest.mark.parametrize(("arch", "dtype"), [(90, "bf16"), (80, "fp32")])
def test_no_spills_and_wide_accesses(tool, arch, dtype):
    gate = tool("triton_gate")
    compiled = list(gate.gate_pieces(["base"], [dtype], [arch]))
    assert {result.kernel for result in compiled} == set(tool("triton_pieces").KERNELS)
    recorded = gate.recorded(gate.RECORD_OF_PIECES)
    for result in compiled:
        assert not gate.faults(result), f"{result}: {gate.faults(result)}"
        assert result.blocks >= recorded[gate.key(result)], f"{result}: fewer blocks than recorded"
        if dtype == "bf16" and result.kernel.startswith("act_dropout"):
            assert not result.shared, f"{result}: the mask passes through shared memory"


def test_faults_are_found(tool):
    """Rows whose starts are not aligned are read number by number."""
    gate, pieces = tool("triton_gate"), tool("triton_pieces")
    variant, launch = pieces.launches_of(pieces.SIZES["base"], torch.bfloat16, 90)[0]
    launch.arguments["ALIGN"] = 1
    assert "narrow loads" in gate.faults(gate.compiled(launch, variant, "bf16", 90))[0]


def test_no_length_is_compiled_in(tool):
    """Batches, lengths, ranks of processes and dropouts of other sizes find the kernels that are there."""
    pieces = tool("triton_pieces")

    def constants(launch):
        names = [parameter.name for parameter in launch.kernel.params if parameter.is_constexpr]
        return launch.kernel.__name__, {name: launch.arguments[name] for name in names}

    def keys(B, L):
        launches = [launch for _, launch in pieces.launches_of(pieces.SIZES["base"], torch.bfloat16, 90, B, L)]
        for launch in launches:
            for parameter in launch.kernel.params:
                value = launch.arguments[parameter.name]
                if isinstance(value, int) and not parameter.is_constexpr:
                    assert parameter.do_not_specialize, f"{launch.kernel.__name__}: {parameter.name}"
        return [constants(launch) for launch in launches]

    expected = keys(2, 128)
    for B, L in ((1, 128), (3, 112), (7, 96)):
        assert keys(B, L) == expected


class Asked:
    """Counts how often Triton is asked for a launch, and notes what repeated launches hand to the driver."""

    def __init__(self, monkeypatch):
        from triton.runtime.jit import JITFunction

        run, self.names = JITFunction.run, []

        def counted(kernel, *args, **kwargs):
            self.names.append(kernel.__name__)
            return run(kernel, *args, **kwargs)

        monkeypatch.setattr(JITFunction, "run", counted)


@pytest.fixture
def launches(monkeypatch):
    """On a GPU that is not there: the kernels and the arguments that reach its driver."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from types import SimpleNamespace

    from stub_gpu import stub_gpu
    from triton.runtime.jit import JITFunction

    from hyperformer_fast.kernels import act_dropout, cross_entropy, launch, residual, softmax_dropout

    found = []

    def compile(kernel, key, signature, device, *rest):
        def run(x, y, z, stream, function, metadata, description, before, after, *args):
            addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            found.append((kernel.__name__, key, (x, y, z), addresses))

        made = SimpleNamespace(
            run=run, launch_metadata=lambda *a: None, function=7, packed_metadata=(4, 1, 0),
            metadata=SimpleNamespace(target=SimpleNamespace(backend="cuda"), shared=0),
        )  # fmt: skip
        kernel.device_caches[device][0][key] = made
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    for module in (act_dropout, cross_entropy, residual, softmax_dropout):
        monkeypatch.setattr(module, "_plans", launch.Plans())
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction) and kernel.__name__.endswith("_kernel"):
                monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    with stub_gpu():
        yield found


def test_a_repeated_launch_is_the_launch(tool, launches, monkeypatch):
    """Each call is made thrice with the same tensors: by Triton, as it was recorded, and by Triton again."""
    from hyperformer_fast.kernels import launch

    pieces = tool("triton_pieces")
    calls = pieces.calls(pieces.SIZES["base"], torch.bfloat16, 2, 16, 4)
    asked, held = Asked(monkeypatch), []
    plain = torch.Tensor.new_empty
    for variant, call in calls.items():
        # the same outputs each time, so that all addresses are the same
        made: list[torch.Tensor] = []

        def new_empty(self, *args, made=made, **kwargs):
            made.append(plain(self, *args, **kwargs))
            return made[-1]

        def again(self, *args, made=made, **kwargs):
            made.append(made.pop(0))
            return made[-1]

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        call()
        first = list(launches)
        monkeypatch.setattr(torch.Tensor, "new_empty", again)
        launches.clear()
        before = len(asked.names)
        call()
        assert len(asked.names) == before, f"{variant}: Triton was asked again"
        repeated = list(launches)
        launches.clear()
        with monkeypatch.context() as forgotten:
            forgotten.setattr(launch.Plan, "__call__", lambda self, addresses: False)
            call()
        assert first and repeated == first == launches, variant
        launches.clear()
        held += made


def test_another_dropout_or_rank_is_another_plan(launches):
    from hyperformer_fast.kernels import entry
    from hyperformer_fast.layout import Dropout

    x, seed = torch.zeros(4, 16), torch.tensor([3])
    for dropout in (Dropout(0.1, seed, 0), Dropout(0.1, seed, 1), Dropout(0.2, seed, 1)) * 2:
        entry.act_dropout_forward(x, None, "relu", dropout)
    names = [parameter for *_, parameter in launches]
    assert len(launches) == 6 and names[0] != names[1] != names[2]
    assert len({key for _, key, *_ in launches}) == 1  # one compiled kernel for all
