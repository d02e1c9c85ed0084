"""Activations and their derivatives over a dtype's whole range, as a backend's kernels compute them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperformer_fast import reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

EAGER = {
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
#: An adapter's bottleneck here; each of its numbers is one z.
BOTTLENECK = 64


def whole_range(dtype: torch.dtype, count: int) -> Tensor:
    """Both signs of ``count`` numbers from the smallest to the largest of ``dtype``, of half as many up to 100, both
    zeros, and what is not finite."""
    info = torch.finfo(dtype)
    exponents = torch.tensor([info.smallest_normal, info.max], dtype=torch.float64).log10()
    sizes = torch.logspace(*exponents.tolist(), count, dtype=torch.float64).clamp(max=info.max)
    sizes = torch.cat([sizes, torch.linspace(0.01, 100, count // 2, dtype=torch.float64)])
    special = torch.tensor([0.0, info.max, float("inf"), float("nan")], dtype=torch.float64)
    z = torch.cat([sizes, special]).to(dtype)
    return torch.cat([z, -z])


def kernel_activation(backend, z: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z): weights' gradients of adapters without norms, whose down-projections hold z."""
    width, count = 16, -(-len(z) // BOTTLENECK)
    layout = AdapterLayout(width, BOTTLENECK, False, False)
    packed = torch.zeros(count, layout.numel)
    parts = layout.unpack(packed)
    padded = torch.cat([z.float(), torch.zeros(count * BOTTLENECK - len(z))])
    parts["down_weight"][:, :, 0], parts["up_weight"][:, 0] = padded.view(count, BOTTLENECK), 1
    folded = reference.fold(packed, layout, z.dtype)
    x = torch.zeros(count, 1, width, dtype=z.dtype)
    x[..., 0] = 1
    index, spec = torch.arange(count), AdapterSpec(layout, name)
    _, saved = backend.adapter_forward(x, folded, spec, index, True)
    _, dpacked = backend.adapter_backward(x, x, saved, packed, folded, spec, index, False, True)
    gradient = layout.unpack(dpacked)
    return gradient["up_weight"][:, 0].flatten()[: len(z)], gradient["down_bias"].flatten()[: len(z)]


def check_activations_everywhere(backend, dtype: torch.dtype, largest: float = math.inf, count: int = 700) -> None:
    """``backend`` against eager PyTorch in float64.

    Args:
        backend: whose kernels.
        dtype: of z.
        largest: act(z) is read from a product; beyond this |z| that product may not hold it.
        count: numbers of each sign to try; fewer for a backend that is slow.
    """
    z = whole_range(dtype, count)
    info = torch.finfo(dtype)
    for name in ACTIVATIONS:
        exact = z.double().requires_grad_()
        value = EAGER[name](exact)
        (slope,) = torch.autograd.grad(value.sum(), exact)
        for what, mine, true in zip(
            ("act", "act'"), kernel_activation(backend, z, name), (value.detach(), slope), strict=True
        ):
            checked = ~(z.abs() > largest) if what == "act" else torch.ones_like(z, dtype=torch.bool)
            mine, true, at = mine.double()[checked], true[checked], z[checked]
            allowed = 5 * 2.0**-23 * (1 + true.abs()) + info.eps * true.abs() + info.smallest_normal
            wrong = ~((mine - true).abs() <= allowed) & ~(mine == true) & ~(mine.isnan() & true.isnan())
            assert not wrong.any(), (
                f"{name}, {dtype}: {what}({at[wrong][0]}) = {mine[wrong][0]}, eager PyTorch has {true[wrong][0]} "
                f"({int(wrong.sum())} of {len(at)} differ)"
            )
