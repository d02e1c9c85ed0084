"""Count what the Triton kernels of the pieces between a T5's matrix products load and store, and predict their time.

    TRITON_INTERPRET=1 python tools/triton_pieces_traffic.py [--batch 32] [--length 128] [--write]

The step is that of a T5-base in bfloat16 with float32 norm weights and dropout 0.1: 12 blocks of an encoder, 12 of a
decoder with a quarter of the tokens. Bytes are counted in Triton's interpreter as in triton_traffic.py, for a
sixteenth of the samples, and multiplied; only the bias of the attention, which the samples share, counts once.
Operations follow from the shapes. ``--write`` records the table in tools/results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import records
import torch
from device import H100, Work
from traffic import MEASURED, PREDICTED, row
from triton_pieces import SIZES, VOCABULARY, calls

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.watch import Launch, watch  # noqa: E402

from hyperformer_fast.backends.triton import _kernels, interpreted  # noqa: E402
from hyperformer_fast.kernels import residual  # noqa: E402

MODEL, LAYERS = "base", 12
#: The part of the samples for which bytes are counted is one of so many.
PARTS = 16
#: Instructions for each number that Philox decides about: a call has ten rounds of two products, each with a high and a
#: low half, and four exclusive ors, and gives eight numbers; each is cut out, compared and selected.
PHILOX = 10 * 8 / 8 + 3
#: Operations for each number of a kernel that are not Philox's, an exponential counted as twenty.
FLOATS = {
    "residual": 8, "residual_backward": 12, "sum_parts": 1, "act_dropout": 3, "act_dropout_backward": 4,
    "softmax_dropout": 28, "softmax_dropout_backward": 9, "cross_entropy": 52,
}  # fmt: skip
#: How often a step makes each call of triton_pieces.py, by stack. The first norm of a stack has no sum before it, and
#: the two dropouts of its embeddings and of its output are PyTorch's.
COUNTS = {
    "encoder": {"sum and norm": 2 * LAYERS, "norm": 1, "relu": LAYERS, "keys": LAYERS},
    "decoder": {"sum and norm": 3 * LAYERS, "norm": 1, "relu": LAYERS, "keys": LAYERS, "smoothed": 1},
    "cross-attention": {"keys": LAYERS},
}


def work_of(launch: Launch, numbers: int, shared: int) -> Work:
    """``PARTS`` times a launch that computes so many numbers; ``shared`` bytes are the same for all parts. What bias
    and mask are expanded to was counted as if it lay in memory."""
    philox = PHILOX * numbers if launch.loaded["SEED"] else 0
    programs = launch.programs if launch.kernel == "sum_parts" else PARTS * launch.programs
    expanded = 4 * numbers if shared else 0
    once = PARTS * (launch.once - expanded) + shared
    floats = FLOATS[launch.kernel] * numbers
    return Work(programs, once, PARTS * launch.asked, float32=PARTS * floats, integer=PARTS * philox)


def step(B: int, L: int) -> Iterator[tuple[str, Launch, Work, int]]:
    """The launches of one step that differ, each with how often it is made."""
    sizes, short = SIZES[MODEL], L // 4
    for stack, length, keys in (("encoder", L, L), ("decoder", short, short), ("cross-attention", short, L)):
        N = B // PARTS * length
        numbers = {"keys": N * sizes.heads * keys, "relu": N * sizes.d_ff, "smoothed": N * VOCABULARY}
        for variant, call in calls(sizes, torch.bfloat16, B // PARTS, length, rows=N, keys=keys).items():
            kind, *_ = variant.removeprefix(f"{keys} ").split(",")
            if kind not in COUNTS[stack]:
                continue
            with watch() as seen:
                call()
            for launch in seen.launches:
                shared = 2 * sizes.heads * length * keys if launch.loaded["BIAS"] else 0
                work = work_of(launch, numbers.get(kind, N * sizes.d), shared)
                yield f"{stack}, N = {PARTS * N}, {variant}", launch, work, COUNTS[stack][kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--write", action="store_true", help=f"record in {records.RESULTS}")
    options = parser.parse_args()
    if not interpreted():
        sys.exit("set TRITON_INTERPRET=1: this counts in Triton's interpreter")
    _kernels()
    residual._STRETCHES //= PARTS
    found, launches, seconds, once, asked = [], 0, 0.0, 0.0, 0.0
    for of, launch, work, count in step(options.batch, options.length):
        found.append({**row("T5-base", launch.kernel, of, work), "times a step": count})
        print(*found[-1].values(), sep=", ", flush=True)
        launches += count
        seconds += count * (H100.time(work)[0] + H100.launch)
        once += count * work.once
        asked += count * work.asked
    found.append({
        "model": "T5-base", "kernel": "all", "of": f"one step, B = {options.batch}, L = {options.length}",
        "blocks": "", "MB, each tensor once": f"{once / 1e6:.0f}", "MB asked for": f"{asked / 1e6:.0f}",
        PREDICTED: f"{1e6 * seconds:.0f}", MEASURED: "", "times a step": launches,
    })  # fmt: skip
    print(*found[-1].values(), sep=", ")
    if options.write:
        command = "TRITON_INTERPRET=1 python tools/triton_pieces_traffic.py --write"
        title = "Predicted times of the Triton kernels of the pieces on an H100"
        records.write("triton_traffic_pieces", title, command, found)


if __name__ == "__main__":
    main()
