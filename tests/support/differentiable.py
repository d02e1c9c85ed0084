"""Every op beside the reference, and PyTorch's transforms of them."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from hyperformer_fast import ops, reference, t5_reference
from hyperformer_fast.layout import AdapterLayout
from support.cases import random_packed
from support.pieces import dropout_of

LAYOUT = AdapterLayout(12, 4, pre_norm=True)


INDEX = torch.tensor([2, 0, -1, 2, 1])
HALF = dropout_of(0.5)


def one_by_one(x, packed):
    """The reference by task, without its look into a tensor of indices, which vmap cannot transform."""
    tasks = INDEX.tolist()
    adapted = [reference.adapter(x[i], packed[t : t + 1], LAYOUT, "gelu_new") for i, t in enumerate(tasks) if t >= 0]
    return torch.stack([x[i] if t < 0 else adapted.pop(0) for i, t in enumerate(tasks)])


#: name -> the op, the reference, a function that makes leaves
OPS = {
    "adapter": (
        lambda x, packed: ops.adapter(x, packed, LAYOUT, "gelu_new"),
        lambda x, packed: reference.adapter(x, packed, LAYOUT, "gelu_new"),
        lambda: (torch.randn(5, 3, 12), random_packed(LAYOUT).float()),
    ),
    "adapter by task": (
        lambda x, packed: ops.adapter(x, packed, LAYOUT, "gelu_new", task_index=INDEX),
        one_by_one,
        lambda: (torch.randn(5, 3, 12), random_packed(LAYOUT, 3).float()),
    ),
    "generate_weights": (
        ops.generate_weights,
        reference.generate_weights,
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 7, 4), torch.randn(2, 7)),
    ),
    "hyper_adapter": (
        lambda *leaves: ops.hyper_adapter(*leaves, LAYOUT, "gelu_new"),
        lambda x, E, G, g0: reference.adapter(x, E @ G.mT + g0, LAYOUT, "gelu_new"),
        lambda: (
            torch.randn(5, 3, 12),
            torch.randn(1, 4),
            0.3 * torch.randn(LAYOUT.numel, 4),
            torch.randn(LAYOUT.numel),
        ),
    ),
    "residual": (
        lambda y, w, hidden: torch.cat(ops.residual(hidden, y, HALF, w), -1),
        lambda y, w, hidden: torch.cat(t5_reference.residual(hidden, y, HALF, w, 1e-6), -1),
        lambda: (torch.randn(5, 3, 12), torch.randn(12), torch.randn(5, 3, 12)),
    ),
    "act_dropout": (
        lambda a, c: ops.act_dropout(a, "gelu_new", c, HALF),
        lambda a, c: t5_reference.act_dropout(a, c, "gelu_new", HALF),
        lambda: (torch.randn(5, 3, 12), torch.randn(5, 3, 12)),
    ),
    "hyper_adapter by task": (
        lambda *leaves: ops.hyper_adapter(*leaves, LAYOUT, "gelu_new", INDEX),
        lambda x, E, G, g0: one_by_one(x, E @ G.mT + g0),
        lambda: (
            torch.randn(5, 3, 12),
            torch.randn(3, 4),
            0.3 * torch.randn(LAYOUT.numel, 4),
            torch.randn(LAYOUT.numel),
        ),
    ),
}


every_op = pytest.mark.parametrize("op", OPS)


def equal(mine, theirs, tolerance=1e-4):
    mine, theirs = torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(theirs)
    assert len(mine) == len(theirs) > 0
    for a, e in zip(mine, theirs):
        # The scale is the whole tensor's: gradients' parts differ by orders of magnitude.
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))


def cubes(op):
    return lambda *leaves: op(*leaves).pow(3).mean()


def gradients(op, leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out.pow(2).mean(), leaves)]


TRANSFORMS = {
    "vmap over x": lambda op, a: vmap(op, in_dims=(0, *[None] * (len(a) - 1)))(torch.stack([a[0], 2 * a[0]]), *a[1:]),
    "vmap over the weights": lambda op, a: vmap(op, in_dims=(None, 0, *[None] * (len(a) - 2)))(
        a[0], torch.stack([a[1], 2 * a[1], -a[1]]), *a[2:]
    ),
    "vmap over all, along dim 1": lambda op, a: vmap(op, in_dims=1, out_dims=1)(
        *[torch.stack([t, t + 1], 1) for t in a]
    ),
    "vmap of vmap": lambda op, a: vmap(vmap(op))(*[torch.stack([t, t + 1, t, -t]).unflatten(0, (2, 2)) for t in a]),
    "grad": lambda op, a: grad(cubes(op), argnums=tuple(range(len(a))))(*a),
    "vjp": lambda op, a: [f(torch.ones_like(out)) for out, f in [vjp(op, *a)]],
    "jvp": lambda op, a: jvp(op, a, tuple(t.flip(0) for t in a)),
    "jvp of one": lambda op, a: jvp(lambda x: op(x, *a[1:]), a[:1], a[:1]),
    "jacrev": lambda op, a: jacrev(lambda w: op(a[0], w, *a[2:]).sum((0, 1)))(a[1]),
    "jacfwd": lambda op, a: jacfwd(lambda x: op(x, *a[1:]).sum((0, 1)))(a[0]),
    "per-sample gradients": lambda op, a: vmap(grad(cubes(op), 1), in_dims=(0, *[None] * (len(a) - 1)))(
        torch.stack([a[0], 2 * a[0]]), *a[1:]
    ),
    "second derivative": lambda op, a: grad(lambda x: grad(cubes(op))(x, *a[1:]).pow(2).sum())(a[0]),
    "Hessian": lambda op, a: hessian(lambda s: cubes(op)(s * a[0], *a[1:]))(torch.ones(2, 1, 1)[:1, 0]),
}
