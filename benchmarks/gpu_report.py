"""Test and time everything on a GPU, in one command.

    python benchmarks/gpu_report.py [--output DIR] [--parts tests adapter ...] [--dry-run]

tests        tests/test_on_device.py
sanitizer    compute-sanitizer (memcheck, racecheck, synccheck), where it is found, over every op of both backends
kernels      each Triton and CUDA kernel's own time, from the profiler, and the adapter's share of a copy's bandwidth
small        small.py: few rows and whole sites, by both backends and every form of the CUDA library
adapter      report.py: eager, torch.compile with CUDA graphs and without, `adapters`, ours, and two ceilings
memory       the peak memory of a forward and backward, ours and eager's

Parts that start processes have time limits, and a part that fails does not stop the others. JSON and plots are named
after the device. ``--dry-run`` walks through all parts on the CPU with tiny inputs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from plots import draw
from providers import ACTIVATION, OURS, Case, make, present
from small import ROWS, ours
from small import measure as measure_small
from timing import RESULTS, machine, seconds, show, write

from hyperformer_fast import backends, ops
from hyperformer_fast.layout import AdapterLayout

ROOT = Path(__file__).parents[1]
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
#: Our kernels in the names that the profiler reports, of either backend.
KERNEL = re.compile(r"\b([a-z_]+)_kernel\b")


def run(command: list[str], limit: float, **environment: str) -> dict:
    """Run a command for ``limit`` seconds at most: its exit code (-1 if it took too long), seconds, and last output."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path, **environment}, cwd=ROOT / "benchmarks",
            capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, said = -1, f"{(late.stdout or b'').decode()}\ntook more than {limit:.0f} s"
    return {"exit": code, "seconds": round(time.perf_counter() - start), "said": said[-4000:]}


def tests(options: argparse.Namespace) -> dict:
    return run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider",
         str(ROOT / "tests/test_on_device.py")],
        140, HYPERFORMER_FAST_TEST_DEVICE=options.device,
        HYPERFORMER_FAST_SWEEP_EXAMPLES="3" if options.dry_run else "200",
    )  # fmt: skip


