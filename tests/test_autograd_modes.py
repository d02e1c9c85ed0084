"""The ops under checkpointing, autocast, inference mode, saved-tensor hooks and export; the module copied, stacked."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.differentiable import OPS, TRANSFORMS, equal, every_op, gradients
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from hyperformer_fast.adapter import FusedHyperAdapter


@every_op
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "compiled"])
def test_activation_checkpointing(op, kind):
    mine, theirs, leaves = OPS[op]
    leaves = leaves()
    reentrant = kind == "reentrant"
    apply = lambda *a: checkpoint(mine, *a, use_reentrant=reentrant)  # noqa: E731
    if kind == "compiled":
        torch._dynamo.reset()
        apply = torch.compile(apply, fullgraph=True, backend="aot_eager")
    if not reentrant:
        equal(gradients(apply, leaves), gradients(theirs, leaves))
        return
    a, b = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))  # it refuses torch.autograd.grad
    apply(*a).pow(2).mean().backward()
    theirs(*b).pow(2).mean().backward()
    equal([t.grad for t in a], [t.grad for t in b])


@every_op
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_leaves_the_numbers_alone(op, compiled):
    mine, _, leaves = OPS[op]
    leaves = leaves()
    plain, directional = gradients(mine, leaves), TRANSFORMS["jvp"](mine, leaves)
    if compiled:
        torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        apply = torch.compile(mine, fullgraph=True, backend="aot_eager") if compiled else mine
        cast = gradients(apply, leaves)
        directional_cast = TRANSFORMS["jvp"](mine, leaves)
    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(cast, plain))
    assert all(torch.equal(a, e) for a, e in zip(directional_cast, directional))


@every_op
def test_inference_mode(op):
    mine, _, leaves = OPS[op]
    leaves = leaves()
    expected = mine(*leaves)
    with torch.inference_mode():
        assert torch.equal(mine(*leaves), expected)
        inside = [t.clone() for t in leaves]
        assert torch.equal(mine(*inside), expected)
        assert torch.equal(mine(*(t.clone().requires_grad_() for t in leaves)), expected)
    assert torch.equal(mine(*inside), expected)
    if op == "residual":
        return  # its backward does not read y
    with pytest.raises(RuntimeError, match="make a clone"):
        mine(inside[0], *(t.requires_grad_() for t in leaves[1:]))


@every_op
def test_saved_tensor_hooks(op):
    mine, theirs, leaves = OPS[op]
    leaves = leaves()
    expected, n = gradients(mine, leaves), []

    def pack(t):
        n.append(t)
        return pickle.dumps(t.detach())

    def through_bytes(*a):
        with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
            return mine(*a)

    assert all(map(torch.equal, gradients(through_bytes, leaves), expected)) and n

    def off_memory(*a):
        with torch.autograd.graph.save_on_cpu():
            return mine(*a)

    assert all(map(torch.equal, gradients(off_memory, leaves), expected))


@every_op
def test_in_place_changes(op):
    mine, theirs, leaves = OPS[op]
    leaves = [t.requires_grad_() for t in leaves()]
    equal(
        torch.autograd.grad(mine(*leaves).mul_(2).sum(), leaves),
        torch.autograd.grad(2 * theirs(*leaves).sum(), leaves),
    )
    copies = [t.clone() for t in leaves]
    out = mine(*copies)
    with torch.no_grad():
        copies[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_op
def test_export(op):
    mine, _, leaves = OPS[op]
    leaves = leaves()

    class Call(torch.nn.Module):
        def forward(self, *a):
            return mine(*a)

    program = torch.export.export(Call(), leaves)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    equal(torch.export.load(file).module()(*leaves), mine(*leaves), 1e-6)


@pytest.fixture(params=[True, False], ids=["generated norms", "plain norms"])
def module(request):
    made = FusedHyperAdapter(12, 4, 6, conditional_layer_norm=request.param)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


def test_module_functional_call(module):
    x, e, parameters = torch.randn(5, 12), torch.randn(6), dict(module.named_parameters())
    loss = lambda p, x: functional_call(module, p, (x, e)).pow(2).sum()  # noqa: E731
    by_backward = lambda x: dict(  # noqa: E731
        zip(parameters, torch.autograd.grad(loss(parameters, x), list(parameters.values())))
    )
    doubled = {name: 2 * p.detach() for name, p in parameters.items()}
    other = copy.deepcopy(module)
    other.load_state_dict(doubled)
    assert torch.equal(functional_call(module, doubled, (x, e)), other(x, e))
    equal(grad(loss)(parameters, x), by_backward(x))
    samples = [by_backward(x[i]) for i in range(5)]
    expected = {name: torch.stack([sample[name] for sample in samples]) for name in parameters}
    equal(vmap(grad(loss), in_dims=(None, 0))(parameters, x), expected)


def test_module_ensemble(module):
    """torch.func.stack_module_state: many adapters of one shape at once."""
    modules = [module, copy.deepcopy(module)]
    with torch.no_grad():
        for parameter in modules[1].parameters():
            parameter.neg_()
    parameters, buffers = torch.func.stack_module_state(modules)
    x, e = torch.randn(5, 12), torch.randn(6)
    out = vmap(lambda p, b: functional_call(module, (p, b), (x, e)))(parameters, buffers)
    equal(out, torch.stack([m(x, e) for m in modules]))


def test_module_copies(module):
    x, e = torch.randn(5, 12), torch.randn(6)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x, e), module(x, e))
        other(x, e).sum().backward()
        assert all(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in module.parameters())
    torch._dynamo.reset()
    equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x, e), module(x, e), 1e-6)
    equal(torch.export.export(module, (x, e)).module()(x, e), module(x, e), 1e-6)


def test_module_on_several_threads(module):
    x, e = torch.randn(40, 30, 12), torch.randn(6)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(module, (x, e)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
