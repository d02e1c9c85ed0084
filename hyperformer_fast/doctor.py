"""Diagnose an installation: versions, built libraries, and each backend's availability with a live check."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, native

_PACKAGES = ("torch", "transformers", "triton", "accelerate", "datasets", "safetensors", "numpy")


def diagnose(check: bool = True) -> dict[str, Any]:
    """Collect the report as JSON-serialisable types.

    Args:
        check: also compare each available backend with the reference.

    Returns:
        A dict with ``ok`` (no live check failed, neither now nor when a library was first loaded), ``problems``
        (messages for the user), ``versions``, ``cpu``, ``gpus``, ``native`` (the status of each library),
        ``build_info`` and ``backends``. Each backend has ``name``, ``available``, ``serves``, ``reason``, ``wrong``
        (its kernels failed their self-test, as the reason says), and ``check`` (op -> relative error) or
        ``check_error``.
    """
    import torch

    from .backends import backend_report

    libraries = {name: _library(name) for name in ("cpu", "cuda", "autograd")}
    backends = [_json_ready(entry) for entry in backend_report()]
    if check:
        for entry in backends:
            if entry["available"]:
                _check(entry)
    problems = [line for line in (native.problem(),) if line]
    for entry in backends:
        if entry["wrong"]:
            problems.append(f"backend {entry['name']} is not used: {entry['reason']}")
        if entry.get("check_error"):
            problems.append(f"backend {entry['name']} fails its live check: {entry['check_error']}")
    return {
        "ok": not any(entry["wrong"] or entry.get("check_error") for entry in backends),
        "problems": problems,
        "versions": _versions(),
        "cpu": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else [],
        "native": libraries,
        "build_info": native.build_info(),
        "backends": backends,
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"hyperformer_fast": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["nvcc"] = _nvcc()
    return versions


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which(os.path.join(home, "bin", "nvcc"))) or shutil.which("nvcc")
    if not nvcc:
        return None
    try:
        words = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = [line for line in words.splitlines() if "release" in line]
    return release[0].rsplit("V", 1)[-1].strip() if release else None


def _library(name: str) -> dict[str, Any]:
    status = native.status(name)
    return {key: status[key] for key in ("built", "loaded", "stale", "reason")}


def _json_ready(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "serves": [str(op) for op in entry["serves"]]}


def _check(entry: dict[str, Any]) -> None:
    import torch

    from .backends import live_check, selftest

    tolerance = selftest.TOLERANCE[torch.float32]
    try:
        errors = live_check(entry["name"])
    except Exception as error:  # the doctor must report a broken backend and not fail itself
        entry["check_error"] = f"{type(error).__name__}: {error}"
        return
    entry["check"] = errors
    wrong = [f"{op} is off by {value:.1e}" for op, value in errors.items() if not value <= tolerance]
    if wrong:
        entry["check_error"] = f"{', '.join(wrong)}, more than {tolerance:.0e}"


def _print(report: dict[str, Any]) -> None:
    """Print the report as text. The extras may not be installed, so rich cannot be used."""
    cpu = report["cpu"]
    facts = {name: version or "not installed" for name, version in report["versions"].items()}
    facts["cpu"] = f"{cpu['machine']}, {cpu['capability']}, {cpu['threads']} threads"
    facts["gpu"] = ", ".join(report["gpus"]) or "none"
    for name, library in report["native"].items():
        facts[f"{name} library"] = _describe(library, report["build_info"].get("libraries", {}).get(name))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    for entry in report["backends"]:
        reason = str(entry["reason"] or entry.get("check_error") or "")
        print(f"\nbackend {entry['name']}: {'available' if entry['available'] else 'not available'}")
        if reason:
            print(f"  {reason}")
        for op, error in entry.get("check", {}).items():
            print(f"  {op:{width}}  off by {error:.0e} from the float64 reference")
    print()
    for line in report["problems"]:
        print(line)
    print("All live checks passed." if report["ok"] else "A live check FAILED.")


def _describe(library: dict[str, Any], built: dict[str, Any] | None) -> str:
    if not library["loaded"] or built is None:
        return str(library["reason"])
    made = ", ".join(str(built[key]) for key in ("compiler", "nvcc", "archs") if key in built)
    return f"loaded, {made}" + (" (STALE: its sources changed since)" if library["stale"] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if no live check failed, else 1."""
    parser = argparse.ArgumentParser(
        prog="hyperformer-fast doctor",
        description="Show the versions, built libraries and backends of this installation.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-check", action="store_true", help="do not compare the backends with the reference")
    options = parser.parse_args(arguments)
    report = diagnose(check=not options.no_check)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report)
    return 0 if report["ok"] else 1
