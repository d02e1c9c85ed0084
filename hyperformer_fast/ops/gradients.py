"""The parts of the backward that the eager autograd functions and the registered ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .functorch import has_tangent


def generator_gradients(g: Tensor, E: Tensor, G: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Compute the gradients of ``generate_weights``.

    Args:
        g: [Q, n, P], the gradient of packed.
        E: [Q, n, k] embeddings.
        G: [Q, P, k] generators.
        needs: whether the gradients of E, of G and of g0 are needed.

    Returns:
        The gradients of E, G and g0; None in place of one that is not needed.
    """
    with torch.autocast(g.device.type, enabled=False):
        return (
            torch.bmm(g, G) if needs[0] else None,
            torch.bmm(g.transpose(1, 2), E) if needs[1] else None,
            g.sum(1) if needs[2] else None,
        )


def site_generator_gradients(dpacked: Tensor, E: Tensor, G: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """:func:`generator_gradients` for the generator of one site: dpacked [T, P], E [T, k] and G [P, k]."""
    if not any(needs):
        return None, None, None
    gradients = generator_gradients(dpacked.unsqueeze(0), E.unsqueeze(0), G.unsqueeze(0), needs)
    return tuple(None if gradient is None else gradient.squeeze(0) for gradient in gradients)


def refuse_second_derivative(
    g: Tensor, what: str = "the adapter", plain: str = "hyperformer_fast.reference.adapter"
) -> None:
    """Raise RuntimeError if the backward of ``what`` itself is to be differentiated. The error names ``plain``, a
    function that autograd can differentiate twice.

    torch's ``once_differentiable`` cannot replace this: if g does not require a gradient, it silently detaches the
    result.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} has no second derivative: call backward without create_graph=True, "
            f"or use {plain}, which autograd can differentiate twice"
        )
    if has_tangent(g):
        raise RuntimeError(
            f"{what}'s backward has no forward-mode derivative: run the forward within the dual level, too, "
            "or use torch.func.jvp over torch.func.grad"
        )
