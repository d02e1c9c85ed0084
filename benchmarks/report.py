"""Time the providers in one process, one after the other in every round, and print ratios with two ceilings measured
beside them.

    python benchmarks/report.py [--sizes T5-base] [--rows 1024 4096] [--reductions 32] [--dtypes fp32 bf16] [--rounds
    15] [--device cuda] [--output DIR]

Every result is checked against float64 before it is timed. The ceilings are the bytes of a copy and the flops of a
large product of the same dtype; "of bound" is the larger of the two least times over the time taken. Medians; the
machine is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from providers import MODELS, PROVIDERS, Case, Unavailable, make
from rich.progress import track
from timing import RESULTS, described, interleaved, machine, show, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ceilings(case: Case) -> dict[str, Callable[[], object]]:
    """A copy of x into fresh memory, and a square product, of the case's dtype."""
    a, b = (torch.randn(side(case), side(case)).to(case.dtype).to(case.device) for _ in range(2))
    return {"copy": lambda: torch.empty_like(case.x).copy_(case.x), "product": lambda: a @ b}


def side(case: Case) -> int:
    """Of the product: large enough for the device, and no larger."""
    return 8192 if case.device.startswith("cuda") else 1024


def measure(case: Case, backward: bool, rounds: int) -> dict:
    calls, absent = {}, {}
    for provider in PROVIDERS:
        try:
            calls[provider] = make(provider, case, backward)
        except Unavailable as error:
            absent[provider] = str(error)
    times = interleaved({**calls, **ceilings(case)}, rounds)
    copy, product = times.pop("copy"), times.pop("product")
    flops, tensors = case.forward_flops * (3 if backward else 1), 5 if backward else 2
    # a copy reads and writes one [N, d]: half of its time for each that a kernel must touch (x, out; and g, x, dx)
    bound = max(copy * tensors / 2, flops / (2 * side(case) ** 3 / product))
    return {
        "N": case.N, "d": case.d, "b": case.b, "dtype": str(case.dtype).removeprefix("torch."), "backward": backward,
        "ratios": {name: t / times["hyperformer_fast"] for name, t in times.items()},
        "of_bound": bound / times["hyperformer_fast"],
        "bound_by": "bytes" if bound == copy * tensors / 2 else "flops",
        "absent": absent,
    }  # fmt: skip


def table(results: list[dict], where: dict[str, str]) -> None:
    rivals = [name for name in PROVIDERS if name != "hyperformer_fast"]
    rows = [
        (
            "fwd+bwd" if r["backward"] else "fwd", r["d"], r["b"], r["N"], r["dtype"],
            *(r["ratios"].get(name, "-") for name in rivals),
            f"{100 * r['of_bound']:.0f} % ({r['bound_by']})",
        )
        for r in results
    ]  # fmt: skip
    show("Time of each provider over ours", where, ("pass", "d", "b", "N", "dtype", *rivals, "of bound"), rows)


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
    figure.suptitle(described(where), fontsize=10)
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    where, results = machine(options.device), []
    cases = [
        (Case(N, MODELS[size], MODELS[size] // r, DTYPES[dtype], options.device), backward)
        for size in options.sizes
        for r in options.reductions
        for dtype in options.dtypes
        for backward in (False, True)
        for N in options.rows
    ]
    for case, backward in track(cases, "measuring"):
        results.append(measure(case, backward, options.rounds))
    table(results, where)
    for provider, reason in sorted({item for r in results for item in r["absent"].items()}):
        print(f"not measured: {provider}: {reason}")
    path = write("adapter", where, results, options.output)
    plot(results, where, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
