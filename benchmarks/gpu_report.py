"""Everything a GPU can tell, in one command and under nine minutes.

    python benchmarks/gpu_report.py [--output DIR] [--parts tests adapter ...] [--dry-run]

tests        tests/test_on_device.py
sanitizer    compute-sanitizer (memcheck, racecheck, synccheck), where it is found, over every op
kernels      each Triton kernel's own time, from the profiler, and its share of a copy's bandwidth
adapter      report.py on the device: eager, torch.compile with CUDA graphs and without, `adapters`, ours, two ceilings
memory       the peak of a forward and backward, ours and eager's

Each part has its own time limit and leaves what it found, so that one that fails does not take the others with it.
JSON and plots are named after the device. ``--dry-run`` walks through all parts on the CPU with tiny inputs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from providers import ACTIVATION, Case, make
from timing import RESULTS, described, machine, seconds, show, write

from hyperformer_fast import ops
from hyperformer_fast.layout import AdapterLayout

ROOT = Path(__file__).parents[1]
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


#: By the names that the profiler gives them.
KERNELS = {f"{name}_kernel" for name in ("generate", "fold", "adapter_forward", "rows", "weights", "finish")}


def run(command: list[str], limit: float, **environment: str) -> dict:
    """A command's exit code and the end of what it said; -1 where it took too long."""
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
        120, HYPERFORMER_FAST_TEST_DEVICE=options.device,
        HYPERFORMER_FAST_SWEEP_EXAMPLES="3" if options.dry_run else "300",
    )  # fmt: skip


def every_op(device: str) -> None:
    """All kernels, mixed tasks, ragged rows: what the sanitizer looks at."""
    for dtype, d, b, pre in ((torch.bfloat16, 768, 24, False), (torch.float32, 97, 5, True)):
        layout = AdapterLayout(d, b, pre)
        E, G, g0 = (torch.randn(s, device=device) for s in ((1, 3, 64), (1, layout.numel, 64), (1, layout.numel)))
        packed = ops.generate_weights(E, G, g0)[0].requires_grad_()
        x = torch.randn(4, 33, d, device=device).to(dtype).requires_grad_()
        index = torch.tensor([2, -1, 0, 2], device=device)
        out = ops.adapter(x, packed, layout, ACTIVATION, task_index=index)
        torch.autograd.grad(out, (x, packed), torch.ones_like(out))
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
    """Seconds of each kernel by the profiler; and of the whole, the share of a same-size copy's bandwidth."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] if options.device == "cpu" else [activity.CPU, activity.CUDA]
    found = []
    for N in [130] if options.dry_run else [1024, 4096, 16384, 65536]:
        for dtype in (torch.bfloat16, torch.float32):
            case = Case(N, 768, 24, dtype, options.device)
            calls = {"forward": make("hyperformer_fast", case, False), "both": make("hyperformer_fast", case, True)}
            repeats = 2 if options.dry_run else 20
            for call in calls.values():
                seconds(call, 3)
            with torch.profiler.profile(activities=activities) as profile:
                seconds(calls["both"], repeats)
            times: dict[str, float] = defaultdict(float)
            for event in profile.key_averages():
                if event.key in KERNELS and getattr(event, "self_device_time_total", 0):
                    times[event.key] += event.self_device_time_total / repeats
            copy = seconds(lambda case=case: torch.empty_like(case.x).copy_(case.x), repeats)
            whole = {name: seconds(call, repeats) for name, call in calls.items()}
            found.append({
                "N": N, "dtype": str(dtype).removeprefix("torch."), "kernel_us": dict(times),
                # a forward reads x and writes out, as a copy does; a backward reads g and x and writes dx besides
                "forward_of_copy_bandwidth": copy / whole["forward"],
                "both_of_copy_bandwidth": 2.5 * copy / whole["both"],
            })  # fmt: skip
    return found


def adapter(options: argparse.Namespace) -> dict:
    rows = ["65"] if options.dry_run else ["128", "1024", "4096", "16384"]
    return run(
        [sys.executable, "report.py", "--device", options.device, "--rounds", "1" if options.dry_run else "9",
         "--rows", *rows, "--output", str(options.output)],
        160,
    )  # fmt: skip


def memory(options: argparse.Namespace) -> list[dict]:
    """Bytes at the peak of a forward and backward beyond x, g and the weights, over x's own."""
    if options.device == "cpu":
        return []
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        case = Case(16384, 768, 24, dtype, options.device)
        peaks = {}
        for provider in ("eager", "hyperformer_fast"):
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
    "tests": tests, "sanitizer": sanitizer, "kernels": kernels, "adapter": adapter, "memory": memory,
}  # fmt: skip


def plot(found: list[dict], where: dict[str, str], path: Path) -> None:
    """The share of a copy's bandwidth over N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for i, dtype in enumerate(sorted({row["dtype"] for row in found})):
        rows = [row for row in found if row["dtype"] == dtype]
        for style, name in (("-", "forward"), ("--", "both")):
            label = f"{'forward' if name == 'forward' else 'forward+backward'}, {dtype}"
            shares = [100 * row[f"{name}_of_copy_bandwidth"] for row in rows]
            axis.plot([row["N"] for row in rows], shares, style, color=f"C{i}", marker="o", markersize=3, label=label)
    axis.set(xscale="log", xlabel="rows N", ylabel="% of a copy's bandwidth", title="the adapter, d = 768, b = 24")
    figure.suptitle(described(where), fontsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
        except Exception as error:  # whatever it is, the parts to come must still run
            report[name] = {"exit": 1, "said": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        path = write("gpu-report", where, report, options.output)
    shares = report.get("kernels")
    if isinstance(shares, list):
        rows = [
            (r["N"], r["dtype"], *(f"{100 * r[f'{w}_of_copy_bandwidth']:.0f} %" for w in ("forward", "both")))
            for r in shares
        ]
        show("Of a same-size copy's bandwidth", where, ("N", "dtype", "forward", "forward+backward"), rows)
        plot(shares, where, path.with_suffix(".png"))
    failed = [name for name, found in report.items() if isinstance(found, dict) and found.get("exit", 0)]
    failed += [
        f"sanitizer {tool}" for tool, found in report.get("sanitizer", {}).items()
        if isinstance(found, dict) and found["exit"]
    ]  # fmt: skip
    sys.exit(f"failed: {', '.join(failed)}; see {path}" if failed else None)


if __name__ == "__main__":
    main()
