"""Catch the launches of the Triton kernels, and compile them for a GPU that need not be there.

The hosts are called with CPU tensors. Each launch is caught where every launch passes (``JITFunction.run``) and
described by a :class:`Launch`; :func:`compile_launch` then makes what a GPU would have run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hyperformer_fast.kernels import tiles

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@dataclasses.dataclass
class Launch:
    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


@contextlib.contextmanager
def caught_launches(arch: int, take: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Within the block launches are recorded instead of run, and tiles are chosen as on a GPU of ``arch``. Each launch
    also goes to ``take`` at once, which may run it in its own way before the host goes on."""
    launches: list[Launch] = []

    def note(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        options = {k: v for k, v in kwargs.items() if k.startswith("num_")}
        launch = Launch(self, arguments, options, grid(arguments) if callable(grid) else tuple(grid))
        launches.append(launch)
        if take is not None:
            take(launch)

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(tiles, "architecture", lambda device: arch),
        mock.patch.object(tiles, "_table", dict),  # the rules, not what was tuned on this machine
    ):
        yield launches


def signature_of(
    launch: Launch, aligned: Callable[[torch.Tensor], bool] = lambda tensor: True
) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list]]:
    """What ``launch`` compiles its kernel for: types, constants and attributes. No length is specialised.

    Args:
        launch: a caught launch.
        aligned: whether a tensor starts at a multiple of 16 bytes. By default every tensor does, as torch allocates. It
            matters where the kernel is specialised on that at all.
    """
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params)):
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment) and aligned(value):
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int, **how):
    """Compile the kernel of ``launch`` for ``arch``; ``how`` goes to :func:`signature_of`."""
    signature, constants, attributes = signature_of(launch, **how)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
