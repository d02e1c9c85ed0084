"""Count what the CUDA kernels load, store and compute, and predict their time on an H100, beside the Triton kernels'.

    python tools/cuda_traffic.py [--write]

Bytes and operations follow from the kernels' tiling, for bfloat16 x and one task unless said. The prediction is the
roofline of device.py plus a launch. It is written down before any measurement, to be compared with one. ``--write``
records it in tools/results.
"""

from __future__ import annotations

import argparse

import records
from device import H100, Work
from traffic import PREDICTED, SHAPES, row

from hyperformer_fast.layout import AdapterLayout

#: A pivot of the fold, in waits: a barrier and a reciprocal square root.
PIVOT = 0.2
EMBEDDING = 64  #: numbers in an adapter's embedding
UNIT = 32  #: rows of a block
TRITON_PREDICTED = "Triton's, predicted us"
#: The Triton kernel that does the work of each CUDA kernel.
TRITON = {
    "generate": "generate", "fold": "fold", "forward": "adapter_forward", "backward": "rows",
    "weight_gradients": "weights", "finish": "finish",
}  # fmt: skip


def tile(b: int) -> int:
    """The limit of b for which the kernel that serves ``b`` is instantiated."""
    return next(BB for BB in (16, 32, 64, 128) if b <= BB)


def folded_bytes(d: int, b: int) -> float:
    """Bytes of one task's folded weights without the two projections: vectors, scale and root."""
    return 4 * (b + 2 * d + b + (b + 1) ** 2)


