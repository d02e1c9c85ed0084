"""Gradients of single tasks as vectors, and PCGrad as it is printed."""

from __future__ import annotations

import torch


def on_generators(found):
    """The part of a gradient that norms and cosines are of, as one vector."""
    return torch.cat([g.flatten() for name, g in sorted(found.items()) if ".generator." in name])


def on_tables(found):
    """The gradient of learned adapters as one vector."""
    return torch.cat([g.flatten() for name, g in sorted(found.items()) if name.startswith("hypernetworks")])


def stated_pcgrad(vectors, orders):
    """Algorithm 1 of Yu et al. 2020, as it is printed. ``orders``: for each task, the others in order."""
    projected = []
    for vector, order in zip(vectors, orders, strict=True):
        vector = vector.clone()
        for other in order:
            dot = vector @ vectors[other]
            if dot < 0:
                vector -= dot / (vectors[other] @ vectors[other]) * vectors[other]
        projected.append(vector)
    return sum(projected)
