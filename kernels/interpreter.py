"""A mend for Triton's interpreter (TRITON_INTERPRET=1), which keeps bfloat16 as bit patterns and computes on them.

As it comes (3.6 to 3.9) it multiplies the patterns as integers in ``tl.dot``, truncates instead of rounding, and
casts them to other types than float32 as integers. Here conversions and products go by values, and arithmetic on
bfloat16 itself, which our kernels never do, is an error. :func:`check` fails where Triton has changed underneath.
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
    """float -> bfloat16's bits, to nearest even; a NaN stays one."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def values_of(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


@functools.cache
def mend() -> dict[str, Callable]:
    """Install it, once, for this process. Returns what it replaced, by name."""
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
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(C + at, tl.dot(a, b, input_precision="ieee"))
    tl.store(D + at, (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16))


def check() -> None:
    """RuntimeError where bfloat16 is not computed by value."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    a[0, 0], b[0] = 3.0e38, b[0] * 0.1
    c, product = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    _products[(1,)](a, b, c, product, N=16)
    if not torch.allclose(c, a.float() @ b.float(), rtol=1e-5) or not torch.equal(product, a * b):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} is not the one that kernels/interpreter.py mends"
        )
