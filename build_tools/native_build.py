"""setuptools' commands: build_ext that makes the libraries, and the wheel's tag."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import sys
from pathlib import Path

from find_torch import find_torch
from ninja_build import CACHE
from plan import BuildError, make_plan, requested_mode
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError
from toolchain import Compiler, find_cuda_home, find_cxx

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = "hyperformer_fast"
INFO = "build_info.json"
#: Where the package remembers that the libraries were tested; empty here, so that an uninstall removes it.
RECORD = "live_check.json"

#: A placeholder, so that setuptools runs build_ext; what is built is decided there.
EXTENSION = Extension(f"{PACKAGE}._hf_cpu", sources=[])


def _load_sources():
    # By path: importing the package would import torch.
    spec = importlib.util.spec_from_file_location("_hf_sources", ROOT / PACKAGE / "_sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sources = _load_sources()


def say(message: str) -> None:
    print(f"hyperformer_fast: {message}", file=sys.stderr, flush=True)


def build_libraries(out: Path, objects: Path = CACHE) -> dict:
    """Make what HYPERFORMER_FAST_BUILD asks for in the folder ``out``, with build_info.json; returns its content.

    ``objects`` is the folder of the object cache.

    BuildError where an explicit request cannot be met. In auto mode a failed compilation leaves a pure-Python install.
    """
    mode, torch, cuda_home = requested_mode(), find_torch(), find_cuda_home()
    cxx = find_cxx() if mode != "none" else None
    cuda_sources = [path for path in sources.source_files(CSRC, "cuda") if path.suffix == ".cu"]
    plan = make_plan(mode, torch, cxx, cuda_home, bool(cuda_sources))
    info = {
        "mode": mode,
        "torch": torch.version if torch else None,
        "torch_cuda": torch.cuda if torch else None,
        "machine": platform.machine(),
        "libraries": {},
        "not_built": dict(plan.reasons),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in sources.PATTERNS:
        library = out / f"_hf_{name}.so"
        library.unlink(missing_ok=True)  # one of an earlier build may lie in the same folder
        if name not in plan.build:
            continue
        compiler = Compiler(torch, cxx, cuda_home if name == "cuda" else None, stable=name != "autograd")
        try:
            shutil.copy2(compiler.build(f"_hf_{name}", sources.source_files(CSRC, name), objects), library)
        except BuildError as error:
            if mode != "auto":
                raise
            info["not_built"][name] = str(error)
            continue
        info["libraries"][name] = {
            "file": library.name,
            "source_hash": sources.source_hash(CSRC, name),
            **compiler.info(),
        }
    (out / INFO).write_text(json.dumps(info, indent=2) + "\n")
    (out / RECORD).write_text("{}\n")
    _report(info)
    return info


def _report(info: dict) -> None:
    built, why = sorted(info["libraries"]), info["not_built"]
    if info["mode"] == "none":
        say("pure Python, as HYPERFORMER_FAST_BUILD=none asks")
    elif not built:
        say(f"no kernels, pure Python: {why['cpu']}")
    else:
        absent = "".join(f"; no {name} library: {reason}" for name, reason in why.items())
        say(f"built {', '.join(built)} against torch {info['torch']}{absent}")


class BuildNative(build_ext):
    """build_ext, all of it: the libraries have no Python ABI, so nothing of distutils' compiler classes applies."""

    def run(self) -> None:
        try:
            info = build_libraries(self._folder)
        except BuildError as error:
            raise PlatformError(f"hyperformer_fast: {error}") from None
        self._files = [INFO, RECORD, *(library["file"] for library in info["libraries"].values())]
        if self.inplace:
            for name in sources.PATTERNS:
                # Replaced, never overwritten: a running process may have it mapped.
                (ROOT / PACKAGE / f"_hf_{name}.so").unlink(missing_ok=True)
            for name in self._files:
                shutil.copy2(self._folder / name, ROOT / PACKAGE / name)

    def has_libraries(self) -> bool:
        return any(name.endswith(".so") for name in getattr(self, "_files", ()))

    @property
    def _folder(self) -> Path:
        return Path(self.build_lib) / PACKAGE

    def get_outputs(self) -> list[str]:
        return [str(self._folder / name) for name in getattr(self, "_files", [INFO, RECORD])]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {str(self._folder / name): str(Path(PACKAGE, name)) for name in getattr(self, "_files", [INFO, RECORD])}

    def get_source_files(self) -> list[str]:
        found = {path for name in sources.PATTERNS for path in sources.source_files(CSRC, name)}
        return sorted(str(path.relative_to(ROOT)) for path in found)


COMMANDS = {"build_ext": BuildNative}

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools below 70.1 leaves it to the wheel package
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

if bdist_wheel:

    class Wheel(bdist_wheel):
        """A wheel that serves every Python 3: the libraries link to libtorch, not to libpython."""

        def get_tag(self) -> tuple[str, str, str]:
            system = super().get_tag()[2]
            built = self.get_finalized_command("build_ext")
            return "py3", "none", system if built.has_libraries() else "any"

    COMMANDS["bdist_wheel"] = Wheel
