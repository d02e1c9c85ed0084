"""What other pages of the benchmarks measure, here as entries of the report: report.py, small.py, and peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from providers import DTYPES, OURS, Case, Unavailable, Wrong, absent, make, present
from report import measure as measure_adapter
from small import ROWS, ours
from small import measure as measure_small

from hyperformer_fast import backends

#: (N, dtype, whether with the backward). Inductor compiles the eager adapter once for each, and once more for its own
#: CUDA graphs, in some five seconds: so the shapes that matter come first, and there are few.
CASES = (
    (4096, "bf16", True),
    (4096, "bf16", False),
    (16384, "bf16", True),
    (1024, "bf16", True),
    (4096, "fp32", True),
    (128, "bf16", False),
)


def adapter(options: SimpleNamespace) -> Iterator[dict]:
    """Each provider's time over ours."""
    dry = options.dry_run
    for N, dtype, backward in [(65, "fp32", False)] if dry else CASES:
        case = Case(N, 768, 24, DTYPES[dtype], options.device)
        found = measure_adapter(case, backward, 1 if dry else 9)
        shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found["ratios"].items() if name != OURS)
        what = "forward and backward" if backward else "forward"
        bound = f"; {100 * found['of_bound']:.0f} % of the bound ({found['bound_by']})" if "of_bound" in found else ""
        yield {"line": f"{what}, N={N}, {dtype}: {shown or 'nothing to compare with'}{bound}", **found}


def small(options: SimpleNamespace) -> Iterator[dict]:
    """Few rows and whole sites."""
    dry = options.dry_run
    if not ours(options.device):
        reasons = {each["name"]: each["reason"] for each in backends.backend_report() if each["reason"]}
        yield {"line": f"none of our backends is available on {options.device}", "failed": str(reasons)}
        return
    for found in measure_small(options.device, [3] if dry else list(ROWS), 1 if dry else 9):
        first = found["first_seconds"]
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found["over_first"].items())
        time = f"{1e6 * first:.1f} us" if first is not None else "no form is right"
        yield {"line": f"{found['what']}, N={found['N']}, {found['way']}: {time}; {ratios}", **found}


def memory(options: SimpleNamespace) -> Iterator[dict]:
    """The peak memory of a forward and backward beyond x, g and the weights, in sizes of x."""
    if not options.device.startswith("cuda"):
        yield {"line": "a CPU's peak memory is not counted", "absent": {"memory": "needs a GPU"}}
        return
    for dtype in (torch.bfloat16, torch.float32):
        case = Case(16384, 768, 24, dtype, options.device)
        peaks, wrong = {}, {}
        without = {name: why for name, why in absent(options.device).items() if name.startswith(OURS)}
        for provider in [name for name in present(options.device) if name == "eager" or name.startswith(OURS)]:
            try:
                call = make(provider, case, True)
            except Wrong as error:
                wrong[provider] = str(error)
                continue
            except Unavailable as error:
                without[provider] = str(error)
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            peaks[provider] = (torch.cuda.max_memory_allocated() - before) / case.row_bytes
        name = str(dtype).removeprefix("torch.")
        shown = ", ".join(f"{provider} {peak:.2f}" for provider, peak in peaks.items())
        entry = {"line": f"{name}, in sizes of x: {shown}", "dtype": name, "peak_over_x": peaks, "absent": without}
        yield {**entry, "wrong": wrong} if wrong else entry
