"""PEP 517 backend: setuptools' own, which also asks for torch and ninja where there is none and it would be of use.

torch is not in ``build-system.requires``: every isolated build would then download it, though the environment has one.
Where it has none, the requirement asked for is the package's own, so that the headers are those of the wheel that pip
installs next to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from editable import use_path_file
from find_torch import find_torch
from ninja_build import find_ninja
from plan import BuildError, requested_mode
from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay setuptools' own
from toolchain import find_cxx


def torch_requirement() -> str:
    """The package's own requirement for torch, as pyproject.toml states it."""
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    return re.search(r'^\s*"(torch[<>=!~][^"]*)"', text, re.M)[1]


def native_requirements() -> list[str]:
    """What compiling needs and this machine lacks."""
    try:
        mode = requested_mode()
        if mode == "none" or (mode == "auto" and not find_cxx()):
            return []
    except BuildError:
        return []  # build_ext says it, in one line
    return ([] if find_torch() else [torch_requirement()]) + ([] if find_ninja() else ["ninja"])


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + native_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + native_requirements()


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
    use_path_file(Path(wheel_directory, name), Path(__file__).resolve().parents[1])
    return name
