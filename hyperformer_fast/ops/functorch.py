"""The ops in plain PyTorch, for functorch transforms (torch.func) and forward-mode AD, which no fused kernel supports.

A kernel reads the values of a tensor, not the tangent or the batch dimension that functorch attaches to it, so it would
silently drop a tangent. The functions here consist of PyTorch's own operators, which vmap, grad, jvp and their nestings
(per-sample gradients, Jacobians, second derivatives) can transform.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, reference
from ..activations import activate
from ..layout import EPS, AdapterSpec, accumulator_dtype


def in_force() -> bool:
    """Whether the call is inside a functorch transform or a level of forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_tangent(t: Tensor) -> bool:
    """Whether ``t`` carries a forward-mode tangent."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def refuse_kernels(op: str, impl: str | None) -> None:
    """Raise BackendError if a backend other than the reference is asked for by name, because it cannot serve the call.

    While a compiler traces, only ``impl`` is considered: the other ways to choose a backend apply when the graph runs.
    """
    name = impl if impl is not None or torch.compiler.is_compiling() else backends.current_backend(op)
    if name not in (None, "auto", "reference"):
        raise backends.BackendError(
            f"backend {name!r} cannot serve {op} under torch.func transforms or forward-mode AD; "
            "use backend 'auto' or 'reference', which run it in plain PyTorch"
        )


def generate_weights(E: Tensor, G: Tensor, g0: Tensor) -> Tensor:
    """``ops.generate_weights``; the arguments must have been checked."""
    with torch.autocast(E.device.type, enabled=False):
        return reference.generate_weights(E, G, g0)


def adapter(x: Tensor, packed: Tensor, spec: AdapterSpec, task_index: Tensor | None) -> Tensor:
    """``ops.adapter``; the arguments must have been checked.

    Everything is computed in float32 (or float64, if x is float64) and rounded once at the end. A task that is out of
    range, where that could not be checked, gives NaN.
    """
    layout, activation = spec
    exact = accumulator_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        wide, weights = x.to(exact), packed.to(exact)
        if task_index is None:
            return reference.adapter(wide, weights, layout, activation).to(x.dtype)
        return _by_task(x, wide, layout.unpack(weights), spec, task_index, packed.shape[0])


def _by_task(
    x: Tensor,
    wide: Tensor,
    parts: dict[str, Tensor],
    spec: AdapterSpec,
    task_index: Tensor,
    T: int,
) -> Tensor:
    # The loop over samples in reference.adapter reads the values of task_index, which vmap and a compiler do not allow.
    layout, activation = spec
    if x.shape[0] == 0 or T == 0:
        return x.clone()
    task = task_index.long().view(-1, *[1] * (x.dim() - 1))
    w = {name: part[task_index.long().clamp(0, T - 1)] for name, part in parts.items()}
    # Replace a sample without a task by zeros: if it contained a NaN, 0 * NaN = NaN would reach the gradients.
    rows = torch.where(task < 0, 0.0, wide).reshape(x.shape[0], -1, layout.d)
    y = _norm(rows, w["pre_gamma"], w["pre_beta"]) if layout.pre_norm else rows
    z = y @ w["down_weight"].mT + w["down_bias"].unsqueeze(1)
    y = activate(z, activation) @ w["up_weight"].mT + w["up_bias"].unsqueeze(1)
    y = _norm(y, w["post_gamma"], w["post_beta"]) if layout.post_norm else y
    adapted = (rows + y).reshape(x.shape).to(x.dtype)
    return torch.where((task >= T) | (task < -1), torch.nan, torch.where(task < 0, x, adapted))


def _norm(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(y, y.shape[-1:], eps=EPS) * gamma.unsqueeze(1) + beta.unsqueeze(1)
