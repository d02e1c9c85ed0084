"""The four activations an adapter may use, their derivatives, and the codes by which kernels know them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

#: Canonical names; an activation's code in ops and kernels is its index.
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")

_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def canonical_activation(name: Any, field: str = "activation") -> str:
    """The canonical name; ``swish`` (official) is ``silu``. ValueError naming ``field`` for an unknown one."""
    lowered = name.lower() if isinstance(name, str) else ""
    canonical = _ALIASES.get(lowered, lowered)
    if canonical not in ACTIVATIONS:
        raise ValueError(f"{field} must be one of {', '.join(ACTIVATIONS)} (or swish, which is silu), got {name!r}")
    return canonical


def activate(z: torch.Tensor, name: str) -> torch.Tensor:
    """act(z), any shape and floating dtype, differentiable."""
    if name == "relu":
        return F.relu(z)
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_new" else "none")


def activate_grad(z: torch.Tensor, name: str) -> torch.Tensor:
    """d act(z) / dz, elementwise, in z's dtype."""
    if name == "relu":
        return (~(z <= 0)).to(z.dtype)  # NaN has the derivative 1, as in torch
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if name == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    t = torch.tanh(_SQRT_2_OVER_PI * (z + _CUBIC * z * z * z))
    square = (z * z).clamp(max=1e4)  # far beyond where 1 - t^2 is 0: 0 times an overflowed square would be NaN
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * square)
