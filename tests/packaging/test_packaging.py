"""build_tools, piece by piece, and what the project's own files promise each other."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    for name in (
        "HYPERFORMER_FAST_BUILD",
        "CXX",
        "CXXFLAGS",
        "LDFLAGS",
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
        "CUDA_HOME",
        "CUDA_PATH",
        "MAX_JOBS",
        "TORCH_CUDA_ARCH_LIST",
    ):
        monkeypatch.delenv(name, raising=False)


def tool(name: str):
    return importlib.import_module(name)


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def fake_torch(folder: Path, version="2.13.0+cu130", cuda="cuda: Optional[str] = '13.0'", headers=True) -> Path:
    root = folder / "torch"
    (root / "include/torch/csrc/stable").mkdir(parents=True)
    if headers:
        (root / "include/torch/csrc/stable/library.h").touch()
    (root / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\n{cuda}\nhip: Optional[str] = None\n"
    )
    return root


@pytest.mark.parametrize(
    "line, cuda",
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda = '12.9'", "12.9"),
        ("cuda: Optional[str] = None", None),
        ("cuda = None", None),
    ],
)
def test_find_torch_reads_the_version(tmp_path, line, cuda):
    root = fake_torch(tmp_path, cuda=line)
    assert tool("find_torch").find_torch([tmp_path / "absent", root]) == (root, "2.13.0+cu130", cuda)


def test_find_torch_wants_headers(tmp_path):
    assert tool("find_torch").find_torch([fake_torch(tmp_path, headers=False)]) is None
    assert tool("find_torch").find_torch([]) is None


def test_find_torch_finds_the_running_one():
    import torch

    found = tool("find_torch").find_torch()
    assert (
        found.version == torch.__version__
        and found.cuda == torch.version.cuda
        and found.root == Path(torch.__file__).parent
    )


def test_modes():
    plan = tool("plan")
    assert plan.requested_mode({}) == plan.requested_mode({"HYPERFORMER_FAST_BUILD": " "}) == "auto"
    assert plan.requested_mode({"HYPERFORMER_FAST_BUILD": "CPU"}) == "cpu"
    with pytest.raises(plan.BuildError, match="auto, cpu, cuda, all, none, got 'fast'"):
        plan.requested_mode({"HYPERFORMER_FAST_BUILD": "fast"})


HAVE = {"torch": True, "torch_cuda": True, "cxx": True, "nvcc": True, "sources": True}


def plan_with(mode: str, **lacks):
    have = {**HAVE, **lacks}
    Torch = tool("find_torch").Torch
    torch = Torch(Path("/t"), "2.13.0", "13.0" if have["torch_cuda"] else None) if have["torch"] else None
    cxx, home = ["g++"] if have["cxx"] else None, Path("/cuda") if have["nvcc"] else None
    return tool("plan").make_plan(mode, torch, cxx, home, have["sources"])


@pytest.mark.parametrize(
    "mode, lacks, build, cpu, cuda",
    [
        ("auto", {}, ("cpu", "cuda", "autograd"), None, None),
        ("auto", {"torch_cuda": False}, ("cpu", "autograd"), None, "build without CUDA"),
        ("auto", {"nvcc": False}, ("cpu", "autograd"), None, "nvcc"),
        ("auto", {"sources": False}, ("cpu", "autograd"), None, "no CUDA sources"),
        ("auto", {"cxx": False}, (), "no C++ compiler", "no C++ compiler"),
        ("auto", {"torch": False}, (), "no torch", "no torch"),
        ("cpu", {"nvcc": False, "sources": False}, ("cpu", "autograd"), None, "HYPERFORMER_FAST_BUILD=cpu"),
        ("cuda", {"torch_cuda": False}, ("cuda", "autograd"), "HYPERFORMER_FAST_BUILD=cuda", None),
        ("all", {"torch_cuda": False}, ("cpu", "cuda", "autograd"), None, None),
        ("none", {}, (), "HYPERFORMER_FAST_BUILD=none", "HYPERFORMER_FAST_BUILD=none"),
        ("none", {"torch": False, "cxx": False}, (), "HYPERFORMER_FAST_BUILD=none", "HYPERFORMER_FAST_BUILD=none"),
    ],
)
def test_plan(mode, lacks, build, cpu, cuda):
    plan = plan_with(mode, **lacks)
    assert plan.build == build
    for name, words in (("cpu", cpu), ("cuda", cuda)):
        assert (name in plan.reasons) == (words is not None) == (name not in plan.build)
        assert words is None or words in plan.reasons[name]


@pytest.mark.parametrize(
    "mode, lacks, words",
    [
        ("cpu", {"cxx": False}, "set CXX"),
        ("cpu", {"torch": False}, "pip install"),
        ("cuda", {"nvcc": False}, "CUDA_HOME"),
        ("cuda", {"sources": False}, "csrc/cuda"),
        ("all", {"sources": False}, "csrc/cuda"),
        ("all", {"cxx": False}, "set CXX"),
    ],
)
def test_an_explicit_mode_that_cannot_be_met(mode, lacks, words):
    with pytest.raises(tool("plan").BuildError, match=f"HYPERFORMER_FAST_BUILD={mode} cannot be met") as error:
        plan_with(mode, **lacks)
    assert words in str(error.value)


def test_find_cxx(tmp_path):
    find = tool("toolchain").find_cxx
    assert find({"PATH": str(tmp_path)}) is None
    executable(tmp_path / "clang++")
    assert find({"PATH": str(tmp_path)}) == ["clang++"]
    executable(tmp_path / "g++")
    assert find({"PATH": str(tmp_path)}) == ["g++"]


@pytest.mark.parametrize(
    "cxx, command, host, flags",
    [
        ("g++", ["g++"], "g++", []),
        (" g++ -pthread -m64 ", ["g++", "-pthread", "-m64"], "g++", ["-pthread", "-m64"]),
        ("launcher g++", ["launcher", "g++"], "g++", []),
        ("launcher g++ -pthread", ["launcher", "g++", "-pthread"], "g++", ["-pthread"]),
        ("launcher c++-of-its-own", ["launcher", "c++-of-its-own"], "launcher", []),
        ("g++ '-DNAME=two words'", ["g++", "-DNAME=two words"], "g++", ["-DNAME=two words"]),
        ("with space/g++", ["with space/g++"], "with space/g++", []),
        ("'with space/g++' -pthread", ["with space/g++", "-pthread"], "with space/g++", ["-pthread"]),
    ],
)
def test_the_compiler_in_cxx(tmp_path, monkeypatch, cxx, command, host, flags):
    toolchain = tool("toolchain")
    for name in ("g++", "launcher", "with space/g++"):
        executable(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_cxx({"PATH": str(tmp_path), "CXX": cxx}) == command
    assert toolchain.compiler_and_flags(command) == (host, flags)


@pytest.mark.parametrize("cxx", ["icpx", "icpx -pthread", "launcher icpx", "'g++", "failing", "failing -O2"])
def test_a_cxx_that_names_no_compiler_is_an_error(tmp_path, monkeypatch, cxx):
    """Not a package without kernels and exit status 0."""
    executable(tmp_path / "g++")
    executable(tmp_path / "launcher").write_text('#!/bin/sh\nexec "$@"\n')
    executable(tmp_path / "failing").write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(tool("plan").BuildError, match="CXX=.*correct it or unset it") as error:
        tool("native_build").build_libraries(tmp_path / "out", tmp_path / "objects")
    assert repr(cxx) in str(error.value) and "failing" not in cxx or "no such target" in str(error.value)
    monkeypatch.setenv("HYPERFORMER_FAST_BUILD", "none")
    assert tool("native_build").build_libraries(tmp_path / "out")["libraries"] == {}


def test_cuda_home_needs_compiler_and_headers(tmp_path, monkeypatch):
    toolchain = tool("toolchain")
    wrapper = executable(tmp_path / "wrapper/bin/nvcc")
    home = executable(tmp_path / "cuda/bin/nvcc").parents[1]
    (home / "include").mkdir()
    assert toolchain.find_cuda_home({"PATH": str(wrapper.parent), "CUDA_HOME": str(home)}) != home
    (home / "include/cuda_runtime.h").touch()
    assert toolchain.find_cuda_home({"PATH": str(wrapper.parent), "CUDA_HOME": str(home)}) == home
    assert toolchain.find_cuda_home({"PATH": "", "CUDA_PATH": str(home)}) == home


def test_arch_flags():
    toolchain = tool("toolchain")
    assert toolchain.arch_flags("8.0;9.0+PTX") == [
        "-gencode",
        "arch=compute_80,code=sm_80",
        "-gencode",
        "arch=compute_90,code=sm_90",
        "-gencode",
        "arch=compute_90,code=compute_90",
    ]
    assert toolchain.arch_flags("8.0 9.0a") == toolchain.arch_flags("8.0;9.0a")
    assert toolchain.arch_flags("7.5;8.0") == toolchain.arch_flags("8.0")
    with pytest.raises(tool("plan").BuildError, match="8.0 or later, got '7.0;7.5'"):
        toolchain.arch_flags("7.0;7.5")
    with pytest.raises(tool("plan").BuildError, match="'Ampere' in '8.0;Ampere'"):
        toolchain.arch_flags("8.0;Ampere")


def test_max_jobs():
    toolchain = tool("toolchain")
    assert toolchain.max_jobs({"MAX_JOBS": "3"}) == 3 and toolchain.max_jobs({}) == os.cpu_count()
    for bad in ("0", "-1", "many"):
        with pytest.raises(tool("plan").BuildError, match=f"MAX_JOBS .* got '{bad}'"):
            toolchain.max_jobs({"MAX_JOBS": bad})


def test_the_default_build_is_portable():
    toolchain = tool("toolchain")
    flags = toolchain.CXX_FLAGS + toolchain.NVCC_FLAGS
    assert not [flag for flag in flags if "march" in flag or "fast-math" in flag or "fast_math" in flag]
    assert toolchain.TARGET == "-DTORCH_TARGET_VERSION=0x020b000000000000" and toolchain.TARGET in toolchain.NVCC_FLAGS


def dependencies() -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
    return {r.name: r for r in map(Requirement, re.findall(r'"([^"]+)"', listed))}


def test_the_backend_asks_for_the_packages_own_torch(monkeypatch):
    backend = tool("hf_build_backend")
    assert Requirement(backend.torch_requirement()) == dependencies()["torch"]
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "find_cxx", lambda: ["g++"])
    monkeypatch.setattr(backend, "find_ninja", lambda: None)
    # setuptools' own hooks would run setup.py here, and leave an egg-info folder
    for name in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(backend._setuptools, name, lambda config_settings=None: [])
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert hook() == [backend.torch_requirement(), "ninja"]


@pytest.mark.parametrize(
    "mode, torch, cxx, ninja, asks",
    [
        ("auto", True, True, True, []),
        ("auto", True, True, False, ["ninja"]),
        ("auto", False, True, True, ["torch"]),
        ("auto", False, False, False, []),
        ("none", False, True, False, []),
        ("cpu", False, False, False, ["torch", "ninja"]),
    ],
)
def test_what_the_backend_asks_for(monkeypatch, mode, torch, cxx, ninja, asks):
    backend = tool("hf_build_backend")
    monkeypatch.setenv("HYPERFORMER_FAST_BUILD", mode)
    for name, there in (("find_torch", torch), ("find_cxx", cxx), ("find_ninja", ninja)):
        monkeypatch.setattr(backend, name, lambda there=there: there)
    assert [Requirement(text).name for text in backend.native_requirements()] == asks


def test_the_backend_leaves_it_to_the_build_to_name_a_wrong_setting(monkeypatch):
    backend = tool("hf_build_backend")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert backend.native_requirements() == []
    monkeypatch.setenv("HYPERFORMER_FAST_BUILD", "fast")
    assert backend.native_requirements() == []


def test_torch_is_not_a_static_build_requirement():
    build_system = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in re.search(r"^requires = (.*)$", build_system, re.M)[1]


@pytest.mark.parametrize("change", ["content", "name", "new header", "layout.h"])
def test_the_source_hash_sees_every_change(tmp_path, change):
    import shutil

    from hyperformer_fast._sources import source_files, source_hash

    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    before = source_hash(csrc, "cpu")
    assert before == source_hash(ROOT / "csrc", "cpu")
    fold = csrc / "cpu/isa/fold-inl.h"
    assert fold in source_files(csrc, "cpu")
    if change == "content":
        fold.write_text(fold.read_text().replace("0.0", "0.1", 1))
    elif change == "name":
        fold.rename(fold.with_name("fold2-inl.h"))
    elif change == "new header":
        (csrc / "cpu/new.h").touch()
    else:
        (csrc / "layout.h").write_text("")
    assert source_hash(csrc, "cpu") != before


def test_only_the_bindings_include_torch():
    """Kernel files with torch's headers would take it 6 s each to compile, and could not run in the emulator."""
    csrc = ROOT / "csrc"
    sources = [path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    including = {path for path in sources if re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text())}
    assert including == {csrc / name for name in ("cuda/call.h", "tensors.h", "autograd/adapter.cpp")}


def locked(name: str) -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line.startswith("-r "):
            pins |= locked(line[3:])
        elif line and not line.startswith("#"):
            package, version = line.split("==")
            pins[package.lower().replace("_", "-")] = version
    return pins


@pytest.mark.parametrize("name", ["lock.txt", "lock-transformers4.txt"])
def test_the_locks_pin_what_the_package_asks_for(name):
    pins = locked(name)
    for requirement in dependencies().values():
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert pins["transformers"].startswith("4.57." if "4" in name else "5.")
    assert pins["torch"] == locked("common.txt")["torch"]
    assert "ninja" in pins
