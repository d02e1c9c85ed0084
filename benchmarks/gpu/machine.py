"""What is on this machine, and the build of the CUDA library for its GPU."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from .children import ROOT, run_quietly

#: Packages that some part needs or passes over; a report from a bare machine says which it had.
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "adapters", "hypothesis", "pytest",
            "pytest-xdist", "matplotlib")  # fmt: skip


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, also where its folder is not on the PATH."""
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=str(home / "bin"))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def entries(options: SimpleNamespace) -> Iterator[dict]:
    """One entry: the device, versions, and which of our backends it has. Exits where there is no GPU."""
    import torch
    from timing import described, machine, slug

    from hyperformer_fast import backends, native

    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        sys.exit("gpu_report.py needs a GPU, and torch sees none; --dry-run walks through it on the CPU")
    where = machine(options.device)
    found = {
        "where": where,
        "slug": slug(where),
        "packages": {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "tools": {name: tool(name) or "not found" for name in ("nvcc", "compute-sanitizer")},
        "backends": {each["name"]: each["reason"] or "available" for each in backends.backend_report()},
        "libraries": {name: native.status(name)["reason"] or "loaded" for name in ("cpu", "cuda")},
    }
    if on_gpu:
        properties = torch.cuda.get_device_properties(options.device)
        found["arch"] = 10 * properties.major + properties.minor
        found["device"] = {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    yield {"line": described(where), **found}


def build(options: SimpleNamespace) -> Iterator[dict]:
    """Compile the CUDA library beside the package, for this GPU's architecture alone."""
    if tool("nvcc") is None:
        yield {"line": "nvcc is not on this machine", "absent": {"cuda": "nvcc is not on this machine"}}
        return
    arch = f"{options.arch // 10}.{options.arch % 10}"
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--inplace"]
    if options.dry_run:
        command = [sys.executable, "-c", "print('a dry run compiles nothing')"]
    code, said = run_quietly(
        command, options.limit, folder=ROOT, HYPERFORMER_FAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST=arch
    )
    entry = {"line": f"the CUDA library for {arch}: exit code {code}", "arch": arch}
    yield {**entry, "failed": said} if code else entry
