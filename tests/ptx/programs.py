"""Tiny PTX kernels for the tests: a body of instructions, wrapped in a kernel that loads and stores arrays."""

from __future__ import annotations

import numpy as np

from .block import INSTRUCTION_LIMIT, Block
from .memory import Memory
from .parse import Kernel

HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<32>;
.reg .b16 %h<64>;
.reg .b32 %r<128>;
.reg .b64 %d<128>;
"""
#: The widths that a value of so many bytes has in registers.
PREFIX = {1: "h", 2: "h", 4: "r", 8: "d"}


def kernel_text(body: str, names=(), shared: int = 0, declarations: str = "") -> str:
    """A kernel with one pointer parameter per name, loaded into ``%name``, and with ``memory``, a shared array."""
    parameters = ",\n".join(f".param .u64 p_{name}" for name in names)
    loads = "\n".join(f".reg .b64 %{name};\nld.param.u64 %{name}, [p_{name}];" for name in names)
    array = f".shared .align 1024 .b8 memory[{shared}];" if shared else ""
    return f"{HEADER}.visible .entry k({parameters})\n{{{REGISTERS}{declarations}\n{array}\n{loads}\n{body}\nret;\n}}\n"


def run(
    body: str,
    threads: int = 32,
    shared: int = 0,
    declarations: str = "",
    hazards: bool = True,
    limit: int = INSTRUCTION_LIMIT,
    **arrays,
) -> Block:
    """Run one block of a kernel whose pointers are ``arrays``, and return it."""
    kernel = Kernel(kernel_text(body, arrays, shared, declarations))
    memory, parameters = Memory(), {}
    for name, array in arrays.items():
        parameters[f"p_{name}"] = np.uint64(memory.add_array(array, name)).tobytes()
    block = Block(kernel, memory, parameters, (0, 0, 0), (1, 1, 1), threads, 0, hazards)
    block.run(limit)
    return block


def compute(instruction: str, result, *inputs, declarations: str = "") -> np.ndarray:
    """Apply an instruction to arrays, one lane per element: ``compute("add.s32 {d}, {0}, {1};", np.int32, a, b)``.

    ``{d}`` is the destination and ``{0}``, ``{1}`` the inputs, all in registers of their own width. A result of
    ``bool`` is read from the predicate ``{d}``.
    """
    inputs = [np.ascontiguousarray(a) for a in inputs]
    size = inputs[0].size
    padded = -(-size // 32) * 32
    arrays = {f"in{i}": np.resize(a, padded) for i, a in enumerate(inputs)}
    predicate = result is bool
    out = np.zeros(padded, np.uint32 if predicate else result)
    lines = ["mov.u32 %r100, %tid.x;"]
    names = {}
    for i, a in enumerate(arrays.values()):
        names[str(i)] = register = f"%{PREFIX[a.itemsize]}{i}"
        lines += [
            f"mad.wide.u32 %d100, %r100, {a.itemsize}, %in{i};",
            f"ld.global.b{8 * a.itemsize} {register}, [%d100];",
        ]
    d = "%p30" if predicate else f"%{PREFIX[out.itemsize]}60"
    positional = [names[str(i)] for i in range(len(inputs))]
    lines.append(instruction.format(*positional, d=d))
    if predicate:
        lines.append("selp.b32 %r60, 1, 0, %p30;")
        d = "%r60"
    lines += [f"mad.wide.u32 %d101, %r100, {out.itemsize}, %out;", f"st.global.b{8 * out.itemsize} [%d101], {d};"]
    run("\n".join(lines), padded, declarations=declarations, **arrays, out=out)
    return out[:size].astype(bool) if predicate else out[:size]
