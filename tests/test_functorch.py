"""The ops under functorch transforms and forward-mode AD: the reference's values and derivatives, or an error with the
cure."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.cases import random_packed
from support.differentiable import INDEX, LAYOUT, OPS, TRANSFORMS, cubes, equal, every_op
from torch.autograd import forward_ad
from torch.func import grad, vjp, vmap

from hyperformer_fast import backends, ops, reference


@every_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(op, transform):
    mine, theirs, leaves = OPS[op]
    leaves = leaves()
    equal(TRANSFORMS[transform](mine, leaves), TRANSFORMS[transform](theirs, leaves))


@every_op
@pytest.mark.parametrize("transform", ["vmap over the weights", "grad", "jvp", "second derivative"])
def test_compiled_functional_transforms(op, transform):
    mine, theirs, leaves = OPS[op]
    leaves = leaves()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: TRANSFORMS[transform](mine, a), fullgraph=True, backend="aot_eager")
    equal(compiled(*leaves), TRANSFORMS[transform](theirs, leaves))


def test_a_batch_of_task_indices():
    x, packed = torch.randn(4, 5, 3, 12), random_packed(LAYOUT, 3).float()
    indices = torch.stack([INDEX, INDEX.flip(0), torch.full((5,), -1), INDEX.roll(2)])
    out = vmap(lambda x, i: ops.adapter(x, packed, LAYOUT, "silu", task_index=i))(x, indices)
    equal(out, torch.stack([reference.adapter(x[i], packed, LAYOUT, "silu", indices[i]) for i in range(4)]))
    wrong = vmap(lambda x, i: ops.adapter(x, packed, LAYOUT, "silu", task_index=i))(x, indices + 1)
    assert torch.equal(wrong.isnan().all(-1).all(-1), indices + 1 >= 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_task_passes_bit_for_bit_under_transforms(dtype):
    packed = random_packed(LAYOUT, 2).float()
    x = torch.randn(3, 2, 12).to(dtype)
    x[1, 0, 3], x[1, 1, 2] = float("nan"), float("inf")
    index = torch.tensor([1, -1, 1])
    call = lambda x, packed: ops.adapter(x, packed, LAYOUT, "gelu_new", task_index=index)  # noqa: E731
    out, backward = vjp(call, x, packed)
    g = torch.randn_like(x)
    dx, dpacked = backward(g)
    assert torch.equal(out[1].view(torch.uint8), x[1].view(torch.uint8)) and torch.equal(dx[1], g[1])
    assert out.dtype == dtype and dpacked.dtype == torch.float32
    assert dpacked.isfinite().all() and not dpacked[0].any()


def test_no_samples_under_transforms():
    call = lambda x: ops.adapter(x, torch.zeros(2, LAYOUT.numel), LAYOUT, "relu", task_index=torch.zeros(0).long())  # noqa: E731
    assert grad(lambda x: call(x).sum())(torch.zeros(0, 3, 12)).shape == (0, 3, 12)


def test_bad_input_is_named_under_transforms():
    _, _, leaves = OPS["adapter by task"]
    x, packed = leaves()
    for call, message in (
        (lambda x: ops.adapter(x[..., 1:], packed, LAYOUT, "relu", task_index=INDEX), r"\[\.\.\., 12\].*\[5, 3, 11\]"),
        (lambda x: ops.adapter(x, packed[:, 1:], LAYOUT, "relu", task_index=INDEX), "P = "),
        (lambda x: ops.adapter(x, packed, LAYOUT, "relu"), "T = 3.*task_index"),
        (lambda x: ops.adapter(x, packed, LAYOUT, "relu", task_index=INDEX + 1), "to 2, got 3"),
        (lambda x: ops.hyper_adapter(x, packed, packed, packed, LAYOUT, "relu"), "g0 must be"),
        (lambda x: ops.generate_weights(x, packed, packed), "G must be"),
    ):
        with pytest.raises(ValueError, match=message):
            grad(lambda x: call(x).sum())(x)


def test_a_kernel_asked_for_by_name_is_refused_under_transforms():
    mine, theirs, leaves = OPS["adapter"]
    leaves = leaves()
    if any(r["name"] == "cpu" and r["available"] for r in backends.backend_report()):
        with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot serve adapter.*'auto'"):
            grad(cubes(mine))(*leaves)
    with backends.use_backend("reference"):
        equal(grad(cubes(mine))(*leaves), grad(cubes(theirs))(*leaves))


@every_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(op, requires_grad):
    mine, theirs, leaves = OPS[op]
    leaves = [t.requires_grad_(requires_grad) for t in leaves()]
    for i in range(len(leaves)):
        results = []
        for function in (mine, theirs):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, t.detach().flip(0)) if i == j else t for j, t in enumerate(leaves)]
                results.append(forward_ad.unpack_dual(function(*duals)))
        equal(results[0].tangent, results[1].tangent)
        equal(results[0].primal, results[1].primal)


@every_op
def test_forward_mode_through_the_backward_alone(op):
    mine, _, leaves = OPS[op]
    leaves = [t.requires_grad_() for t in leaves()]
    out = mine(*leaves)
    with forward_ad.dual_level():
        plain = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        assert all(g.isfinite().all() for g in plain)
        g = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        if op == "generate_weights":
            assert forward_ad.unpack_dual(torch.autograd.grad(out, leaves, g)[0]).tangent is not None
        else:
            with pytest.raises(RuntimeError, match="no forward-mode derivative.*torch.func.jvp"):
                torch.autograd.grad(out, leaves, g)


@every_op
def test_double_backward(op):
    mine, theirs, leaves = OPS[op]
    leaves = [t.requires_grad_() for t in leaves()]

    def twice(op):
        (first,) = torch.autograd.grad(cubes(op)(*leaves), leaves[0], create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaves[1])

    if op == "generate_weights":
        equal(twice(mine), twice(theirs))
    else:
        with pytest.raises(RuntimeError, match=r"no second derivative.*reference\."):
            twice(mine)


@every_op
def test_a_batch_of_output_gradients(op):
    """torch.autograd.grad(is_grads_batched=True): vmap over the backward alone."""
    mine, theirs, leaves = OPS[op]
    leaves = [t.requires_grad_() for t in leaves()]
    g = torch.randn(3, *mine(*leaves).shape)

    def batched(op):
        return torch.autograd.grad(op(*leaves), leaves, g, is_grads_batched=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a loop, and says so
        equal(batched(mine), batched(theirs))
