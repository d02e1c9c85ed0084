"""Time the adapter by every provider, and print ratios beside two ceilings.

    python benchmarks/report.py [--sizes T5-base] [--rows 1024 4096] [--reductions 32] [--dtypes fp32 bf16]
        [--rounds 15] [--device cuda] [--output DIR]

All providers take turns in one process, and what was timed is checked against float64; a result that is wrong has no
ratio. The ceilings are measured beside them: the bytes at the rate of a copy, and the operations at the rate of a large
product of the same dtype. "of bound" is the larger of the two least times over the time that we took.

On a GPU every provider is recorded in a CUDA graph, so that like is compared with like: ratios are of the GPU's own
time. What was called eagerly has the host's time too, and ", called" in its name; torch.compile's own CUDA graphs are
always called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from plots import draw
from providers import DTYPES, MODELS, OURS, PROVIDERS, Case, Unavailable, Wrong, absent, calls, check, present
from rich.progress import track
from timing import Timed, arguments, interleaved, machine, show, write

from hyperformer_fast import graph_timing


def ceilings(case: Case) -> dict[str, list[Callable[[], object]]]:
    """The calls whose rates bound every provider: a copy of x into fresh memory, and a square product of its dtype."""
    a, b = (torch.randn(side(case), side(case)).to(case.dtype).to(case.device) for _ in range(2))
    sources = [case.x.clone() for _ in range(graph_timing.buffers(case.row_bytes, case.device))]
    return {"copy": [lambda x=x: torch.empty_like(x).copy_(x) for x in sources], "product": [lambda: a @ b]}


def side(case: Case) -> int:
    """The side of the square product: large enough to keep the device busy."""
    return 8192 if case.device.startswith("cuda") else 1024


#: What is added to the name of a provider whose time includes the host's.
CALLED = ", called"


def timed(name: str, case: Case, backward: bool) -> dict[str, Timed]:
    """The ways in which a provider is timed, by the name of its ratio; each is checked.

    Raises:
        Unavailable: the provider does not serve this case.
        Wrong: its result is off.
    """
    on_gpu = case.device.startswith("cuda")
    made = calls(name, case, backward, graph_timing.buffers(case.row_bytes, case.device))
    check(name, case, made[0]())
    if not (on_gpu and PROVIDERS[name].recordable):
        return {name: made[0]}
    recorded = graph_timing.record(made, case.device)
    recorded.replay()
    check(name, case, recorded.results[-1])
    return {name: recorded, f"{name}{CALLED}": made[0]}


def measure(case: Case, backward: bool, rounds: int) -> dict:
    """The ratios of one case; ``absent`` and ``wrong`` say why a provider has none."""
    ways: dict[str, Timed] = {}
    without, wrong = absent(case.device), {}
    for name in present(case.device):
        try:
            ways |= timed(name, case, backward)
        except Wrong as error:
            wrong[name] = str(error)
        except Unavailable as error:
            without[name] = str(error)
    found = {
        "N": case.N, "d": case.d, "b": case.b, "dtype": str(case.dtype).removeprefix("torch."), "backward": backward,
        "ratios": {}, "absent": without,
    }  # fmt: skip
    if wrong:
        found["wrong"] = wrong
    if OURS not in ways:
        return found
    bounds: dict[str, Timed] = {
        name: graph_timing.record(made, case.device) if case.device.startswith("cuda") else made[0]
        for name, made in ceilings(case).items()
    }
    times = interleaved({**ways, **bounds}, rounds)
    copy, product = times.pop("copy"), times.pop("product")
    flops, tensors = case.forward_flops * (3 if backward else 1), 5 if backward else 2
    # A copy touches two tensors like x. A forward must touch two (x, out), a backward three more (g, x, dx).
    bound = max(copy * tensors / 2, flops / (2 * side(case) ** 3 / product))
    return {
        **found,
        "ratios": {name: t / times[OURS] for name, t in times.items()},
        "our_seconds": times[OURS],
        "of_bound": bound / times[OURS],
        "bound_by": "bytes" if bound == copy * tensors / 2 else "flops",
    }


def table(results: list[dict], where: dict[str, str]) -> None:
    rivals = list(dict.fromkeys(name for r in results for name in r["ratios"] if name != OURS))
    rows = [
        (
            "fwd+bwd" if r["backward"] else "fwd", r["d"], r["b"], r["N"], r["dtype"],
            *(r["ratios"].get(name, "-") for name in rivals),
            f"{100 * r['of_bound']:.0f} % ({r['bound_by']})" if "of_bound" in r else "-",
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
    if wrong := sorted({why for r in results for why in r.get("wrong", {}).values()}):
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