def every_op(device: str) -> None:
    """Run all kernels once, with mixed tasks, ragged rows, many rows and few, for the sanitizer to look at."""
    for name in ours(device):
        with backends.use_backend(name):
            for dtype, d, b, pre in ((torch.bfloat16, 768, 24, False), (torch.float32, 97, 5, True)):
                layout = AdapterLayout(d, b, pre)
                shapes = (1, 3, 64), (1, layout.numel, 64), (1, layout.numel)
                E, G, g0 = (torch.randn(shape, device=device) for shape in shapes)
                packed = ops.generate_weights(E, G, g0)[0].requires_grad_()
                index = torch.tensor([2, -1, 0, 2], device=device)
                for L in (33, 1):
                    x = torch.randn(4, L, d, device=device).to(dtype).requires_grad_()
                    out = ops.adapter(x, packed, layout, ACTIVATION, task_index=index)
                    torch.autograd.grad(out, (x, packed), torch.ones_like(out))
                    ops.hyper_adapter(x, E[0], G[0], g0[0], layout, ACTIVATION, index)
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def sanitizer(options: argparse.Namespace) -> dict:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    call = [sys.executable, __file__, "--every-op", "--device", options.device]
    if tool is None:
        return {"exit": 0, "said": "compute-sanitizer is not on this machine", "plain": run(call, 60)["exit"]}
    return {
        name: run([tool, "--tool", name, "--error-exitcode", "9", *call], 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        for name in SANITIZER_TOOLS
    }


def kernels(options: argparse.Namespace) -> list[dict]:
    """Time each kernel by the profiler, and the whole adapter as a share of a same-size copy's bandwidth."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] if options.device == "cpu" else [activity.CPU, activity.CUDA]
    found = []
    for N in [130] if options.dry_run else [1024, 4096, 16384, 65536]:
        for dtype in (torch.bfloat16, torch.float32):
            case = Case(N, 768, 24, dtype, options.device)
            for backend in ours(options.device):
                with backends.use_backend(backend):
                    found.append({"backend": backend, **kernels_of(case, activities, 2 if options.dry_run else 20)})
    return found


def kernels_of(case: Case, activities: list, repeats: int) -> dict:
    calls = {"forward": make(OURS, case, False), "both": make(OURS, case, True)}
    for call in calls.values():
        seconds(call, 3)
    with torch.profiler.profile(activities=activities) as profile:
        seconds(calls["both"], repeats)
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        kernel = KERNEL.search(event.key)
        if kernel and getattr(event, "self_device_time_total", 0):
            times[kernel[1]] += event.self_device_time_total / repeats
    copy = seconds(lambda: torch.empty_like(case.x).copy_(case.x), repeats)
    whole = {name: seconds(call, repeats) for name, call in calls.items()}
    return {
        "N": case.N,
        "dtype": str(case.dtype).removeprefix("torch."),
        "kernel_us": dict(times),
        # a forward reads x and writes out, as a copy does; a backward reads g and x and writes dx besides
        "forward_of_copy_bandwidth": copy / whole["forward"],
        "both_of_copy_bandwidth": 2.5 * copy / whole["both"],
    }


def small(options: argparse.Namespace) -> list[dict]:
    return measure_small(options.device, [3] if options.dry_run else list(ROWS), 1 if options.dry_run else 9)


def adapter(options: argparse.Namespace) -> dict:
    rows = ["65"] if options.dry_run else ["128", "1024", "4096", "16384"]
    return run(
        [sys.executable, "report.py", "--device", options.device, "--rounds", "1" if options.dry_run else "9",
         "--rows", *rows, "--output", str(options.output)],
        150,
    )  # fmt: skip


def memory(options: argparse.Namespace) -> list[dict]:
    """The peak memory of a forward and backward beyond x, g and the weights, in sizes of x."""
    if options.device == "cpu":
        return []
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        case = Case(16384, 768, 24, dtype, options.device)
        peaks = {}
        for provider in sorted({"eager", OURS, f"{OURS}, CUDA C++"} & {*present(options.device)}):
            call = make(provider, case, True)
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peaks[provider] = (torch.cuda.max_memory_allocated() - before) / case.row_bytes
        found.append({"dtype": str(dtype).removeprefix("torch."), "peak_over_x": peaks})
    return found


PARTS: dict[str, Callable[[argparse.Namespace], object]] = {
    "tests": tests, "sanitizer": sanitizer, "kernels": kernels, "small": small, "adapter": adapter, "memory": memory,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--every-op", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.every_op:
        return every_op(options.device)
    if options.dry_run:
        options.device = "cpu"
    elif not torch.cuda.is_available():
        sys.exit("gpu_report.py needs a GPU, and torch sees none; --dry-run walks through it on the CPU")
    where, report = machine(options.device), {}
    for name in options.parts:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            report[name] = PARTS[name](options)
        except Exception as error:  # whatever failed, the other parts must still run
            report[name] = {"exit": 1, "said": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        path = write("gpu-report", where, report, options.output)
    shares = report.get("kernels")
    if isinstance(shares, list):
        passes = ("forward", "both")
        rows = [
            (
                r["backend"],
                r["N"],
                r["dtype"],
                *(f"{100 * r[f'{w}_of_copy_bandwidth']:.0f} %" for w in ("forward", "both")),
            )
            for r in shares
        ]
        show("Share of a same-size copy's bandwidth", where, ("backend", "N", "dtype", *passes), rows)
        draw(path)
    failed = [name for name, found in report.items() if isinstance(found, dict) and found.get("exit", 0)]
    failed += [
        f"sanitizer {tool}" for tool, found in report.get("sanitizer", {}).items()
        if isinstance(found, dict) and found["exit"]
    ]  # fmt: skip
    sys.exit(f"failed: {', '.join(failed)}; see {path}" if failed else None)


if __name__ == "__main__":
    main()
