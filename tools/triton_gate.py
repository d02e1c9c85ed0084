"""Compile report of the Triton kernels: registers, shared memory, spills and instructions, without a GPU.

    python tools/triton_gate.py [--write] [--arch 80 90 100] [--dtype bf16 fp16 fp32 tf32] [--shape base large/8]
    python tools/triton_gate.py --pieces [--write] [--arch 80 90 100] [--dtype bf16 fp32] [--shape base v1.1-xxl]
    python tools/triton_gate.py --triton DIR... [--write] [--arch 80 86 89 90 100 120]

The second form compiles the pieces between a T5's matrix products (triton_pieces.py). The third compiles every
combination of dtypes, norms, alignment and tasks with other versions of Triton (triton_combinations.py).

Nothing runs: the hosts are called with CPU tensors, and each launch is caught and handed to ``triton.compile`` with the
types and alignments that it would have had on a GPU. The report says nothing about speed. ``--write`` records it in
tools/results; tests/test_triton_gate.py fails where later code is worse than the record. Exits with 1 where a kernel
has a fault (see ``faults``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import records
import torch
import triton
from device import blocks_per_multiprocessor
from machine_code import take_apart
from triton_launches import Launch, caught_launches, compile_launch
from triton_pieces import KERNELS, SIZES
from triton_pieces import launches_of as launches_of_pieces

from hyperformer_fast.kernels import entry
from hyperformer_fast.layout import AdapterLayout, AdapterSpec
from hyperformer_fast.reference import Folded, Saved

#: (d, b, pre-norm). T5-small, base and large with the published reduction factor of 32, or with the one named.
SHAPES = {
    "small": (512, 16, False),
    "base": (768, 24, False),
    "large": (1024, 32, False),
    "small/16": (512, 32, False),
    "base/16": (768, 48, False),
    "large/16": (1024, 64, False),
    "small/8": (512, 64, False),
    "base/8": (768, 96, False),
    "large/8": (1024, 128, False),
    "base, pre-norm": (768, 24, True),
}
ARCHITECTURES = (80, 90, 100)
#: tf32 is float32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
#: Kernels whose float32 products may be rounded to tf32: they compile to other code then.
ROUNDED = ("adapter_forward", "rows", "weights")

RECORD, RECORD_OF_PIECES = "triton_gate", "triton_gate_pieces"


@dataclasses.dataclass
class Compiled:
    """One kernel's machine code in numbers; the last seven count instructions where they stand in the code."""

    kernel: str
    shape: str
    dtype: str
    arch: int
    tile: str
    registers: int
    stack: int
    shared: int
    blocks: int  #: that fit on a multiprocessor at a time
    spills: int  #: local loads and stores
    tensor: int  #: tensor-core products
    tf32: int  #: those of float32 rounded to tf32
    wide_loads: int  #: 16 bytes a thread, asynchronous copies included
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def launches_of(
    d: int,
    b: int,
    dtype: torch.dtype,
    arch: int,
    pre_norm: bool = False,
    B: int = 4,
    rows: int = 64,
    *,
    post_norm: bool = True,
    masters: torch.dtype = torch.float32,
    aligned: bool = True,
    mixed: bool = True,
) -> list[Launch]:
    """One training step's launches for an adapter, in order.

    Args:
        dtype: of x.
        masters: the dtype of the embeddings and the generator, and so of the packed weights.
        aligned: whether the rows of x start at multiples of 16 bytes.
        mixed: two tasks and a task for each sample, instead of one task.
    """
    layout, T = AdapterLayout(d, b, pre_norm, post_norm), 2 if mixed else 1
    E, G, g0 = (torch.zeros(shape, dtype=masters) for shape in ((1, T, 64), (1, layout.numel, 64), (1, layout.numel)))
    x = torch.zeros(B, rows, d if aligned else d + 1, dtype=dtype)[..., :d]
    index = torch.zeros(B, dtype=torch.int64) if mixed else None
    with caught_launches(arch) as launches:
        packed = entry.generate_weights(E, G, g0)[0]
        folded: Folded = entry.fold(packed, layout, dtype)
        _, saved = entry.adapter_forward(x, folded, AdapterSpec(layout, "gelu_new"), index, True)
        saved = Saved(*saved)
        entry.adapter_backward(x, x, saved, packed, folded, AdapterSpec(layout, "gelu_new"), index, True, True)
    return launches


