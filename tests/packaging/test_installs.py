"""Every way to install, for real: a copy of the sources, a virtual environment of its own, and a look at what came out.

Run by `make test-packaging`: minutes, and all but the offline cases ask the package index for setuptools, pip or uv.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.typed import check_types

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (
    ".git",
    ".venv*",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "build_info.json",
    ".editable",
    "live_check.json",
    ".hypothesis",
    ".*_cache",
    ".benchmarks",
)
#: Installed anew in each environment, so never taken from the running one.
OWN = (
    "pip",
    "setuptools",
    "_distutils_hack",
    "distutils-precedence.pth",
    "wheel",
    "hyperformer_fast",
    "__editable__",
    "uv",
)


@pytest.fixture
def sources(tmp_path) -> Path:
    copy = tmp_path / "sources"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # not a symbolic link: what pip removes here must stay there
    except OSError:
        shutil.copy2(source, target)


class Environment:
    """A virtual environment: with everything the running one has (``full``), or empty."""

    def __init__(self, folder: Path, full: bool):
        venv.create(folder, with_pip=True)
        self.folder, self.bin, self.python = folder, folder / "bin", folder / "bin/python"
        self.environ = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HYPERFORMER_FAST") and k not in ("PYTHONPATH", "CXX", "CXXFLAGS")
        }
        self.environ |= {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(folder),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        if full:
            for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
                if entry.name.startswith(OWN):
                    continue
                if entry.is_dir():
                    shutil.copytree(entry, self.site / entry.name, copy_function=link, dirs_exist_ok=True)
                else:
                    link(str(entry), str(self.site / entry.name))

    def run(self, *command: object, ok: bool = True, cwd: Path | None = None, **environ: str) -> str:
        """Standard output and error of a command; an assertion where it fails and should not, or the reverse."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env={**self.environ, **environ},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert (done.returncode == 0) == ok, done.stdout
        return done.stdout

    def pip(self, *arguments: object, **options) -> str:
        return self.run(self.python, "-m", "pip", *arguments, **options)

    def offline_tools(self) -> None:
        """setuptools and wheel, for builds without isolation, from the running environment and no index."""
        tools = ("setuptools", "_distutils_hack", "wheel")
        for entry in self.site.iterdir():
            if entry.name.startswith(tools):
                shutil.rmtree(entry)
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if entry.name.startswith(tools):
                shutil.copytree(entry, self.site / entry.name, copy_function=link)

    def doctor(self, **environ: str) -> dict:
        """The doctor's report, from a folder that is not the sources'."""
        words = self.run(self.python, "-W", "ignore", "-m", "hyperformer_fast", "doctor", "--json", **environ)
        return json.loads(words[words.index("{") :])


@pytest.fixture
def full(tmp_path) -> Environment:
    return Environment(tmp_path / "full", full=True)


@pytest.fixture
def empty(tmp_path) -> Environment:
    return Environment(tmp_path / "empty", full=False)


def no_compilers(environment: Environment) -> str:
    """A PATH with the environment's own programs alone."""
    return str(environment.bin)


def check_works(environment: Environment, built: bool = True) -> dict:
    report = environment.doctor()
    cpu = report["native"]["cpu"]
    assert report["ok"] and cpu["built"] == cpu["loaded"] == built and not cpu["stale"], report
    assert built == (report["problems"] == [])
    if built:
        assert report["build_info"]["torch"].split("+")[0] == report["versions"]["torch"].split("+")[0]
    code = "import importlib.util as u, hyperformer_fast.kernels as k; print(list(k.__path__), u.find_spec('kernels'))"
    words = environment.run(environment.python, "-c", code)
    assert "hyperformer_fast/kernels" in words and words.strip().endswith("None")
    return report


@pytest.mark.parametrize("pip", ["<24", ">=26"])
def test_editable_beside_a_torch(sources, full, pip):
    """Isolated, as plain `pip install -e .` is; it must use the torch that is there, and fetch none."""
    full.pip("install", "-q", f"pip{pip}")
    words = full.pip("install", "-v", "-e", sources)
    assert "Collecting torch" not in words and "Downloading torch" not in words
    check_works(full)
    assert (sources / "hyperformer_fast/_hf_cpu.so").exists()
    assert (full.bin / "hyperformer-fast").exists()


