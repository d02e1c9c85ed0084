"""Count what the Triton kernels load, store and compute in one training step, and predict their time on an H100.

    TRITON_INTERPRET=1 python tools/triton_traffic.py [--rows 1024 4096 16384] [--write]

Bytes are counted access by access in Triton's interpreter, for bfloat16 x and float32 master weights; operations follow
from the shapes. The prediction is the roofline of device.py plus a launch. It is written down before any measurement,
to be compared with one. ``--write`` records it in tools/results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import records
import torch
from device import Work
from traffic import SHAPES, row

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.cases import random_packed  # noqa: E402
from support.watch import Launch, watch  # noqa: E402

from hyperformer_fast.backends.triton import TritonBackend, interpreted  # noqa: E402
from hyperformer_fast.kernels import tiles  # noqa: E402
from hyperformer_fast.kernels.common import padded  # noqa: E402
from hyperformer_fast.layout import AdapterLayout, AdapterSpec  # noqa: E402

#: Operations of an activation or its derivative, counted as float32 operations.
ACTIVATION = 20


def work_of(launch: Launch, d: int, b: int, N: int, n: int) -> Work:
    """A launch for N rows, or for n adapters that are generated and folded."""
    BB = padded(b)
    P = AdapterLayout(d, b).numel
    bottleneck = 2 * BB * BB
    if launch.kernel == "generate":
        # three tf32 products, which take twice as long as products of bfloat16
        counts = {"tensor": 2 * 3 * 2 * n * P * 64}
    elif launch.kernel == "gram":
        # a program loads once, multiplies, and adds over the block; everything is read once
        counts = {"float64": 2 * n * d * BB * BB, "waits": 3}
        return Work(launch.programs, launch.asked, launch.asked, **counts)
    elif launch.kernel == "fold":
        # The longest program loads, takes the factor's steps of some 300 cycles each, and stores. W_u and the partial
        # sums come from the second-level cache, because ``gram`` has just touched them.
        counts = {"float64": n * (6 * d * BB + BB**3), "waits": 2 + b / 6}
        cached = launch.loaded["SUMS"] + 4 * n * d * b
        return Work(launch.programs, launch.asked - cached, launch.asked, **counts)
    elif launch.kernel == "adapter_forward":
        counts = {"tensor": 4 * N * d * BB, "float32": N * (bottleneck + ACTIVATION * BB + 5 * d)}
    elif launch.kernel == "rows":
        counts = {"tensor": 4 * N * d * BB, "float32": N * (2 * bottleneck + 2 * ACTIVATION * BB + 8 * d)}
    elif launch.kernel == "weights":
        chunks = -(-d // tiles.weights(d, b, torch.bfloat16, False, 90).BK) + 1
        counts = {"tensor": 4 * N * d * BB, "float32": N * (bottleneck + chunks * ACTIVATION * BB + 4 * d)}
    else:
        counts = {"float32": launch.programs * tiles.finish(d, b).BK * bottleneck}
    return Work(launch.programs, launch.once, launch.asked, **counts)


def stack_launches(layout: AdapterLayout, sites: int, T: int) -> list[Launch]:
    """The generation and the fold of a stack's adapters."""
    E, G, g0 = torch.randn(1, sites * T, 64), torch.randn(1, layout.numel, 64), torch.randn(1, layout.numel)
    with watch() as seen:
        TritonBackend().fold(TritonBackend().generate_weights(E, G, g0), layout, torch.bfloat16)
    # a process's first call also launches a kernel that checks the interpreter
    return [launch for launch in seen.launches if launch.kernel in ("generate", "gram", "fold")]


def adapter_launches(layout: AdapterLayout, N: int) -> list[Launch]:
    """Forward and backward of one adapter with one task."""
    backend = TritonBackend()
    packed = random_packed(layout).float()
    x, g = (torch.randn(N, layout.d).bfloat16() for _ in range(2))
    folded = backend.fold(packed, layout, x.dtype)
    with watch() as seen:
        _, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "gelu_new"), None, True)
        backend.adapter_backward(g, x, saved, packed, folded, AdapterSpec(layout, "gelu_new"), None, True, True)
    return seen.launches


def rows_of(model: str, launches: list[Launch], of: str, N: int = 0, n: int = 0) -> list[dict]:
    found = [row(model, launch.kernel, of, work_of(launch, *SHAPES[model], N, n)) for launch in launches]
    for line in found:
        print(*line.values(), sep=", ", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"record in {records.RESULTS}")
    options = parser.parse_args()
    if not interpreted():
        sys.exit("set TRITON_INTERPRET=1: this counts in Triton's interpreter")
    tiles.architecture = lambda device: 90
    base, T = AdapterLayout(*SHAPES["T5-base"]), options.tasks
    found = rows_of("T5-base", stack_launches(base, 24, T), f"24 sites, {T} tasks", n=24 * T)
    found += rows_of("T5-base", stack_launches(base, 2, 2), "2 sites, 2 tasks", n=4)
    for N in options.rows:
        found += rows_of("T5-base", adapter_launches(base, N), f"N = {N}", N)
    for model in ("T5-small", "T5-large"):
        N = options.rows[0]
        found += rows_of(model, adapter_launches(AdapterLayout(*SHAPES[model]), N), f"N = {N}", N)
    if options.write:
        command = "TRITON_INTERPRET=1 python tools/triton_traffic.py --write"
        records.write("triton_traffic", "Predicted times of the Triton kernels on an H100", command, found)


if __name__ == "__main__":
    main()
