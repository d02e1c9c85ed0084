"""What PyTorch's transforms do with the ops: the reference's values and derivatives, or an error naming the cure."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.cases import random_packed
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from hyperformer_fast import backends, ops, reference
from hyperformer_fast.adapter import FusedHyperAdapter
from hyperformer_fast.layout import AdapterLayout

LAYOUT = AdapterLayout(12, 4, pre_norm=True)
INDEX = torch.tensor([2, 0, -1, 2, 1])


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
        with pytest.raises(RuntimeError, match="no second derivative.*reference.adapter"):
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
