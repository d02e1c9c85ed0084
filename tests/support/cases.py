"""Adapters to try: random ones of any shape, and hostile ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperformer_fast.layout import AdapterLayout

HOSTILE = ("cancelling columns", "large mean", "rank one", "zero column", "duplicate columns", "tiny up")


def random_packed(layout: AdapterLayout, T: int = 1, std: float = 0.3) -> Tensor:
    """[T, P] in float64, of the order of trained weights: gamma near 1 where a norm is on."""
    packed = torch.randn(T, layout.numel, dtype=torch.float64) * std
    parts = layout.unpack(packed)
    for name, part in parts.items():
        if name.endswith("gamma"):
            part += 1
        if name == "down_weight":
            part /= layout.d**0.5 * std
    return packed


def hostile_packed(kind: str, layout: AdapterLayout, activation: str = "gelu_new") -> Tensor:
    """[1, P] in float64 whose up-projection is hard for a layer norm solved through its Gram matrix
    (docs/design.md)."""
    packed = random_packed(layout)
    w = {name: part[0] for name, part in layout.unpack(packed).items()}
    up, bias = w["up_weight"], w["up_bias"]
    if kind == "cancelling columns":
        w["down_bias"][0] = 3.0
        w["down_weight"][0] = 0
        up.mul_(0.03)
        up[:, 0] = 10 * torch.randn(layout.d, dtype=torch.float64)
        h = {"gelu_new": lambda z: F.gelu(z, approximate="tanh"), "relu": torch.relu}[activation](w["down_bias"][0])
        bias.mul_(0.03).sub_(up[:, 0] * h)
    elif kind == "large mean":
        up.add_(100)
    elif kind == "rank one":
        up.copy_(torch.randn(layout.d, 1, dtype=torch.float64) @ torch.randn(1, layout.b, dtype=torch.float64))
        bias.zero_()
    elif kind == "zero column":
        up[:, 0] = 0
        bias.zero_()
    elif kind == "duplicate columns":
        up[:, 1:] = up[:, :1]
    elif kind == "tiny up":
        up.mul_(1e-5 / 0.3)
        bias.mul_(1e-5 / 0.3)
    else:
        raise ValueError(kind)
    return packed
