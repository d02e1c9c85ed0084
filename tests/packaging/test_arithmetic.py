"""Flags under which the kernels would compute other numbers: undone, refused, or found out."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FAST = [
    "-Ofast",
    "-ffast-math",
    "-funsafe-math-optimizations",
    "-ffinite-math-only",
    "-freciprocal-math",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
    "-O1 -ffast-math -O2",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    monkeypatch.setenv("CXX", "g++")
    for name in ("CXXFLAGS", "LDFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def tool(name: str):
    return importlib.import_module(name)


def compiler(cuda: bool = False):
    toolchain = tool("toolchain")
    return toolchain.Compiler(
        tool("find_torch").find_torch(), toolchain.find_cxx(), toolchain.find_cuda_home() if cuda else None
    )


SOURCE = """
#pragma GCC visibility push(default)
extern "C" int is_nan(float x) { return x != x; }
extern "C" float third(float x) { return x / 3.0f; }
extern "C" float cancelled(float large, float small) { return (small + large) - large; }
"""


@pytest.mark.parametrize("variable, flags", [*(("CXXFLAGS", flags) for flags in FAST), ("CXX", "g++ -Ofast")])
def test_a_users_flags_do_not_change_the_arithmetic(tmp_path, monkeypatch, flags, variable):
    monkeypatch.setenv(variable, flags)
    source = tmp_path / "small.cpp"
    source.write_text(SOURCE)
    library = ctypes.CDLL(str(compiler().build("small", [source], tmp_path / "objects")))
    library.third.restype = library.cancelled.restype = ctypes.c_float
    library.is_nan.argtypes, library.third.argtypes = [ctypes.c_float], [ctypes.c_float]
    library.cancelled.argtypes = [ctypes.c_float] * 2
    assert library.is_nan(float("nan")) == 1
    assert library.third(5.0) == ctypes.c_float(5 / 3).value
    assert library.cancelled(2.0**24, 1.5) == 2.0
    assert float("5e-324") * float("1") != 0  # the library's start-up code left subnormal numbers on


@pytest.mark.parametrize("flags", FAST)
def test_sources_refuse_what_is_still_on(flags):
    command = ["g++", *flags.split(), "-include", str(ROOT / "csrc/require_ieee.h"), "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    assert done.returncode and "the kernels need IEEE arithmetic" in done.stderr
    done = subprocess.run([command[0], "-O3", *command[-6:]], input="", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable, value", [("LDFLAGS", "-ffast-math"), ("CXX", "g++ -funsafe-math-optimizations")])
def test_start_up_code_that_switches_subnormal_numbers_off_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(tool("plan").BuildError, match="subnormal numbers off.*remove -ffast-math"):
        compiler()


@pytest.mark.parametrize(
    "variable, flags",
    [
        ("NVCC_PREPEND_FLAGS", "--use_fast_math"),
        ("NVCC_APPEND_FLAGS", "-use_fast_math"),
        ("NVCC_APPEND_FLAGS", "-ftz=true"),
        ("NVCC_APPEND_FLAGS", "--prec-div=false"),
        ("NVCC_APPEND_FLAGS", "-prec-sqrt=false"),
    ],
)
def test_nvccs_fast_flags_are_refused(monkeypatch, variable, flags):
    if tool("toolchain").find_cuda_home() is None:
        pytest.skip("needs a CUDA toolkit with nvcc")
    monkeypatch.setenv(variable, "-lineinfo")
    compiler(cuda=True)
    monkeypatch.setenv(variable, flags)
    with pytest.raises(tool("plan").BuildError, match="IEEE arithmetic off.*NVCC_PREPEND_FLAGS and NVCC_APPEND_FLAGS"):
        compiler(cuda=True)


def test_every_unit_is_compiled_with_the_check():
    made = compiler()
    assert made.cxx_flags[-2:] == ["-include", str(ROOT / "csrc/require_ieee.h")]
    for library in ("cpu", "cuda"):
        from hyperformer_fast._sources import source_files

        assert ROOT / "csrc/require_ieee.h" in source_files(ROOT / "csrc", library)
