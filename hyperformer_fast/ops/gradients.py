"""What the eager autograd functions and those of the registered ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .functorch import has_tangent


def generator_gradients(g: Tensor, E: Tensor, G: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of E [Q, n, k], G [Q, P, k] and g0 [Q, P] for that of packed, g [Q, n, P]; None where not needed."""
    with torch.autocast(g.device.type, enabled=False):
        return (
            torch.bmm(g, G) if needs[0] else None,
            torch.bmm(g.transpose(1, 2), E) if needs[1] else None,
            g.sum(1) if needs[2] else None,
        )


def site_generator_gradients(dpacked: Tensor, E: Tensor, G: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The same for the generator of one site: E [T, k], G [P, k], g0 [P], dpacked [T, P]."""
    if not any(needs):
        return None, None, None
    gradients = generator_gradients(dpacked.unsqueeze(0), E.unsqueeze(0), G.unsqueeze(0), needs)
    return tuple(None if gradient is None else gradient.squeeze(0) for gradient in gradients)


def refuse_second_derivative(g: Tensor) -> None:
    """RuntimeError where the backward itself is to be differentiated.

    torch's ``once_differentiable`` does not do: it silently detaches the gradient where g itself needs none.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the adapter has no second derivative: call backward without create_graph=True, "
            "or use hyperformer_fast.reference.adapter, which autograd can differentiate twice"
        )
    if has_tangent(g):
        raise RuntimeError(
            "the adapter's backward has no forward-mode derivative: run its forward, too, within the dual level, "
            "or use torch.func.jvp over torch.func.grad"
        )
