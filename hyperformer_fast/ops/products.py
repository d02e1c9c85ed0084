"""A product with a frozen weight, by the faster one of the two libraries that PyTorch on a CPU comes with.

PyTorch multiplies float32 matrices by MKL. On CPUs of other makers MKL takes no wider instructions than AVX2, while
oneDNN, with which PyTorch multiplies bfloat16, takes AVX-512 on every CPU that has it: on an AMD EPYC it was twice as
fast. Both compute the same products, and round them differently. Which one is taken depends on the CPU and on the
shape, never on a measurement, so that a run can be repeated bit for bit.

Letters: N rows, K and M the widths of the input and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functorch
from .op import Op
from .public import traced

#: Fewer rows than these go to MKL, unless the weight has so many numbers that reading them takes most of the time: one
#: row and a weight of 512 x 512 took 1.3 times as long by oneDNN, and one of 32128 x 512 took 0.4 times as long.
LEAST_ROWS = 4
LARGE_WEIGHT = 2**22


def _maker() -> str:
    """The maker of the CPU, as Linux names it; empty where it cannot be known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


#: What :func:`why_not` found; None before its first call, which a compiler cannot trace: until then it takes PyTorch's
#: product. A plain variable, because a compiler can read it.
_found: str | None = None


def why_not() -> str:
    """Why oneDNN's float32 products are not taken on this machine, as the end of a sentence; empty where they are."""
    global _found
    if _found is None:
        _found = _examine()
    return _found


def _examine() -> str:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return "this PyTorch has not both MKL and oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has another interface to oneDNN"
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _maker() in ("GenuineIntel", ""):
        return "PyTorch's own float32 product is as fast on this CPU"
    return _test()


def _test() -> str:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 40, generator=generator, device="cpu") for n in (6, 24))
    g = torch.randn(6, 24, generator=generator, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            found = ((_onednn(x, weight), x @ weight.t()), (_onednn(g, weight.t()), g @ weight))
        except Exception as error:  # an operator that is none of PyTorch's public ones may change in any way
            return f"oneDNN's product failed ({error})"
    same = all(torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5) for mine, theirs in found)
    return "" if same else "oneDNN's product is not PyTorch's"


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _strict() -> bool:
    """Whether float32 is to be multiplied as such. oneDNN would otherwise round to bfloat16, as its callers allow."""
    return bool(torch.backends.mkldnn.enabled) and precision() in ("highest", "none", "ieee")


def precision() -> str:
    """How exactly PyTorch is to multiply float32 matrices on a CPU."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by backend, as transformers' ``tf32`` does it; asking like that takes longer
        backend: Any = torch.backends.mkldnn  # its matmul is not declared
        return str(backend.matmul.fp32_precision)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times the transpose of weight [M, K], which may be a transposed view."""
    numel = weight.numel()
    if numel == 0 or (x.numel() < LEAST_ROWS * x.shape[-1] and numel < LARGE_WEIGHT) or not x.numel() or not _strict():
        return F.linear(x, weight)
    return _onednn(x, weight)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` may compute this product otherwise than PyTorch does: in float32 on a CPU, for a weight
    that is to get no gradient."""
    return bool(
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and x.layout is weight.layout is torch.strided
        and not (weight.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and (_found if torch.compiler.is_compiling() else why_not()) == ""
        and not functorch.in_force()
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.linear(x, weight)`` for a frozen weight.

    Args:
        x: [..., K].
        weight: [M, K].

    Returns:
        [..., M]. Where :func:`serves` is false this is PyTorch's own product, and so it is for few rows.

    Raises:
        RuntimeError: shapes or dtypes do not fit together.
    """
    if not serves(x, weight):
        return F.linear(x, weight)
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight)  # which has its own rules, and messages
    if traced(x, weight):
        out: Tensor = torch.ops.hyperformer_fast.linear(x, weight)
        return out
    if torch.is_grad_enabled() and x.requires_grad:
        return _apply(x, weight)
    return _multiply(x, weight)


class _Linear(torch.autograd.Function):
    """The autograd function of ``linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _backward(g, weight), None


def _backward(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, which can be differentiated again."""
    return torch.matmul(g, weight) if torch.is_grad_enabled() else _multiply(g, weight.t())


_apply: Callable[..., Tensor] = _Linear.apply

registered = Op("linear", "Tensor x, Tensor weight", "Tensor out")


@registered.implement
def _(x: Tensor, weight: Tensor, impl: str | None) -> Tensor:
    return _multiply(x, weight)


@registered.fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _registered_backward(ctx: Any, g: Tensor) -> tuple[Tensor]:
    (weight,) = ctx.saved_tensors
    return (torch.ops.hyperformer_fast.linear(g, weight.t()),)


registered.differentiate(_setup, _registered_backward)