def measure(binary, arch: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        (code,) = take_apart(cubin)
    shared = binary.metadata.shared
    return {
        "registers": code.registers,
        "stack": code.stack,
        "shared": shared,
        "blocks": blocks_per_multiprocessor(code.registers, shared, binary.metadata.num_warps, arch),
        "spills": code.count("LDL|STL"),
        "tensor": code.count("[HD]MMA|HGMMA|UTC.*MMA"),
        "tf32": code.count(".*MMA.*TF32"),
        "wide_loads": code.count(r"(LDG|LDGSTS).*\.128"),
        "narrow_loads": code.count(r"(LDG|LDGSTS)(?!.*\.128)"),
        "wide_stores": code.count(r"STG.*\.128"),
        "narrow_stores": code.count(r"STG(?!.*\.128)"),
    }


def gate(shapes=tuple(SHAPES), dtypes=tuple(DTYPES), architectures=ARCHITECTURES) -> Iterator[Compiled]:
    """Compile and measure every combination; kernels whose code does not depend on the dtype of x appear once."""
    for arch in architectures:
        for shape in shapes:
            for dtype in dtypes:
                d, b, pre_norm = SHAPES[shape]
                with matmul_precision("tf32" if dtype == "tf32" else "ieee"):
                    launches = launches_of(d, b, DTYPES[dtype], arch, pre_norm)
                for launch in launches:
                    name = launch.kernel.__name__.removesuffix("_kernel")
                    if dtype == "tf32" and name not in ROUNDED:
                        continue
                    masters_only = name in ("generate", "gram", "schedule", "finish")
                    if masters_only and dtype != dtypes[0]:
                        continue
                    kind = "fp32" if masters_only else dtype
                    yield compiled(launch, shape, kind, arch)


def gate_pieces(shapes=tuple(SIZES), dtypes=("bf16", "fp32"), architectures=ARCHITECTURES) -> Iterator[Compiled]:
    """The same for the pieces between a T5's matrix products."""
    for arch in architectures:
        for shape in shapes:
            for dtype in dtypes:
                for variant, launch in launches_of_pieces(SIZES[shape], DTYPES[dtype], arch):
                    yield compiled(launch, f"{shape}, {variant}", dtype, arch)


def compiled(launch: Launch, shape: str, dtype: str, arch: int) -> Compiled:
    """Compile and measure one launch."""
    constants = launch.arguments
    tile = "x".join(str(constants[n]) for n in ("BN", "BM", "BP", "BK", "BB") if constants.get(n))
    tile += f", {launch.options['num_warps']} warps" + (", kept" if constants.get("KEEP") else "")
    return Compiled(launch.name, shape, dtype, arch, tile, **measure(compile_launch(launch, arch), arch))


def faults(compiled: Compiled) -> list[str]:
    """Why this kernel must not be released; empty if it may be."""
    found = []
    known = compiled.kernel == "fold" and SHAPES[compiled.shape][1] > 64  # docs/triton_gate.md
    if (compiled.stack or compiled.spills) and not known:
        found.append(f"{compiled.stack} bytes of stack, {compiled.spills} local accesses")
    if compiled.dtype != "fp32" and compiled.kernel in ROUNDED and not compiled.tensor:
        found.append("no tensor-core products")
    if compiled.kernel in ("adapter_forward", "rows") and compiled.dtype != "tf32" and compiled.tf32:
        found.append(f"{compiled.tf32} products in tf32, which is too coarse for columns that nearly cancel")
    # out and dx must be stored 16 bytes at a time; z, dz and the numbers that each row has one of cannot be, of which
    # the forward stores four, in two branches
    if compiled.kernel in ("adapter_forward", "rows") and (not compiled.wide_stores or compiled.narrow_stores > 8):
        found.append(f"{compiled.narrow_stores} narrow stores, {compiled.wide_stores} wide")
    # whole rows go 16 bytes at a time; numbers that a row has one of do not, nor does the seed
    narrow = compiled.narrow_stores > 2 or compiled.narrow_loads > 6 or not compiled.wide_stores
    if compiled.kernel in KERNELS and compiled.kernel != "sum_parts" and narrow:
        found.append(f"{compiled.narrow_loads} narrow loads, {compiled.narrow_stores} narrow stores")
    return found


def key(compiled: Compiled) -> str:
    return f"{compiled.kernel}, {compiled.shape}, {compiled.dtype}, sm_{compiled.arch}"


def recorded(record: str = RECORD) -> dict[str, int]:
    """Blocks per multiprocessor of the last record, by :func:`key`."""
    return {key(Compiled(**entry)): entry["blocks"] for entry in records.read(record)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", help="80 90 100 by default; all with --triton")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--shape", nargs="+", choices={**SHAPES, **SIZES})
    parser.add_argument("--pieces", action="store_true", help="the pieces between a T5's matrix products")
    parser.add_argument("--write", action="store_true", help=f"record in {records.RESULTS}")
    parser.add_argument(
        "--triton", type=Path, nargs="+", metavar="DIR", help="folders that hold other versions of Triton"
    )
    options = parser.parse_args()
    if options.triton:
        import triton_combinations

        sys.exit(triton_combinations.main(options.triton, options.arch, options.write))
    chosen = {"shapes": options.shape, "dtypes": options.dtype, "architectures": options.arch}
    chosen = {name: tuple(values) for name, values in chosen.items() if values}
    results = []
    for result in (gate_pieces if options.pieces else gate)(**chosen):
        results.append(result)
        print(result, *faults(result), flush=True)
    if options.write:
        record, what = (RECORD_OF_PIECES, "of the pieces ") if options.pieces else (RECORD, "")
        records.write(
            record, f"What the Triton kernels {what}compile to",
            f"python tools/triton_gate.py {'--pieces ' * options.pieces}--write",
            [dataclasses.asdict(result) for result in results], triton=triton.__version__,
        )  # fmt: skip
    sys.exit(any(faults(result) for result in results))


if __name__ == "__main__":
    main()
