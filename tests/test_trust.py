"""A library whose kernels compute wrong numbers does not serve, and what passed is remembered beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from hyperformer_fast import backends, doctor, native, ops
from hyperformer_fast.backends import choice, registry, selftest, trust
from hyperformer_fast.backends.cpu import CpuBackend
from hyperformer_fast.backends.reference import ReferenceBackend
from hyperformer_fast.layout import AdapterLayout

pytestmark = pytest.mark.skipif(native.cpu_library() is None, reason=str(native.status()["reason"]))

OPS = CpuBackend.serves


class Library:
    """The compiled ops, of which one returns numbers that are wrong by a few percent, or raises."""

    def __init__(self, broken: str | None, error: Exception | None = None):
        self.broken, self.error, self.calls = broken, error, 0

    def __getattr__(self, name: str):
        op = getattr(native.cpu_library(), name)

        def call(*arguments):
            self.calls += name in OPS
            result = op(*arguments)
            if name != self.broken:
                return result
            if self.error:
                raise self.error
            many = isinstance(result, (list, tuple))
            return [t * 1.03 for t in result] if many else result * 1.03

        call.default = call  # as an op has an overload of that name
        return call


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package's folder with the library in it."""
    # A test before this one may have forgotten that they are loaded, and to load the copy would crash the process.
    native.status()
    native.cpu_library()
    file = shutil.copy2(native.library_file("cpu"), tmp_path / "_hf_cpu.so")
    monkeypatch.setattr(native, "library_file", lambda library: tmp_path / "_hf_cpu.so" if library == "cpu" else None)
    return file.parent


@pytest.fixture
def backend(folder, monkeypatch):
    """Registers a CPU backend on such a library."""

    def register(broken: str | None = None, error: Exception | None = None) -> CpuBackend:
        made, library = CpuBackend(), Library(broken, error)
        made.library = lambda: library
        monkeypatch.setitem(registry._backends, "cpu", made)
        choice.forget()
        return made

    yield register
    choice.forget()


def remembered(folder) -> list:
    file = folder / trust.RECORD
    return json.loads(file.read_text()).get("cpu", []) if file.exists() else []


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_library_does_not_serve(backend, folder, capsys, op):
    backend(op)
    with pytest.warns(
        RuntimeWarning, match="backend 'cpu' is not used: its kernels compute wrong numbers.*pip install"
    ):
        explained = backends.explain(op)
    assert explained.chosen == "reference"
    assert f"{op} in float32 is off by" in explained.reasons["cpu"] and "pip install" in explained.reasons["cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        packed = torch.randn(1, AdapterLayout(8, 2).numel)
        ops.adapter(torch.randn(3, 8), packed, AdapterLayout(8, 2), "gelu_new")
        assert doctor.main([]) == 1
        with pytest.raises(RuntimeError, match="cannot serve .*wrong numbers"), backends.use_backend("cpu"):
            ops.adapter(torch.randn(3, 8), packed, AdapterLayout(8, 2), "gelu_new")
        with pytest.raises(RuntimeError, match="cannot serve .*wrong numbers"), backends.use_backend("cpu"):
            ops.rms_norm(torch.randn(3, 8), torch.ones(8))
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"backend cpu is not used: its kernels compute wrong numbers here ({op} in float32 is off by" in said
    assert "A live check FAILED." in said
    assert remembered(folder) == []


def test_kernels_that_raise_do_not_serve(backend):
    backend("fold", RuntimeError("illegal shape"))
    with pytest.warns(RuntimeWarning, match="do not run here .RuntimeError: illegal shape"):
        assert backends.explain().chosen == "reference"


def test_a_right_library_is_tested_once(backend, folder):
    first = backend()
    assert backends.explain().chosen == "cpu" and first.library().calls
    (kept,) = remembered(folder)
    assert torch.__version__ in kept and first.instruction_set() in kept
    again = backend()  # as in the next process
    assert backends.explain().chosen == "cpu" and not again.library().calls


@pytest.mark.parametrize("change", ["library", "torch", "cpu", "self-test", "damaged"])
def test_what_passed_elsewhere_counts_for_nothing(backend, folder, monkeypatch, change):
    backend()
    assert backends.explain().chosen == "cpu"
    if change == "library":
        with (folder / "_hf_cpu.so").open("ab") as file:
            file.write(b"\0")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "self-test":
        monkeypatch.setattr(trust, "_digest_of_the_test", lambda: "of another release")
    elif change == "cpu":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    else:
        (folder / trust.RECORD).write_text('{"cpu": 3}')
    again = backend()
    assert backends.explain().chosen == "cpu" and again.library().calls
    assert len(remembered(folder)) == (2 if change in ("torch", "cpu", "self-test") else 1)


def test_a_folder_that_cannot_be_written_costs_a_test_per_process(backend, folder, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(trust.tempfile, "NamedTemporaryFile", refuse)
    made = backend()
    assert backends.explain().chosen == "cpu"
    calls = made.library().calls
    backends.explain(dtype=torch.bfloat16)
    assert calls and made.library().calls == calls and remembered(folder) == []


def test_kernels_that_cannot_be_tested_now_do_not_serve_untested(backend, monkeypatch):
    """As while a CUDA graph is captured."""
    made = backend()
    monkeypatch.setattr(made, "testable", lambda: False)
    support = made.availability()
    assert not support and "have not been tested yet" in support.reason and "before the capture" in support.reason


def test_the_callers_modes_do_not_reach_the_test(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (torch.device("meta"), FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        (registry._backends["cpu"] if mode is None else backend("adapter_forward"))
        with mode, pytest.warns(RuntimeWarning, match="adapter_forward in float32 is off by 3"):
            assert backends.explain().chosen == "reference"


def test_the_tolerance_leaves_room():
    """A right library is nowhere near it, so that no machine's rounding takes it for a wrong one. Where a T5 rounds
    several times to 16 bits, the reference in this dtype is as far off, and a library no farther."""
    for dtype, tolerance in selftest.TOLERANCE.items():
        rounding = selftest.errors(ReferenceBackend(), dtype)
        for op, error in selftest.errors(CpuBackend(), dtype).items():
            assert error < max(tolerance / 4, 1.1 * rounding[op]), (op, dtype)
            assert error < tolerance / 3, (op, dtype)


def test_a_library_that_switches_subnormal_numbers_off_is_refused_and_they_are_on_again(monkeypatch):
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot switch them off")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: torch.set_flush_denormal(True))
    native._load.cache_clear()
    try:
        reason = native._load("cpu")
        assert "subnormal" in reason and "rebuild" in reason
        assert float("5e-324") * float("1") != 0
    finally:
        torch.set_flush_denormal(False)
        native._load.cache_clear()


def test_the_installed_package_remembers(tmp_path):
    """Through the package itself: a first process writes the file beside the library."""
    package = shutil.copytree(
        native._PACKAGE,
        tmp_path / "hyperformer_fast",
        ignore=shutil.ignore_patterns("__pycache__", "assets", trust.RECORD),
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from hyperformer_fast import backends as b, native;"
        "assert native.__file__.startswith(sys.argv[1]); print(b.explain().chosen)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "cpu", done.stderr
    assert len(json.loads((package / trust.RECORD).read_text())["cpu"]) == 1
