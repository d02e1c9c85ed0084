"""The ops in plain PyTorch, for what no fused kernel serves: torch.func's transforms and forward-mode AD.

A kernel sees numbers, not the tangents or the batch dimension that ride on them: it would drop a tangent without a
word. Everything here is made of PyTorch's own operators, which vmap, grad, jvp and their nestings (per-sample
gradients, Jacobians, second derivatives) know how to transform.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, reference
from .activations import activate
from .layout import AdapterLayout


def active() -> bool:
    """Whether a torch.func transform or a forward-mode AD level is in force."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_tangent(t: Tensor) -> bool:
    """Whether ``t`` carries a forward-mode tangent."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def require_no_backend(op: str) -> None:
    """RuntimeError where a backend with kernels is asked for by name: it could not serve the call."""
    name = backends.current_backend()
    if name not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {name!r} cannot serve {op} under torch.func transforms or forward-mode AD; "
            "use backend 'auto' or 'reference', which run it in plain PyTorch"
        )


def generate_weights(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    """``ops.generate_weights``, its arguments checked."""
    with torch.autocast(E.device.type, enabled=False):
        return reference.generate_weights(E, G, g0)


def adapter(x: Tensor, packed: Tensor, layout: AdapterLayout, activation: str, task_index: Tensor | None) -> Tensor:
    """``ops.adapter``, its arguments checked: in float32 (float64 in float64), rounded once at the end.

    A task out of range, where it could not be looked at, gives NaN.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        wide, weights = x.to(exact), packed.to(exact)
        if task_index is None:
            return reference.adapter(wide, weights, layout, activation).to(x.dtype)
        return _by_task(x, wide, layout.unpack(weights), layout, activation, task_index, packed.shape[0])


def _by_task(
    x: Tensor,
    wide: Tensor,
    parts: dict[str, Tensor],
    layout: AdapterLayout,
    activation: str,
    task_index: Tensor,
    T: int,
) -> Tensor:
    # The reference's loop over samples reads task_index, which neither vmap nor a compiler can.
    if x.shape[0] == 0 or T == 0:
        return x.clone()
    task = task_index.long().view(-1, *[1] * (x.dim() - 1))
    w = {name: part[task_index.long().clamp(0, T - 1)] for name, part in parts.items()}
    # Zeros where there is no adapter: not even a NaN of such a sample may reach a gradient through a weight of zero.
    rows = torch.where(task < 0, 0.0, wide).reshape(x.shape[0], -1, layout.d)
    y = _norm(rows, w["pre_gamma"], w["pre_beta"]) if layout.pre_norm else rows
    z = y @ w["down_weight"].mT + w["down_bias"].unsqueeze(1)
    y = activate(z, activation) @ w["up_weight"].mT + w["up_bias"].unsqueeze(1)
    y = _norm(y, w["post_gamma"], w["post_beta"]) if layout.post_norm else y
    adapted = (rows + y).reshape(x.shape).to(x.dtype)
    return torch.where((task >= T) | (task < -1), torch.nan, torch.where(task < 0, x, adapted))


def _norm(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(y, y.shape[-1:], eps=reference.EPS) * gamma.unsqueeze(1) + beta.unsqueeze(1)
