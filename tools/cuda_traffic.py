"""What the CUDA kernels ask for, counted from their launches, and what an H100 should make of it, beside Triton's.

    python tools/cuda_traffic.py [--write]

Written down to be compared with a measurement, and is none. The rule is triton_traffic.py's: the largest of each tensor
once at the memory's bandwidth, all accesses at the second-level cache's, products at their units' peak, and the latency
of what one block does in turn; and a launch. For bfloat16 x, one task unless said.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from hyperformer_fast.layout import AdapterLayout

PAGE = Path(__file__).parents[1] / "docs/cuda_gate.md"
TRITON_PAGE = PAGE.with_name("triton_gate.md")
SHAPES = {"T5-small": (512, 16), "T5-base": (768, 24), "T5-large": (1024, 32)}
#: As in triton_traffic.py, which needs triton; a step is an exposed load or a reduction over a block. A barrier of the
#: grid is assumed to cost as much.
MEMORY, TENSOR, FLOAT32, FLOAT64, PROCESSORS = 3.35e12, 989e12, 67e12, 67e12, 132
CACHE, LAUNCH, STEP = 5.5e12, 2e-6, 1e-6
PIVOT = 0.2
EMBEDDING, UNIT = 64, 32
#: csrc/cuda's kernels, and what does their work in Triton.
TRITON = {
    "generate": "generate", "fold": "fold", "forward": "adapter_forward", "backward": "rows",
    "weight_gradients": "weights", "finish": "finish",
}  # fmt: skip


class Work(NamedTuple):
    """A launch's: blocks; bytes of each tensor once, and of all accesses; flops by unit; steps of a block in turn."""

    blocks: int
    once: float
    asked: float
    tensor: float = 0
    float32: float = 0
    float64: float = 0
    steps: float = 0

    def seconds(self) -> tuple[float, str]:
        share = min(1.0, self.blocks / PROCESSORS)
        times = {
            "memory": self.once / MEMORY, "cache": self.asked / CACHE / share,
            "tensor cores": self.tensor / TENSOR / share, "float32": self.float32 / FLOAT32 / share,
            "float64": self.float64 / FLOAT64 / share, "latency": self.steps * STEP,
        }  # fmt: skip
        bound = max(times, key=times.get)
        return times[bound], bound


def tile(b: int) -> int:
    return next(BB for BB in (16, 32, 64, 128) if b <= BB)


def folded_bytes(d: int, b: int) -> float:
    """A task's, but for the projections: vectors, scale and root."""
    return 4 * (b + 2 * d + b + (b + 1) ** 2)