def generate(d: int, b: int, n: int) -> Work:
    P, groups = AdapterLayout(d, b).numel, -(-n // 64)
    G, E, packed = 4 * P * EMBEDDING, 4 * n * EMBEDDING, 4 * n * P
    stripes = -(-P // 128)
    return Work(stripes * groups, G + E + packed, groups * G + stripes * E + packed, float32=2 * n * P * EMBEDDING)


def fold(d: int, b: int, n: int) -> Work:
    P, fits = AdapterLayout(d, b).numel, 4 * d * (b + 1) <= 90 << 10
    written = 4 * b * d + folded_bytes(d, b)
    # all loads, of which W_d's are two batches; means; the Gram matrix and its eight warps' sums; W_g
    waits = 6 + PIVOT * b if fits else 6 + 3 * -(-4 * d * (b + 1) // (64 << 10)) + PIVOT * b
    read = 4 * (P if fits else P + 2 * b * d)
    return Work(n, n * (4 * P + written), n * (read + written), float64=n * d * b * b, waits=waits)


def forward(d: int, b: int, N: int) -> Work:
    weights, blocks = 2 * b * d, -(-N // UNIT)
    # a block's second warp row finds the weights in the first-level cache
    block = 2 * weights + folded_bytes(d, b)
    rows = 2 * N * (2 * d + b) + 4 * N
    return Work(
        blocks, rows + 2 * weights, rows + blocks * block, 4 * blocks * UNIT * d * tile(b), N * (b * b + 20 * b + 5 * d)
    )


def few_rows(d: int, b: int, N: int, T: int = 8) -> Work:
    weights = 4 * b * d + folded_bytes(d, b)
    rows = 2 * N * (2 * d + b) + 4 * N
    # it waits for the weights, for the bottleneck and for out
    return Work(N, rows + min(N, T) * weights, rows + N * weights, float32=8 * N * d * b, waits=3)


def record_bytes(b: int) -> int:
    """Bytes of what a row leaves for the weight gradients (csrc/cuda/row_record.cuh)."""
    return 4 * tile(b) + 16


def backward(d: int, b: int, N: int) -> Work:
    weights, blocks = 2 * b * d, -(-N // UNIT)
    once = 2 * N * (2 * d + b) + N * (record_bytes(b) + 4)
    asked = once + 2 * N * d + blocks * (2 * weights + folded_bytes(d, b))
    return Work(blocks, once + 2 * weights, asked, 4 * blocks * UNIT * d * tile(b), N * (3 * b * b + 40 * b + 8 * d))


def segments(d: int, b: int, N: int, T: int = 1) -> tuple[int, int]:
    """How many segments have rows, and the blocks of each, by the rules of csrc/cuda/dispatch.cu and schedule.cuh.

    With several tasks, each has the same number of units."""
    units, chunks = -(-N // UNIT), -(-d // 128)
    of_a_segment = chunks + (1 if b <= 32 else 2 if b <= 64 else 4)
    wanted = max(1, min((units + 3) // 4, 132 // of_a_segment))
    share = -(-units // wanted)
    return T * -(-(units // T) // share) if T > 1 else -(-units // share), of_a_segment


def partial_bytes(d: int, b: int) -> int:
    return 4 * ((2 * b + 2) * d + b * b + 3 * b + 2)


def weight_gradients(d: int, b: int, N: int, T: int = 1) -> Work:
    count, of_a_segment = segments(d, b, N, T)
    rows, records, part = 4 * N * d, N * record_bytes(b), count * partial_bytes(d, b)
    # the first unit's copies and the last store; the others' copies are in flight two units ahead
    return Work(
        count * of_a_segment,
        rows + records + part,
        rows + of_a_segment * records + part,
        4 * N * d * (tile(b) + 8),
        N * 6 * b * b,
        waits=2,
    )


def finish(d: int, b: int, N: int, T: int = 1, sites: int = 1) -> Work:
    count, columns = segments(d, b, N, T)[0], 16
    part, P = count * partial_bytes(d, b), 4 * T * AdapterLayout(d, b).numel
    blocks = -(-d // columns)
    asked = part + blocks * count * 4 * (b * b + 3 * b) + 2 * P
    return Work(sites * T * blocks, sites * (part + 2 * P), sites * asked, float32=sites * T * 2 * d * b * b, waits=3)


def site(d: int, b: int, N: int, T: int = 8) -> list[tuple[str, Work]]:
    apply = ("few_rows", few_rows(d, b, N, T)) if N <= 64 else ("forward", forward(d, b, N))
    return [("generate", generate(d, b, T)), ("fold", fold(d, b, T)), apply]


def triton_predictions() -> dict[tuple[str, str, str], str]:
    """The Triton kernels' predicted times, by model, kernel and what they are of."""
    return {(row["model"], row["kernel"], row["of"]): row[PREDICTED] for row in records.read("triton_traffic")}


def rows() -> list[dict]:
    triton, made = triton_predictions(), []

    def add(model: str, kernel: str, of: str, work: Work) -> None:
        theirs = triton.get((model, TRITON.get(kernel, ""), of), "-")
        made.append(row(model, kernel, of, work) | {TRITON_PREDICTED: theirs})

    def add_sum(kernel: str, of: str, seconds: float, what: str = "sum") -> None:
        blank = dict.fromkeys(made[0], "")
        cells = {"model": "T5-base", "kernel": kernel, "of": of, PREDICTED: f"{1e6 * seconds:.1f} ({what})"}
        made.append(blank | cells | {TRITON_PREDICTED: "-"})

    for kernel in (generate, fold):
        add("T5-base", kernel.__name__, "24 sites, 8 tasks", kernel(*SHAPES["T5-base"], 24 * 8))
    for model, Ns in (("T5-base", (1024, 4096, 16384)), ("T5-small", (1024,)), ("T5-large", (1024,))):
        for N in Ns:
            for kernel in (forward, backward, weight_gradients, finish):
                add(model, kernel.__name__, f"N = {N}", kernel(*SHAPES[model], N))
    for N in (4096, 16384):
        for kernel in (weight_gradients, finish):
            add("T5-base", kernel.__name__, f"N = {N}, 8 tasks", kernel(*SHAPES["T5-base"], N, 8))
    for T in (1, 8):
        seconds = H100.time(finish(*SHAPES["T5-base"], 4096, T, 24))[0] + H100.launch
        add_sum("finish of 24 sites, a site's share", f"N = 4096, {T} task{'s' * (T > 1)}", seconds / 24, "share")
    add("T5-base", "fold", "8 adapters", fold(*SHAPES["T5-base"], 8))
    for N in (1, 8, 64):
        add("T5-base", "few_rows", f"N = {N}, 8 tasks", few_rows(*SHAPES["T5-base"], N))
    for N in (1, 64, 1024):
        parts = sum(H100.time(work)[0] for _, work in site(*SHAPES["T5-base"], N))
        add_sum("site", f"N = {N}, 8 tasks", parts + H100.launch + 2 * H100.wait)
        add_sum("three launches", f"N = {N}, 8 tasks", parts + 3 * H100.launch)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"record in {records.RESULTS}")
    options = parser.parse_args()
    found = rows()
    print(records.record_table(found))
    if options.write:
        command = "python tools/cuda_traffic.py --write"
        records.write("cuda_traffic", "Predicted times of the CUDA kernels on an H100", command, found)


if __name__ == "__main__":
    main()
