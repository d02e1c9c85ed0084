"""Count what the Triton kernels load, store and compute in one training step of a stack, and what an H100 should make
of it.

    TRITON_INTERPRET=1 python tools/triton_traffic.py [--rows 1024 4096 16384] [--write]

Bytes are counted access by access in Triton's interpreter, for bfloat16 x and float32 masters. A prediction is the
largest of: each tensor once at the memory's bandwidth; all accesses at the second-level cache's; products, padding
included, at their units' peak; all but the first on as many multiprocessors as there are programs; for the fold, the
latency of its serial steps; and a launch. It is written down to be compared with a measurement, and is none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.cases import random_packed  # noqa: E402
from support.watch import Launch, watch  # noqa: E402

from hyperformer_fast.backends.triton import TritonBackend, interpreted  # noqa: E402
from hyperformer_fast.kernels import tiles  # noqa: E402
from hyperformer_fast.kernels.common import padded  # noqa: E402
from hyperformer_fast.layout import AdapterLayout  # noqa: E402

PAGE = ROOT / "docs/triton_gate.md"
SHAPES = {"T5-small": (512, 16), "T5-base": (768, 24), "T5-large": (1024, 32)}

#: H100 SXM by its data sheet: bytes/s; dense bf16, float32 and float64 tensor-core flop/s; multiprocessors. The cache's
#: bandwidth, a launch and a step of the fold (reductions over a block, or a dependent load) are assumptions.
MEMORY, TENSOR, FLOAT32, FLOAT64, PROCESSORS = 3.35e12, 989e12, 67e12, 67e12, 132
CACHE, LAUNCH, STEP = 5.5e12, 2e-6, 1e-6
#: Operations of an activation or its derivative, counted as float32 flops.
ACTIVATION = 20


class Work(NamedTuple):
    tensor: float = 0
    float32: float = 0
    float64: float = 0
    steps: float = 0  #: that follow each other in one program


def work_of(kernel: str, d: int, b: int, N: int, n: int, programs: int) -> Work:
    """Flops of a launch for N rows, or n adapters generated and folded."""
    BB = padded(b)
    P = AdapterLayout(d, b).numel
    if kernel == "generate":
        return Work(float32=2 * n * P * 64)
    if kernel == "fold":
        chunks = -(-d // tiles.fold(d, b).BK)
        return Work(float64=n * (2 * d * BB * BB + 2 * BB**3), steps=b + 4 * chunks)
    if kernel == "adapter_forward":
        return Work(4 * N * d * BB, N * (2 * BB * BB + ACTIVATION * BB + 5 * d))
    if kernel == "rows":
        return Work(4 * N * d * BB, N * (4 * BB * BB + 2 * ACTIVATION * BB + 8 * d))
    if kernel == "weights":
        chunks = -(-d // tiles.weights(d, b, torch.bfloat16, False, 90).BK) + 1
        return Work(4 * N * d * BB, N * (2 * BB * BB + chunks * ACTIVATION * BB + 4 * d))
    return Work(float32=programs * tiles.finish(d, b).BK * 2 * BB * BB)


def predicted(launch: Launch, work: Work) -> tuple[float, str]:
    """Seconds, and what they are bound by."""
    share = min(1.0, launch.programs / PROCESSORS)
    times = {
        "memory": launch.once / MEMORY, "cache": launch.asked / CACHE / share,
        "tensor cores": work.tensor / TENSOR / share, "float32": work.float32 / FLOAT32 / share,
        "float64": work.float64 / FLOAT64 / share, "latency": work.steps * STEP,
    }  # fmt: skip
    bound = max(times, key=times.get)
    return times[bound] + LAUNCH, bound


def stack_launches(layout: AdapterLayout, sites: int, T: int) -> list[Launch]:
    """Generation and fold of a stack."""
    E, G, g0 = torch.randn(1, sites * T, 64), torch.randn(1, layout.numel, 64), torch.randn(1, layout.numel)
    with watch() as seen:
        TritonBackend().fold(TritonBackend().generate_weights(E, G, g0), layout, torch.bfloat16)
    # the first call of all checks the interpreter with a kernel of its own
    return [launch for launch in seen.launches if launch.kernel in ("generate", "fold")]


def adapter_launches(layout: AdapterLayout, N: int) -> list[Launch]:
    """Forward and backward of one adapter, one task."""
    backend = TritonBackend()
    packed = random_packed(layout).float()
    x, g = (torch.randn(N, layout.d).bfloat16() for _ in range(2))
    folded = backend.fold(packed, layout, x.dtype)
    with watch() as seen:
        _, saved = backend.adapter_forward(x, folded, layout, "gelu_new", None, True)
        backend.adapter_backward(g, x, saved, packed, folded, layout, "gelu_new", None, True, True)
    return seen.launches


def rows_of(name: str, launches: list[Launch], of: str, N: int = 0, n: int = 0) -> list[str]:
    d, b = SHAPES[name]
    lines = []
    for launch in launches:
        seconds, bound = predicted(launch, work_of(launch.kernel, d, b, N, n, launch.programs))
        cells = (
            name, launch.kernel, of, launch.programs, f"{launch.once / 1e6:.1f}", f"{launch.asked / 1e6:.1f}",
            f"{1e6 * seconds:.1f} ({bound})", "",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"record in {PAGE.name}")
    options = parser.parse_args()
    if not interpreted():
        sys.exit("set TRITON_INTERPRET=1: this counts in Triton's interpreter")
    tiles.architecture = lambda device: 90
    columns = (
        "model",
        "kernel",
        "of",
        "programs",
        "MB, each tensor once",
        "MB asked for",
        "predicted us",
        "measured us",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    base, T = AdapterLayout(*SHAPES["T5-base"]), options.tasks
    lines += rows_of("T5-base", stack_launches(base, 24, T), f"24 sites, {T} tasks", n=24 * T)
    for N in options.rows:
        lines += rows_of("T5-base", adapter_launches(base, N), f"N = {N}", N)
    for name in ("T5-small", "T5-large"):
        N = options.rows[0]
        lines += rows_of(name, adapter_launches(AdapterLayout(*SHAPES[name]), N), f"N = {N}", N)
    if options.write:
        head, _, rest = PAGE.read_text().partition("<!-- traffic -->")
        tail = rest.partition("<!-- /traffic -->")[2]
        table = "\n".join(lines)
        PAGE.write_text(f"{head}<!-- traffic -->\n{table}\n<!-- /traffic -->{tail}")


if __name__ == "__main__":
    main()
