"""What is compiled anew after which edit, with ninja and without."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_tools"))
import ninja_build  # noqa: E402
from plan import BuildError  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
with_ninja = pytest.mark.skipif(ninja_build.find_ninja() is None, reason="needs ninja")


class Project:
    """one.cpp and two.cpp, of which two.cpp reads number.h; a compiler that counts its calls."""

    def __init__(self, folder: Path):
        self.folder, self.cache = folder / "sources", folder / "objects"
        self.folder.mkdir()
        self.one, self.two, self.header = (self.folder / name for name in ("one.cpp", "two.cpp", "number.h"))
        self.one.write_text('extern "C" int one() { return 1; }\n')
        self.two.write_text('#include "number.h"\nextern "C" int two() { return NUMBER; }\n')
        self.header.write_text("#define NUMBER 2\n")
        # A file for each call, because two at once would mix their words in one.
        self.calls = folder / "calls"
        self.calls.mkdir()
        self.compiler = folder / "counting g++"
        self.compiler.write_text(f"#!/bin/sh\nprintf '%s|' \"$@\" > '{self.calls}'/$$\nexec g++ \"$@\"\n")
        self.compiler.chmod(0o755)

    def build(self, *flags: str, jobs: int = 2, facts: tuple[str, ...] = ()) -> list[str]:
        """The sources that were compiled anew, and "link"."""
        for call in self.calls.iterdir():
            call.unlink()
        units = [ninja_build.Unit(source, [str(self.compiler), "-fPIC", *flags]) for source in (self.one, self.two)]
        link = ninja_build.Link([str(self.compiler), "-shared"], [])
        inputs = [self.one, self.two, self.header]
        self.library = ninja_build.build_library("small", units, link, inputs, facts, jobs, self.cache)
        calls = [call.read_text().split("|") for call in self.calls.iterdir()]
        return sorted("link" if "-shared" in call else Path(call[call.index("-c") + 1]).name for call in calls)

    def two_says(self) -> int:
        code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).two())"  # a process holds on to what it loaded
        return int(subprocess.check_output([sys.executable, "-c", code, str(self.library)]))


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "a place"  # with a space
    folder.mkdir()
    return Project(folder)


@pytest.fixture
def no_ninja(monkeypatch):
    monkeypatch.setattr(ninja_build, "find_ninja", lambda: None)


EVERYTHING = ["link", "one.cpp", "two.cpp"]


@with_ninja
def test_what_an_edit_compiles(project):
    assert project.build() == EVERYTHING and project.build() == []
    project.one.write_text(project.one.read_text() + "// more\n")
    assert project.build() == ["link", "one.cpp"]
    project.header.write_text("#define NUMBER 3\n")
    assert project.build() == ["link", "two.cpp"] and project.two_says() == 3
    assert ctypes.CDLL(str(project.library)).one() == 1


@with_ninja
def test_a_new_content_with_an_old_time_is_seen(project):
    """As an unpacked archive, or a copy that keeps times, leaves it."""
    project.build()
    old = project.header.stat().st_mtime_ns - 10**12
    project.header.write_text("#define NUMBER 4\n")
    os.utime(project.header, ns=(old, old))
    assert project.build() == EVERYTHING and project.two_says() == 4
    assert project.build() == []


@with_ninja
@pytest.mark.parametrize("variable", ["CPATH", "NVCC_APPEND_FLAGS"])
def test_each_configuration_keeps_its_objects(project, monkeypatch, variable):
    assert project.build() == project.build("-DOTHER") == project.build(facts=("torch 9",)) == EVERYTHING
    monkeypatch.setenv(variable, "")
    assert project.build() == project.build("-DOTHER") == project.build(facts=("torch 9",)) == []
    monkeypatch.setenv(variable, "/nowhere" if variable == "CPATH" else "-lineinfo")
    assert project.build() == EVERYTHING


@pytest.mark.parametrize("ninja", [pytest.param(True, marks=with_ninja), False])
def test_a_failing_compiler_is_quoted_and_leaves_no_library(project, ninja, request):
    if not ninja:
        request.getfixturevalue("no_ninja")
    project.build()
    good = project.header.read_text()
    project.header.write_text("#error broken on purpose\n")
    for _ in range(2):
        with pytest.raises(BuildError, match=r"counting g\+\+ failed: .*number.h:1:2: error: #error broken on purpose"):
            project.build()
    assert not project.library.exists()
    project.header.write_text(good)
    assert "two.cpp" in project.build() and project.two_says() == 2


def test_without_ninja_it_says_so_and_compiles(project, no_ninja, capfd):
    assert project.build() == EVERYTHING and project.two_says() == 2
    assert capfd.readouterr().err.count("no ninja found (pip install ninja)") == 1
    assert project.build() == []
    project.header.write_text("#define NUMBER 5\n")
    assert project.build() == EVERYTHING and project.two_says() == 5


@with_ninja
def test_ninja_takes_over_what_was_built_without_and_back(project, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(ninja_build, "find_ninja", lambda: None)
        project.build()
    project.header.write_text("#define NUMBER 6\n")
    assert "two.cpp" in project.build() and project.two_says() == 6
    monkeypatch.setattr(ninja_build, "find_ninja", lambda: None)
    project.header.write_text("#define NUMBER 7\n")
    assert project.build() == EVERYTHING and project.two_says() == 7


@with_ninja
def test_the_number_of_jobs_and_the_lock_are_handed_on(project, monkeypatch, tmp_path):
    """The lock, so that a ninja whose build was killed still keeps the next build out of its folder."""
    stand_in = tmp_path / "ninja"
    record = f'echo "$@" > {tmp_path}/arguments; readlink /proc/$$/fd/* > {tmp_path}/open'
    stand_in.write_text(f'#!/bin/sh\n{record}\nexec {ninja_build.find_ninja()} "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(ninja_build, "find_ninja", lambda: str(stand_in))
    project.build(jobs=7)
    assert (tmp_path / "arguments").read_text().split() == ["-j", "7"]
    assert str(project.library.parent / "lock") in (tmp_path / "open").read_text().splitlines()


def test_ninja_is_found_beside_the_interpreter_and_on_path(tmp_path, monkeypatch):
    """pip without isolation does not put the environment's programs on PATH."""
    monkeypatch.setattr(ninja_build.sysconfig, "get_path", lambda name: str(tmp_path / "environment"))
    monkeypatch.setattr(ninja_build.sys, "executable", str(tmp_path / "environment/python"))
    for folder in ("environment", "elsewhere"):
        (tmp_path / folder).mkdir()
    assert ninja_build.find_ninja({"PATH": str(tmp_path / "elsewhere")}) is None
    for folder in ("elsewhere", "environment"):
        program = tmp_path / folder / "ninja"
        program.touch(0o755)
        assert ninja_build.find_ninja({"PATH": str(tmp_path / "elsewhere")}) == str(program)


@with_ninja
def test_the_builds_own_commands_tell_ninja_what_they_read(tmp_path):
    from find_torch import find_torch
    from toolchain import Compiler

    compiler = Compiler(find_torch(), ["g++"])
    for name in ("unit.cpp", "used.h"):
        (tmp_path / name).write_text("" if name == "used.h" else '#include "used.h"\n')
    inputs = [tmp_path / "unit.cpp", tmp_path / "used.h"]
    made = compiler.build("probe", inputs, tmp_path / "objects")
    before = made.stat().st_mtime_ns
    assert compiler.build("probe", inputs, tmp_path / "objects").stat().st_mtime_ns == before
    (tmp_path / "used.h").write_text("inline int used() { return 1; }\n")
    assert compiler.build("probe", inputs, tmp_path / "objects").stat().st_mtime_ns > before
