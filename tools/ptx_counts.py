"""Count what the blocks of the compiled GPU kernels do, in the tests' PTX interpreter. No GPU is needed.

    python tools/ptx_counts.py [--write] [--kernels cuda] [--arch 90] [--rows 4096] [--sample 12] [--only NAME]

One training step of a T5-base adapter in bfloat16 is interpreted for each mix of tasks: one task, eight tasks with the
same number of samples, and eight tasks of which one has all samples. Instructions are those that a block issues, each
counted once for all of its threads that run it together; bytes are those that its threads ask for, not what crosses
memory. All blocks of a kernel whose work depends on the mix are counted; of the others a sample, because the blocks are
alike. ``--write`` records the table in tools/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import records
import torch
from traffic import SHAPES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from ptx.grids import Ran, evenly  # noqa: E402
from ptx.launchers import interpreted  # noqa: E402
from support.cases import random_packed  # noqa: E402

from hyperformer_fast.layout import AdapterLayout, AdapterSpec, Folded, Saved  # noqa: E402

SAMPLES, TASKS = 32, 8

#: The task of each sample; None is one task without an index.
MIXES = {
    "one task": None,
    f"{TASKS} tasks, even": [i % TASKS for i in range(SAMPLES)],
    f"{TASKS} tasks, all rows of one": [0] * SAMPLES,
}

#: Kernels whose blocks do the same work, whatever the mix: a sample of their blocks is counted.
ALIKE = ("generate", "gram", "fold", "adapter_forward", "forward", "rows", "backward", "finish")


def step(ops, mix: str, rows: int) -> None:
    """Launch every kernel of one training step with ``rows`` rows."""
    d, b = SHAPES["T5-base"]
    spec, tasks = AdapterSpec(AdapterLayout(d, b), "gelu_new"), MIXES[mix]
    T = 1 if tasks is None else TASKS
    index = None if tasks is None else torch.tensor(tasks)
    E, G, g0 = torch.zeros(1, T, 64), torch.zeros(1, spec.layout.numel, 64), torch.zeros(1, spec.layout.numel)
    ops.generate_weights(E, G, g0)
    packed = random_packed(spec.layout, T).float()
    folded = Folded(*ops.fold(packed, spec.layout, torch.bfloat16))
    x, g = (torch.randn(SAMPLES, rows // SAMPLES, d).bfloat16() for _ in range(2))
    _, saved = ops.adapter_forward(x, folded, spec, index, True)
    ops.adapter_backward(g, x, Saved(*saved), packed, folded, spec, index, True, True)


def spread(ran: Ran, count: str, scale: int = 1) -> str:
    """min / median / max over the blocks; a single number where they agree."""
    values = [block[count] / scale for block in ran.blocks]
    three = [f"{value:,.0f}" for value in (min(values), statistics.median(values), max(values))]
    return three[0] if len(set(three)) == 1 else " / ".join(three)


def row(kernels: str, mix: str, ran: Ran) -> dict[str, object]:
    blocks = ran.grid[0] * ran.grid[1] * ran.grid[2]
    return {
        "kernels": kernels, "kernel": ran.kernel, "mix": mix, "blocks": blocks, "counted": len(ran.blocks),
        "instructions": spread(ran, "instructions"), "barriers": spread(ran, "barriers"), "mma": spread(ran, "mma"),
        "KB read": spread(ran, "global_bytes_read", 1000), "KB written": spread(ran, "global_bytes_written", 1000),
        "KB of shared memory": spread(ran, "shared_bytes", 1000),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["triton"], choices=["triton", "cuda"])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--mix", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--only", nargs="+", help="report only these kernels")
    parser.add_argument("--sample", type=int, default=12, help="blocks that are counted of a kernel with equal blocks")
    parser.add_argument("--write", action="store_true", help=f"record in {records.RESULTS}")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def choose(name: str, grid) -> list | None:
        if options.only and name not in options.only and name in ALIKE:
            return []
        return evenly(grid, options.sample) if name in ALIKE else None

    found = []
    for kernels in options.kernels:
        for mix in options.mix:
            torch.manual_seed(0)
            with interpreted(kernels, options.arch, hazards=False, choose=choose) as (ops, ran):
                step(ops, mix, options.rows)
            for launch in ran:
                if launch.blocks and (not options.only or launch.kernel in options.only):
                    found.append(row(kernels, mix, launch))
                    print(*found[-1].values(), sep=" | ", flush=True)
    if options.write:
        command = "python tools/ptx_counts.py --write"
        if len(sys.argv) > 2:
            command = "python tools/ptx_counts.py " + " ".join(sys.argv[1:])
        records.write("ptx_counts", "What a block of each GPU kernel does", command, found, arch=options.arch)


if __name__ == "__main__":
    main()
