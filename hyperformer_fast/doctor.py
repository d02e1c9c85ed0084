"""What runs here and why: versions, what was built, each backend with its reason and, where available, a live check."""

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

#: Of a live check, relative to the float64 truth. There float32 errs by 1e-6, and a wrong kernel by 1e-1.
TOLERANCE = 1e-4


def diagnose(check: bool = True) -> dict[str, Any]:
    """Everything the doctor knows, as JSON can hold it.

    Args:
        check: also run each available backend against the reference.

    Returns:
        ``ok`` (no live check failed), ``problems`` (lines for a person), ``versions``, ``cpu``, ``gpus``, ``native``
        (library -> its status), ``build_info``, and ``backends``: name, available, serves, reason, and ``check`` (op ->
        relative error) or ``check_error``.
    """
    import torch

    from .backends import backend_report

    libraries = {name: _library(name) for name in ("cpu", "cuda")}
    backends = [_json_ready(entry) for entry in backend_report()]
    if check:
        for entry in backends:
            if entry["available"]:
                _check(entry)
    problems = [line for line in (native.problem(),) if line]
    for entry in backends:
        if entry.get("check_error"):
            problems.append(f"backend {entry['name']} fails its live check: {entry['check_error']}")
    return {
        "ok": not any(entry.get("check_error") for entry in backends),
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


def _json_ready(entry: dict[str, object]) -> dict[str, Any]:
    return {**entry, "serves": list(entry["serves"])}


def _check(entry: dict[str, Any]) -> None:
    from .backends import live_check

    try:
        errors = live_check(entry["name"])
    except Exception as error:  # the doctor reports what is broken; it does not break on it
        entry["check_error"] = f"{type(error).__name__}: {error}"
        return
    entry["check"] = errors
    wrong = [f"{op} is off by {value:.1e}" for op, value in errors.items() if not value <= TOLERANCE]
    if wrong:
        entry["check_error"] = f"{', '.join(wrong)}, more than {TOLERANCE:.0e}"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="hyperformer_fast", title_justify="left", show_header=False)
    for name, version in report["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = report["cpu"]
    table.add_row("cpu", f"{cpu['machine']}, {cpu['capability']}, {cpu['threads']} threads")
    table.add_row("gpu", ", ".join(report["gpus"]) or "none")
    for name, library in report["native"].items():
        table.add_row(f"{name} library", _describe(library, report["build_info"].get("libraries", {}).get(name)))
    console.print(table)
    table = Table(title="backends", title_justify="left")
    for column in ("name", "available", "serves (error of the live check)", "reason"):
        table.add_column(column)
    for entry in report["backends"]:
        errors = entry.get("check", {})
        serves = [f"{op} ({errors[op]:.0e})" if op in errors else op for op in entry["serves"]]
        reason = str(entry["reason"] or entry.get("check_error") or "")
        table.add_row(entry["name"], "yes" if entry["available"] else "no", "\n".join(serves), reason)
    console.print(table)
    for line in report["problems"]:
        console.print(line, soft_wrap=True, markup=False)
    console.print("All live checks passed." if report["ok"] else "A live check FAILED.")


def _describe(library: dict[str, Any], built: dict[str, Any] | None) -> str:
    if not library["loaded"]:
        return library["reason"]
    made = ", ".join(str(built[key]) for key in ("compiler", "nvcc", "archs") if key in built)
    return f"loaded, {made}" + (" (STALE: its sources changed since)" if library["stale"] else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where no live check failed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperformer_fast", description="Versions, builds and backends of this installation."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-check", action="store_true", help="do not run the backends against the reference")
    options = parser.parse_args(arguments)
    report = diagnose(check=not options.no_check)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report)
    return 0 if report["ok"] else 1
