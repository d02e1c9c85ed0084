"""Time the adapter by every provider, and print ratios beside two ceilings.

    python benchmarks/report.py [--sizes T5-base] [--rows 1024 4096] [--reductions 32] [--dtypes fp32 bf16]
        [--rounds 15] [--device cuda] [--output DIR]

All providers take turns in one process, and each result is checked against float64 before it is timed. The ceilings are
measured beside them: the bytes at the rate of a copy, and the operations at the rate of a large product of the same
dtype. "of bound" is the larger of the two least times over the time that we took.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from plots import draw
from providers import DTYPES, MODELS, OURS, PROVIDERS, Case, Unavailable, absent, make, present
from rich.progress import track
from timing import arguments, interleaved, machine, show, write


def ceilings(case: Case) -> dict[str, Callable[[], object]]:
    """The calls whose rates bound every provider: a copy of x into fresh memory, and a square product of its dtype."""
    a, b = (torch.randn(side(case), side(case)).to(case.dtype).to(case.device) for _ in range(2))
    return {"copy": lambda: torch.empty_like(case.x).copy_(case.x), "product": lambda: a @ b}


def side(case: Case) -> int:
    """The side of the square product: large enough to keep the device busy."""
    return 8192 if case.device.startswith("cuda") else 1024


def measure(case: Case, backward: bool, rounds: int) -> dict:
    calls, without = {}, absent(case.device)
    for name in present(case.device):
        try:
            calls[name] = make(name, case, backward)
        except Unavailable as error:
            if name == OURS:
                raise
            without[name] = str(error)
    times = interleaved({**calls, **ceilings(case)}, rounds)
    copy, product = times.pop("copy"), times.pop("product")
    flops, tensors = case.forward_flops * (3 if backward else 1), 5 if backward else 2
    # A copy touches two tensors like x. A forward must touch two (x, out), a backward three more (g, x, dx).
    bound = max(copy * tensors / 2, flops / (2 * side(case) ** 3 / product))
    return {
        "N": case.N, "d": case.d, "b": case.b, "dtype": str(case.dtype).removeprefix("torch."), "backward": backward,
        "ratios": {name: t / times[OURS] for name, t in times.items()},
        "of_bound": bound / times[OURS],
        "bound_by": "bytes" if bound == copy * tensors / 2 else "flops",
        "absent": without,
    }  # fmt: skip


def table(results: list[dict], where: dict[str, str]) -> None:
    rivals = [name for name in PROVIDERS if name != OURS]
    rows = [
        (
            "fwd+bwd" if r["backward"] else "fwd", r["d"], r["b"], r["N"], r["dtype"],
            *(r["ratios"].get(name, "-") for name in rivals),
            f"{100 * r['of_bound']:.0f} % ({r['bound_by']})",
        )
        for r in results
    ]  # fmt: skip
    show(
        "Time of each rival over ours; above 1 ours is faster",
        where,
        ("pass", "d", "b", "N", "dtype", *rivals, "of bound"),
        rows,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["T5-base"], choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 1024, 4096, 16384])
    parser.add_argument("--reductions", nargs="+", type=int, default=[32])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--device", default="cpu")
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
    for name, reason in sorted({item for r in results for item in r["absent"].items()}):
        print(f"not measured: {name}: {reason}")
    path = write("adapter", where, results, options.output)
    draw(path)


if __name__ == "__main__":
    main()
