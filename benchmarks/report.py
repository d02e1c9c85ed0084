"""Time the providers in one process, one after the other in every round, and print ratios with two ceilings measured
beside them.

    python benchmarks/report.py [--sizes T5-base] [--rows 1024 4096] [--reductions 32] [--dtypes fp32 bf16] [--rounds
    15] [--output DIR]

Every result is checked against float64 before it is timed. The ceilings are the bytes of a copy and the flops of a
large product of the same dtype; "of bound" is the larger of the two least times over the time taken. Medians; the
machine is named.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from providers import MODELS, PROVIDERS, Case, Unavailable, make
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hyperformer_fast.backends import explain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def machine() -> dict[str, str]:
    """CPU, instruction set, threads, torch."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return {
        "cpu": name,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, least: float = 2e-3) -> dict[str, float]:
    """Median seconds of each call over rounds in which all take turns; a turn lasts ``least`` seconds or one call."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(least / max(seconds(call, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return {name: median(values) for name, values in times.items()}


def ceilings(case: Case) -> dict[str, Callable[[], object]]:
    """A copy of x into fresh memory, and a square product, of the case's dtype."""
    n = 1024
    a, b = (torch.randn(n, n).to(case.dtype) for _ in range(2))
    return {"copy": lambda: torch.empty_like(case.x).copy_(case.x), "product": lambda: a @ b}


def measure(case: Case, backward: bool, rounds: int) -> dict:
    calls, absent = {}, {}
    for provider in PROVIDERS:
        try:
            calls[provider] = make(provider, case, backward)
        except Unavailable as error:
            absent[provider] = str(error)
    gc.disable()
    try:
        times = interleaved({**calls, **ceilings(case)}, rounds)
    finally:
        gc.enable()
    copy, product = times.pop("copy"), times.pop("product")
    flops, tensors = case.forward_flops * (3 if backward else 1), 5 if backward else 2
    # a copy reads and writes one [N, d]: half of its time for each that a kernel must touch (x, out; and g, x, dx)
    bound = max(copy * tensors / 2, flops / (2 * 1024**3 / product))
    return {
        "N": case.N, "d": case.d, "b": case.b, "dtype": str(case.dtype).removeprefix("torch."), "backward": backward,
        "ratios": {name: t / times["hyperformer_fast"] for name, t in times.items()},
        "of_bound": bound / times["hyperformer_fast"],
        "bound_by": "bytes" if bound == copy * tensors / 2 else "flops",
        "absent": absent,
    }  # fmt: skip


def table(results: list[dict], where: dict[str, str], backend: str) -> Table:
    title = f"Time of each provider over ours ({backend}); {', '.join(where[k] for k in ('cpu', 'instruction_set'))}, "
    title += f"{where['threads']} threads"
    out = Table("pass", "d", "b", "N", "dtype", title=title)
    rivals = [name for name in PROVIDERS if name != "hyperformer_fast"]
    for name in [*rivals, "of bound"]:
        out.add_column(name, justify="right")
    for r in results:
        cells = [f"{r['ratios'][name]:.2f}x" if name in r["ratios"] else "-" for name in rivals]
        out.add_row(
            "fwd+bwd" if r["backward"] else "fwd",
            str(r["d"]),
            str(r["b"]),
            str(r["N"]),
            r["dtype"],
            *cells,
            f"{100 * r['of_bound']:.0f} % ({r['bound_by']})",
        )
    return out


def plot(results: list[dict], where: dict[str, str], path: Path) -> None:
    """Ratios over N, a panel per pass and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = sorted({(r["backward"], r["dtype"]) for r in results})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (backward, dtype) in zip(axes[0], panels):
        chosen = [r for r in results if (r["backward"], r["dtype"]) == (backward, dtype)]
        for i, name in enumerate(name for name in PROVIDERS if name != "hyperformer_fast"):
            for style, d in zip(("-", "--", ":"), sorted({r["d"] for r in chosen})):
                points = sorted((r["N"], r["ratios"][name]) for r in chosen if r["d"] == d and name in r["ratios"])
                if points:
                    axis.plot(*zip(*points), style, color=f"C{i}", marker="o", markersize=3, label=f"{name}, d={d}")
        axis.axhline(1, color="0.4", linewidth=1)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="rows N",
            title=f"{'forward+backward' if backward else 'forward'}, {dtype}",
        )
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("time over ours (above 1: slower)")
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{where['cpu']}, {where['instruction_set']}, {where['threads']} threads, torch {where['torch']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["T5-base"], choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 1024, 4096, 16384])
    parser.add_argument("--reductions", nargs="+", type=int, default=[32])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    where, results = machine(), []
    cases = [
        (Case(N, MODELS[size], MODELS[size] // r, DTYPES[dtype]), backward)
        for size in options.sizes
        for r in options.reductions
        for dtype in options.dtypes
        for backward in (False, True)
        for N in options.rows
    ]
    for case, backward in track(cases, "measuring"):
        results.append(measure(case, backward, options.rounds))
    backend = explain("adapter_forward", cases[0][0].x).chosen
    Console(width=140).print(table(results, where, backend))
    for provider, reason in sorted({item for r in results for item in r["absent"].items()}):
        print(f"not measured: {provider}: {reason}")
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"adapter-{where['instruction_set'].lower()}-{backend}"
    (options.output / f"{name}.json").write_text(
        json.dumps({"machine": where, "backend": backend, "results": results}, indent=1) + "\n"
    )
    plot(results, where, options.output / f"{name}.png")
    print(f"{options.output / name}.json and .png")


if __name__ == "__main__":
    main()
