"""The registered ops of the pieces: PyTorch's checks of schema, fake kernel and autograd; compiled in one graph."""

from __future__ import annotations

import pytest
import torch
from support.cases import random_packed
from support.pieces import DTYPES, dropout_of

from hyperformer_fast import ops, philox
from hyperformer_fast.layout import NO_DROPOUT, AdapterLayout

OPS = torch.ops.hyperformer_fast
every_p = pytest.mark.parametrize("p", [0.0, 0.5])


def opcheck(name, *arguments):
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def randoms(*shapes, dtype=torch.float32, grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


@every_p
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_residual(p, dtype):
    dropout = dropout_of(p)
    hidden, y = randoms((2, 3, 8), (2, 3, 8), dtype=dtype)
    for weight in (None, torch.randn(8).to(dtype).requires_grad_(), torch.randn(8)):
        opcheck("residual_forward", hidden, y, weight, *dropout, 1e-6, True)
        frozen = None if weight is None else weight.detach()
        opcheck("residual_forward", hidden.detach(), y.detach(), frozen, *dropout, 1e-6, False)
        if weight is not None:
            opcheck("residual_forward", None, y, weight, *NO_DROPOUT, 1e-6, True)


@every_p
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [(False, False), (True, True)])
def test_opcheck_residual_backward(p, dtype, needs):
    out, g_out, g_normed = randoms((2, 3, 8), (2, 3, 8), (2, 3, 8), dtype=dtype, grad=False)
    weight, rstd = torch.randn(8).to(dtype), torch.rand(2, 3)
    for g in (g_out, None):
        opcheck("residual_backward", g, g_normed, out, weight, rstd, *dropout_of(p), *needs)
    opcheck("residual_backward", g_out, None, None, None, None, *dropout_of(p), needs[0], False)


@every_p
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck_act_dropout(p, gated):
    a, c, g = randoms((2, 3, 8), (2, 3, 8), (2, 3, 8))
    c = c if gated else None
    opcheck("act_dropout_forward", a, c, 2, *dropout_of(p))
    detached = [None if t is None else t.detach() for t in (g, a, c)]
    opcheck("act_dropout_backward", *detached, 0, *dropout_of(p))


@every_p
def test_opcheck_softmax(p):
    scores, bias, g = randoms((2, 3, 4, 5), (3, 4, 5), (2, 3, 4, 5))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    for b, m, save in ((None, None, True), (bias, mask, True), (bias.detach(), mask, False)):
        opcheck("softmax_dropout_forward", scores if save else scores.detach(), b, m, *dropout_of(p), save)
    opcheck("softmax_dropout_backward", g.detach(), torch.softmax(scores, -1).detach(), *dropout_of(p))


@every_p
def test_opcheck_attention(p):
    q, k, v, bias = randoms((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), (1, 3, 4, 5))
    mask = torch.zeros(2, 1, 1, 5)
    opcheck("attention_forward", q, k, v, bias, mask, 0.5, *dropout_of(p), True)
    q, k, v = (t.detach() for t in (q, k, v))
    opcheck("attention_forward", q, k, v, None, None, 1.0, *dropout_of(p), False)
    g, probabilities = torch.randn(2, 3, 4, 6), torch.rand(2, 3, 4, 5)
    for shape in (None, bias.shape):
        opcheck("attention_backward", g, q, k, v, probabilities, 0.5, *dropout_of(p), shape)


def test_opcheck_cross_entropy():
    (logits,) = randoms((3, 9))
    labels = torch.tensor([0, -100, 8])
    opcheck("cross_entropy_forward", logits, labels, 0.1, -100, True)
    opcheck("cross_entropy_forward", logits.detach(), labels, 0.0, -100, False)


@every_p
@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck_adapter_residual(p, mixed):
    layout = AdapterLayout(13, 4)
    packed = random_packed(layout, 3 if mixed else 1).float()
    folded = ops.fold(packed, layout, torch.float32)
    index = torch.tensor([0, 2, -1]) if mixed else None
    hidden, y = randoms((3, 2, 13), (3, 2, 13))
    for weight in (None, torch.randn(13, requires_grad=True)):
        arguments = (*folded, index, *layout.arguments, 0, *dropout_of(p), 1e-6, True)
        opcheck("adapter_residual_forward", hidden, y, packed.requires_grad_(), weight, *arguments)


def block(hidden, y, weight, q, bias, labels):
    """Every piece, with a draw for each."""
    draw = lambda like: philox.draw(0.3, like)  # noqa: E731
    out, normed = ops.residual(hidden, y, draw(y), weight)
    gated = ops.act_dropout(normed, "gelu_new", out, draw(out))
    plain = ops.act_dropout(ops.residual(out, gated, draw(out)), "relu", None, draw(out))
    attended = ops.attention(q, q, q, bias, None, 1.0, draw(q))
    weights = ops.softmax_dropout(q @ q.mT, bias, None, draw(q))
    losses = ops.cross_entropy_rows(plain.flatten(0, 1), labels, 0.1)
    return ops.rms_norm(plain, weight), attended, weights, losses


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_to_the_same_bits(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (2, 3):
        leaves = randoms((B, 3, 8), (B, 3, 8), (8,), (B, 2, 4, 8), (1, 2, 4, 4))
        labels = torch.arange(3 * B) % 8
        state = torch.get_rng_state()
        expected = block(*leaves, labels)
        torch.set_rng_state(state)
        found = compiled(*leaves, labels)
        assert all(map(torch.equal, found, expected))
        gradients = [torch.randn_like(t) for t in expected]
        for mine, theirs in zip(*(torch.autograd.grad(out, leaves, gradients) for out in (found, expected))):
            assert torch.equal(mine, theirs)


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        leaves = randoms((2, 3, 8), (2, 3, 8), (8,), (2, 2, 4, 8), (1, 2, 4, 4))
        out = block(*leaves, torch.zeros(6, dtype=torch.int64))
        gradients = torch.autograd.grad(sum(t.sum() for t in out), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves] and out[1].shape == (2, 2, 4, 8)


@every_p
def test_the_attention_lies_as_linear_layers_read_it(p):
    q, k, v = randoms((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8))
    out = ops.attention(q, k, v, None, None, 1.0, dropout_of(p))
    found = [out, *torch.autograd.grad(out.sum(), (q, k, v))]
    assert all(t.transpose(1, 2).is_contiguous() for t in found)
