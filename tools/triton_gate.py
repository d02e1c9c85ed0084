"""Compile every Triton kernel as its host launches it, for GPUs that are not there, and report what comes out.

    python tools/triton_gate.py [--write] [--arch 80 90 100] [--dtype bf16 fp16 fp32 tf32] [--shape base large/8]

Nothing runs: the hosts are called with CPU tensors, each launch is caught and handed to ``triton.compile`` with the
types and alignments that it would have had, and the tools of Triton's wheel take the machine code apart. Registers,
shared memory and instructions are facts of the compiled code, and how many blocks fit on a multiprocessor follows from
them; how fast it is, only a GPU can say. ``--write`` records all combinations in ``results/triton_gate.json``, to which
``tests/test_triton_gate.py`` holds later code, and in docs/triton_gate.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from machine_code import blocks_per_multiprocessor, take_apart
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hyperformer_fast.kernels import entry, tiles
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.reference import Folded, Saved

#: d, b, pre-norm: T5-small, base and large with the published reduction factor of 32, and with those named.
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
#: tf32 is float32 under ``torch.set_float32_matmul_precision("high")``.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
#: Kernels of which tf32 makes another one.
ROUNDED = ("adapter_forward", "rows", "weights")

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "tools/results/triton_gate.json", ROOT / "docs/triton_gate.md"

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


@dataclasses.dataclass
class Launch:
    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]


@dataclasses.dataclass
class Compiled:
    """Machine code in numbers; the last six count instructions, wherever they stand."""

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
    tf32: int  #: of those, products of float32 rounded to tf32
    wide_loads: int  #: of 16 bytes a thread, asynchronous ones included
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


@contextlib.contextmanager
def caught_launches(arch: int) -> Iterator[list[Launch]]:
    """Within it, kernels are not run but noted; the tile table believes in a GPU of ``arch``."""
    launches: list[Launch] = []

    def note(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        launches.append(Launch(self, arguments, {k: v for k, v in kwargs.items() if k.startswith("num_")}))

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(tiles, "architecture", lambda device: arch),
        mock.patch.object(tiles, "_table", dict),  # the rules, not what somebody tuned here
    ):
        yield launches


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches_of(
    d: int, b: int, dtype: torch.dtype, arch: int, pre_norm: bool = False, B: int = 4, rows: int = 64
) -> list[Launch]:
    """One training step's launches for an adapter of two tasks, in order."""
    layout = AdapterLayout(d, b, pre_norm)
    E, G, g0 = torch.zeros(1, 2, 64), torch.zeros(1, layout.numel, 64), torch.zeros(1, layout.numel)
    x, index = torch.zeros(B, rows, d, dtype=dtype), torch.zeros(B, dtype=torch.int64)
    with caught_launches(arch) as launches:
        packed = entry.generate_weights(E, G, g0)[0]
        folded: Folded = entry.fold(packed, layout, dtype)
        _, saved = entry.adapter_forward(x, folded, layout, "gelu_new", index, True)
        saved = Saved(*saved)
        entry.adapter_backward(x, x, saved, packed, folded, layout, "gelu_new", index, True, True)
    return launches


def compile_launch(launch: Launch, arch: int):
    """The kernel for this launch, every pointer 16-byte aligned as torch allocates it, lengths not specialised on."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or launch.kernel.params[i].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


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
    """Compile and measure; what does not depend on the dtype (generation, with float32 masters) once only."""
    for arch in architectures:
        for shape in shapes:
            for dtype in dtypes:
                d, b, pre_norm = SHAPES[shape]
                with matmul_precision("high" if dtype == "tf32" else "highest"):
                    launches = launches_of(d, b, DTYPES[dtype], arch, pre_norm)
                for launch in launches:
                    name = launch.kernel.__name__.removesuffix("_kernel")
                    if dtype == "tf32" and name not in ROUNDED:
                        continue
                    masters_only = name in ("generate", "finish")
                    if masters_only and dtype != dtypes[0]:
                        continue
                    kind = "fp32" if masters_only else dtype
                    constants = launch.arguments
                    tile = "x".join(str(constants[n]) for n in ("BN", "BM", "BP", "BK", "BB") if constants.get(n))
                    tile += f", {launch.options['num_warps']} warps" + (", kept" if constants.get("KEEP") else "")
                    yield Compiled(name, shape, kind, arch, tile, **measure(compile_launch(launch, arch), arch))


def faults(compiled: Compiled) -> list[str]:
    """What the gate does not let pass."""
    found = []
    known = compiled.kernel == "fold" and SHAPES[compiled.shape][1] > 64  # docs/triton_gate.md
    if (compiled.stack or compiled.spills) and not known:
        found.append(f"{compiled.stack} bytes of stack, {compiled.spills} local accesses")
    if compiled.dtype != "fp32" and compiled.kernel in ROUNDED and not compiled.tensor:
        found.append("no tensor-core products")
    if compiled.kernel in ("adapter_forward", "rows") and compiled.dtype != "tf32" and compiled.tf32:
        found.append(f"{compiled.tf32} products in tf32, where columns that nearly cancel meet")
    # out or dx in wide pieces; z or dz, and the numbers that a row has one of, are narrow by nature
    if compiled.kernel in ("adapter_forward", "rows") and (not compiled.wide_stores or compiled.narrow_stores > 4):
        found.append(f"{compiled.narrow_stores} narrow stores, {compiled.wide_stores} wide")
    return found


def key(compiled: Compiled) -> str:
    return f"{compiled.kernel}, {compiled.shape}, {compiled.dtype}, sm_{compiled.arch}"


def recorded() -> dict[str, int]:
    """Blocks per multiprocessor of what was last recorded, by :func:`key`."""
    return {key(Compiled(**entry)): entry["blocks"] for entry in json.loads(RECORD.read_text())["compiled"]}


def table(results: list[Compiled]) -> str:
    names = [field.name for field in dataclasses.fields(Compiled)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + " --- |" * len(names)]
    for result in results:
        lines.append("| " + " | ".join(str(getattr(result, name)) for name in names) + " |")
    return "\n".join(lines)


def write(results: list[Compiled]) -> None:
    entries = ",\n".join("  " + json.dumps(dataclasses.asdict(result)) for result in results)
    RECORD.write_text(f'{{"triton": "{triton.__version__}", "compiled": [\n{entries}\n]}}\n')
    head, _, rest = PAGE.read_text().partition("<!-- gate -->")
    tail = rest.partition("<!-- /gate -->")[2]
    PAGE.write_text(f"{head}<!-- gate -->\n{table(results)}\n<!-- /gate -->{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=DTYPES)
    parser.add_argument("--shape", nargs="+", default=tuple(SHAPES), choices=SHAPES)
    parser.add_argument("--write", action="store_true", help=f"record in {RECORD.name} and {PAGE.name}")
    options = parser.parse_args()
    results = []
    for result in gate(tuple(options.shape), tuple(options.dtype), tuple(options.arch)):
        results.append(result)
        print(result, *faults(result), flush=True)
    if options.write:
        write(results)
    sys.exit(any(faults(result) for result in results))


if __name__ == "__main__":
    main()