@pytest.mark.parametrize("pip", ["<24", ">=26"])
def test_editable_in_an_empty_environment(sources, empty, pip, tmp_path):
    """The build asks for the very torch that is installed next; held to the running version, for its size."""
    import torch

    empty.pip("install", "-q", f"pip{pip}")
    constraint = tmp_path / "constraints.txt"
    constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    # pip 25.3 and later hold build environments to a variable of their own
    empty.pip("install", "-e", sources, PIP_CONSTRAINT=str(constraint), PIP_BUILD_CONSTRAINT=str(constraint))
    assert check_works(empty)["build_info"]["torch"] == torch.__version__


@pytest.mark.parametrize("pip", ["<24", ">=26"])
def test_editable_offline(sources, full, pip):
    full.pip("install", "-q", f"pip{pip}")
    full.offline_tools()
    full.pip("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources, PIP_FIND_LINKS="")
    check_works(full)
    check_types(full.python, full.folder, full.folder / "mypy")
    unit = sources / "csrc/cpu/dispatch.cpp"
    unit.write_text(unit.read_text() + "\n// changed\n")
    objects = {path: path.stat().st_mtime_ns for path in (sources / "build/objects").rglob("*.o")}
    report = full.doctor()
    assert report["native"]["cpu"]["stale"] and "changed since its build" in report["problems"][0]
    full.run("/bin/sh", "-c", report["problems"][0].split("To rebuild: ")[1])
    check_works(full)
    if shutil.which("ninja", path=full.environ["PATH"]):  # pip's temporary folder does not lose what was compiled
        (anew,) = [path for path, before in objects.items() if path.stat().st_mtime_ns != before]
        assert len(objects) > 2 and "dispatch" in anew.name


def test_editable_with_the_setuptools_of_a_bare_environment(sources, full):
    """Python 3.11's venv comes with setuptools 65, which leaves the wheel to the package of that name."""
    full.pip("install", "-q", "setuptools==65.5.0", "wheel")
    full.pip("install", "--no-build-isolation", "--no-deps", "-e", sources)
    check_works(full)


@pytest.mark.parametrize("more", [(), ("--no-deps", "--offline")], ids=["dependencies", "offline"])
def test_uv(sources, full, more):
    """Without isolation: uv's isolated builds cannot see the environment they build for, and fetch a torch."""
    full.pip("install", "-q", "uv")
    full.offline_tools()
    full.run(full.bin / "uv", "pip", "install", "--no-build-isolation", *more, "-e", sources)
    check_works(full)


def test_wheel(sources, full, empty, tmp_path):
    full.offline_tools()
    out = tmp_path / "wheels"
    full.pip("wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, sources)
    (wheel,) = out.iterdir()
    assert wheel.name.startswith("hyperformer_fast-") and "-py3-none-linux" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"hyperformer_fast/{name}" for name in ("_hf_cpu.so", "build_info.json", "kernels/README.md", "backends/cpu.py")
    } <= names
    packaged = {
        str(path.relative_to(sources)) for path in (sources / "hyperformer_fast/assets").rglob("*") if path.is_file()
    }
    assert packaged <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hyperformer_fast"}
    assert not [name for name in names if "__pycache__" in name]
    full.pip("install", "--no-index", "--no-deps", wheel)
    shutil.rmtree(sources)
    check_works(full)
    check_types(full.python, full.folder, full.folder / "mypy")


def test_wheel_from_a_source_distribution(sources, full, tmp_path):
    full.offline_tools()
    full.run(full.python, "setup.py", "-q", "sdist", "-d", tmp_path / "sdist", cwd=sources)
    (archive,) = (tmp_path / "sdist").iterdir()
    full.pip("install", "--no-index", "--no-build-isolation", "--no-deps", archive)
    check_works(full)


def test_a_wheel_takes_no_library_from_an_earlier_build(sources, full, tmp_path):
    full.offline_tools()
    full.pip("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    assert (sources / "hyperformer_fast/_hf_cpu.so").exists()
    flags = ("-q", "--no-build-isolation", "--no-deps", "-w", tmp_path / "wheels")
    full.pip("wheel", *flags, sources, HYPERFORMER_FAST_BUILD="none")
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert "-py3-none-any" in wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_no_compiler(sources, full):
    """Pure Python, one clear line at the build, one warning at the import, and everything works."""
    full.offline_tools()
    words = full.pip(
        "install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources, PATH=no_compilers(full)
    )
    lines = [line for line in words.splitlines() if "hyperformer_fast: no kernels, pure Python" in line]
    assert len(lines) == 1 and "no C++ compiler found" in lines[0]
    report = check_works(full, built=False)
    assert "no C++ compiler found" in report["problems"][0] and "pip install" in report["problems"][0]
    # Installed again with a compiler, it has them; and again without, it loses them.
    full.pip("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    check_works(full)
    full.pip("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources, HYPERFORMER_FAST_BUILD="none")
    report = full.doctor()
    assert not report["native"]["cpu"]["loaded"] and report["problems"] == [] and report["ok"]
    assert not (sources / "hyperformer_fast/_hf_cpu.so").exists()


def test_neither_torch_nor_compiler(sources, empty):
    empty.offline_tools()
    words = empty.pip(
        "install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources, PATH=no_compilers(empty)
    )
    lines = [line for line in words.splitlines() if "hyperformer_fast: no kernels, pure Python" in line]
    assert len(lines) == 1 and "no torch" in lines[0]
    empty.run(empty.python, "-c", "import hyperformer_fast.kernels")


def test_isolated_and_without_a_compiler_no_torch_is_fetched(sources, empty):
    words = empty.pip("install", "-v", "--no-deps", "-e", sources, PATH=no_compilers(empty))
    assert "Collecting torch" not in words and words.count("hyperformer_fast: no kernels, pure Python") == 1


@pytest.mark.parametrize(
    "mode, words", [("cpu", "no C++ compiler found"), ("cuda", "no "), ("all", "no "), ("fast", "got 'fast'")]
)
def test_an_explicit_build_that_cannot_be_met_is_an_error(sources, full, mode, words):
    full.offline_tools()
    install = ("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    out = full.pip(*install, ok=False, PATH=no_compilers(full), HYPERFORMER_FAST_BUILD=mode)
    assert "HYPERFORMER_FAST_BUILD" in out and words in out


def test_a_cxx_that_names_no_compiler_is_an_error(sources, full):
    """Somebody who sets CXX does not mean a package without kernels."""
    full.offline_tools()
    install = ("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    out = full.pip(*install, ok=False, CXX="no-such-compiler -pthread")
    assert "CXX='no-such-compiler -pthread'" in out and "correct it or unset it" in out


def test_flags_that_would_change_the_arithmetic_at_the_link_are_an_error(sources, full):
    full.offline_tools()
    install = ("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    assert "remove -ffast-math" in full.pip(*install, ok=False, LDFLAGS="-ffast-math")


def test_sources_that_do_not_compile(sources, full):
    full.offline_tools()
    (sources / "csrc/cpu/isa/fold-inl.h").write_text("#error broken on purpose\n")
    install = ("install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    words = full.pip(*install)
    line = next(line for line in words.splitlines() if "hyperformer_fast: no kernels, pure Python" in line)
    assert "broken on purpose" in line
    check_works(full, built=False)
    assert "broken on purpose" in full.pip(*install, ok=False, HYPERFORMER_FAST_BUILD="cpu")


def test_flags_from_the_environment(sources, full):
    full.offline_tools()
    install = ("install", "--no-index", "--no-build-isolation", "--no-deps", "-e", sources)
    full.pip(
        *install,
        CXX=f"{shutil.which('g++') or 'c++'} -pthread",
        CXXFLAGS="-g1 -DHF_TRIED -Ofast",
        MAX_JOBS="1",
        HYPERFORMER_FAST_BUILD="cpu",
    )
    report = check_works(full)
    flags = report["build_info"]["libraries"]["cpu"]["flags"]
    tried, undone = flags.index("-g1"), flags.index("-fno-fast-math")
    assert flags[tried : tried + 3] == ["-g1", "-DHF_TRIED", "-O3"] and tried < undone
    assert [entry["available"] for entry in report["backends"] if entry["name"] == "cpu"] == [True]