def generate(d: int, b: int, n: int) -> Work:
    P, groups = AdapterLayout(d, b).numel, -(-n // 32)
    G, E, packed = 4 * P * EMBEDDING, 4 * n * EMBEDDING, 4 * n * P
    stripes = -(-P // 128)
    return Work(stripes * groups, G + E + packed, groups * G + stripes * E + packed, float32=2 * n * P * EMBEDDING)


def fold(d: int, b: int, n: int) -> Work:
    rows_of_a_tile = 16 if b > 64 else 64 if b > 32 else 128
    P, tiles, batches = AdapterLayout(d, b).numel, -(-d // rows_of_a_tile), -(-b * d // 4096)
    written = 4 * b * d + folded_bytes(d, b)
    # W_d, the column sums, the Gram matrix, W_g, each after the one before; a pivot is a barrier and a square root
    steps = 2 * batches + 2 * tiles + PIVOT * b
    return Work(n, n * (4 * P + written), n * (4 * (P + 2 * b * d) + written), float64=n * d * b * b, steps=steps)


def forward(d: int, b: int, N: int) -> Work:
    weights, blocks = 2 * b * d, -(-N // UNIT)
    block = 2 * weights + folded_bytes(d, b)  # the other half of its rows finds them in the first-level cache
    rows = 2 * N * (2 * d + b) + 4 * N
    return Work(
        blocks, rows + 2 * weights, rows + blocks * block, 4 * blocks * UNIT * d * tile(b), N * (b * b + 20 * b + 5 * d)
    )


def few_rows(d: int, b: int, N: int, T: int = 8) -> Work:
    weights = 4 * b * d + folded_bytes(d, b)
    rows = 2 * N * (2 * d + b) + 4 * N
    # the weights, the bottleneck, out
    return Work(N, rows + min(N, T) * weights, rows + N * weights, float32=8 * N * d * b, steps=3)


def backward(d: int, b: int, N: int) -> Work:
    weights, blocks = 2 * b * d, -(-N // UNIT)
    once = 2 * N * (2 * d + 2 * b) + 12 * N
    asked = once + 2 * N * d + blocks * (2 * weights + folded_bytes(d, b))
    return Work(blocks, once + 2 * weights, asked, 4 * blocks * UNIT * d * tile(b), N * (3 * b * b + 40 * b + 8 * d))


def splits(d: int, b: int, N: int) -> tuple[int, int]:
    """Stretches of rows, and blocks of each, as csrc/cuda/dispatch.cu has them."""
    units, chunks = -(-N // UNIT), -(-d // 128)
    of_a_split = chunks + (1 if b <= 32 else 2 if b <= 64 else 4)
    wanted = max(1, min((units + 3) // 4, 264 // of_a_split))
    each = -(-units // wanted)
    return -(-units // each), of_a_split


def partial_bytes(d: int, b: int) -> int:
    return 4 * ((2 * b + 2) * d + b * b + 3 * b + 2)


def weight_gradients(d: int, b: int, N: int) -> Work:
    count, of_a_split = splits(d, b, N)
    rows, small, part = 4 * N * d, 2 * N * 2 * b + 12 * N, count * partial_bytes(d, b)
    units = -(-(N // UNIT) // count)
    flops = N * (2 * b * b + of_a_split * 20 * b + 4 * d)
    return Work(
        count * of_a_split,
        rows + small + part,
        rows + of_a_split * small + part,
        4 * N * d * tile(b),
        flops,
        steps=units,
    )


def finish(d: int, b: int, N: int) -> Work:
    count, columns = splits(d, b, N)[0], 16
    part, P = count * partial_bytes(d, b), 4 * AdapterLayout(d, b).numel
    blocks = -(-d // columns)
    asked = part + blocks * count * 4 * (b * b + 3 * b) + 2 * P
    return Work(blocks, part + 2 * P, asked, float32=2 * d * b * b, steps=3)


def site(d: int, b: int, N: int, T: int = 8) -> list[tuple[str, Work]]:
    apply = ("few_rows", few_rows(d, b, N, T)) if N <= 64 else ("forward", forward(d, b, N))
    return [("generate", generate(d, b, T)), ("fold", fold(d, b, T)), apply]


def triton_predictions() -> dict[tuple[str, str, str], str]:
    """By model, kernel and what it is of; as docs/triton_gate.md has them."""
    found = {}
    for line in TRITON_PAGE.read_text().partition("<!-- traffic -->")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and re.match(r"[\d.]+ \(", cells[6]):
            found[cells[0], cells[1], cells[2]] = cells[6]
    return found


def rows() -> list[tuple]:
    triton, made = triton_predictions(), []

    def add(model: str, kernel: str, of: str, work: Work) -> None:
        seconds, bound = work.seconds()
        theirs = triton.get((model, TRITON.get(kernel, ""), of), "-")
        megabytes = (f"{n / 1e6:.1f}" for n in (work.once, work.asked))
        made.append(
            (model, kernel, of, work.blocks, *megabytes, f"{1e6 * (seconds + LAUNCH):.1f} ({bound})", "", theirs)
        )

    for kernel in (generate, fold):
        add("T5-base", kernel.__name__, "24 sites, 8 tasks", kernel(*SHAPES["T5-base"], 24 * 8))
    for model, Ns in (("T5-base", (1024, 4096, 16384)), ("T5-small", (1024,)), ("T5-large", (1024,))):
        for N in Ns:
            for kernel in (forward, backward, weight_gradients, finish):
                add(model, kernel.__name__, f"N = {N}", kernel(*SHAPES[model], N))
    for N in (1, 8, 64):
        add("T5-base", "few_rows", f"N = {N}, 8 tasks", few_rows(*SHAPES["T5-base"], N))
    for N in (1, 64, 1024):
        parts = [work.seconds()[0] for _, work in site(*SHAPES["T5-base"], N)]
        of, blank = f"N = {N}, 8 tasks", ("", "", "")
        made.append(("T5-base", "site", of, *blank, f"{1e6 * (sum(parts) + LAUNCH + 2 * STEP):.1f} (sum)", "", "-"))
        made.append(("T5-base", "three launches", of, *blank, f"{1e6 * (sum(parts) + 3 * LAUNCH):.1f} (sum)", "", "-"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"record in {PAGE.name}")
    options = parser.parse_args()
    columns = (
        "model", "kernel", "of", "blocks", "MB, each tensor once", "MB asked for", "predicted us", "measured us",
        "Triton's, predicted us",
    )  # fmt: skip
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows())]
    print(*lines, sep="\n")
    if options.write:
        head, _, rest = PAGE.read_text().partition("<!-- traffic -->")
        table = "\n".join(lines)
        PAGE.write_text(f"{head}<!-- traffic -->\n{table}\n<!-- /traffic -->{rest.partition('<!-- /traffic -->')[2]}")


if __name__ == "__main__":
    main()
