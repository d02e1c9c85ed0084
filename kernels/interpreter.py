"""Corrects bfloat16 in Triton's interpreter (TRITON_INTERPRET=1), which stores it as 16-bit integers.

The interpreter of Triton 3.6 to 3.9 computes on the integers: ``tl.dot`` multiplies them, a conversion to bfloat16
truncates instead of rounding, and a conversion to any type but float32 converts the integer. :func:`mend` makes
conversions and products use the values. Arithmetic on bfloat16 itself, which our kernels never do, becomes an error.
:func:`check` raises if a later Triton no longer fits these changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


def bits_of(values: np.ndarray) -> np.ndarray:
    """Convert floats to the bits of bfloat16, rounding to nearest even. A NaN stays a NaN."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def values_of(bits: np.ndarray) -> np.ndarray:
    """Convert the bits of bfloat16 to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


@functools.cache
def mend() -> dict[str, Callable]:
    """Replace four methods of the interpreter, once per process.

    Returns:
        The original methods, by name.
    """
    builder = interpreter.InterpreterBuilder
    Handle = interpreter.TensorHandle
    cast, fp_to_fp, dot, binary = (
        getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op")
    )

    def widened(handle):
        return Handle(values_of(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def cast_impl(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return cast(self, widened(src), dst_type)
        if src.dtype.scalar == tl.bfloat16:
            return src
        return Handle(bits_of(src.data), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar == tl.bfloat16 and not op.__name__.startswith("bitwise"):
            raise TypeError(f"{op.__name__} on bfloat16: convert to float32 first")
        return binary(self, lhs, rhs, op)

    plain = {}
    for change in (cast_impl, create_fp_to_fp, create_dot, binary_op):
        plain[change.__name__] = getattr(builder, change.__name__)
        setattr(builder, change.__name__, change)
    return plain


@triton.jit
def _products(A, B, C, D, N: tl.constexpr):
    """Write the matrix product of A and B to C, and their elementwise product to D.

    Pointers, all [N, N]: A and B are inputs in bfloat16, C is an output in float32, D an output in bfloat16.
    """
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(C + at, tl.dot(a, b, input_precision="ieee"))
    tl.store(D + at, (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16))


def check() -> None:
    """Run a small kernel on bfloat16. RuntimeError if its results are wrong, that is, if :func:`mend` does not fit the
    installed Triton."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    a[0, 0], b[0] = 3.0e38, b[0] * 0.1
    c, product = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    _products[(1,)](a, b, c, product, N=16)
    if not torch.allclose(c, a.float() @ b.float(), rtol=1e-5) or not torch.equal(product, a * b):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} is not the one that kernels/interpreter.py corrects: its "
            "bfloat16 results are wrong; install triton>=3.6,<3.10, or run the kernels on a GPU"
        )
