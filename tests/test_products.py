"""Products with frozen weights by oneDNN."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast import explain_fusion, fuse_t5, ops, unfuse_t5
from hyperformer_fast.ops import products

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Let oneDNN be taken whatever the CPU is, and count its products."""
    monkeypatch.setattr(products, "_found", "")
    calls = []
    original = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda x, weight: calls.append(1) or original(x, weight))
    return calls


def far(mine, truth):
    return ((mine.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("backend", "precision"), [("cuda", "tf32"), ("mkldnn", "bf16")])
def test_precision_of_one_backend(taken, backend, precision):
    """Once it is set, PyTorch refuses to name one precision for all backends."""
    x, weight = torch.randn(8, 16), torch.randn(24, 16)
    matmul = getattr(torch.backends, backend).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        out = ops.linear(x, weight)
    finally:
        matmul.fp32_precision = before
    assert out.shape == (8, 24)
    assert len(taken) == (backend == "cuda")


@pytest.mark.parametrize("lead", [(4,), (9,), (2, 5), (3, 1, 4)], ids=str)
@pytest.mark.parametrize(("K", "M"), [(16, 24), (33, 7), (1, 5), (64, 1)])
def test_product_and_gradient(taken, lead, K, M):
    torch.manual_seed(0)
    x, weight, g = torch.randn(*lead, K, requires_grad=True), torch.randn(M, K), torch.randn(*lead, M)
    out = ops.linear(x, weight)
    out.backward(g)
    assert len(taken) == 2
    assert out.shape == (*lead, M)
    assert far(out, x.double() @ weight.double().t()) < 1e-6
    assert far(x.grad, g.double() @ weight.double()) < 1e-6


@pytest.mark.parametrize("change", ["expanded", "transposed", "strided", "sliced"])
def test_any_strides(taken, change):
    torch.manual_seed(0)
    x = {
        "expanded": torch.randn(16).expand(6, 16),
        "transposed": torch.randn(16, 6).t(),
        "strided": torch.randn(6, 32)[:, ::2],
        "sliced": torch.randn(6, 20)[:, 3:19],
    }[change]
    for weight in (torch.randn(8, 16), torch.randn(16, 8).t(), torch.randn(8, 32)[:, ::2]):
        assert far(ops.linear(x, weight), x.double() @ weight.double().t()) < 1e-6
    assert len(taken) == 3


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (4, 0)], ids=str)
def test_nothing_to_multiply(shape):
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(8, shape[-1])
    out = ops.linear(x, weight)
    out.sum().backward()
    assert torch.equal(out, F.linear(x, weight))
    assert x.grad.shape == x.shape


def test_what_is_not_served_is_pytorchs(taken, monkeypatch):
    x, weight = torch.randn(8, 16), torch.randn(24, 16)
    few = torch.randn(3, 16)
    assert torch.equal(ops.linear(few, weight), F.linear(few, weight))
    assert torch.equal(ops.linear(x, weight.clone().requires_grad_()), F.linear(x, weight))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(ops.linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        ops.linear(x, weight)
    torch.set_float32_matmul_precision("medium")
    try:
        ops.linear(x, weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(products, "_found", "not here")
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    assert not taken
    with pytest.raises(RuntimeError):
        ops.linear(torch.randn(8, 15), weight)


def test_a_trained_weight_without_gradients(taken):
    x, weight = torch.randn(8, 16), torch.randn(24, 16, requires_grad=True)
    with torch.no_grad():
        assert far(ops.linear(x, weight), x.double() @ weight.double().t()) < 1e-6
    assert taken


@pytest.mark.parametrize(
    ("name", "value", "strict"),
    [
        ("mkldnn.matmul", "bf16", False),
        ("mkldnn.matmul", "ieee", True),
        ("cuda.matmul", "tf32", True),
    ],
)
def test_a_precision_that_is_set_by_backend(name, value, strict, taken):
    backend = operator.attrgetter(name)(torch.backends)
    before = backend.fp32_precision
    x, weight = torch.randn(8, 16), torch.randn(24, 16)
    try:
        backend.fp32_precision = value
        assert far(ops.linear(x, weight), F.linear(x, weight)) < 1e-2
    finally:
        backend.fp32_precision = before
    assert bool(taken) == strict


def test_a_sparse_weight_is_pytorchs(taken):
    x, weight = torch.randn(8, 16), torch.randn(24, 16)
    torch.testing.assert_close(ops.linear(x, weight.to_sparse_csr()), F.linear(x, weight))
    assert not taken


def test_a_few_rows_and_a_large_weight(taken, monkeypatch):
    monkeypatch.setattr(products, "LARGE_WEIGHT", 24 * 16)
    ops.linear(torch.randn(1, 16), torch.randn(24, 16))
    assert taken


def test_twice_the_same_bits():
    x, weight = torch.randn(50, 64), torch.randn(48, 64)
    assert torch.equal(ops.linear(x, weight), ops.linear(x, weight))


def test_second_derivative():
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6)
    (gradient,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert far(second, (2 * weight.double().t() @ weight.double()).sum(0).expand(5, 6)) < 1e-6


def test_transforms():
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    each = torch.func.vmap(lambda row: ops.linear(row[None], weight)[0])(x)
    assert far(each, x.double() @ weight.double().t()) < 1e-6
    _, tangent = torch.func.jvp(lambda t: ops.linear(t, weight), (x,), (x,))
    assert far(tangent, x.double() @ weight.double().t()) < 1e-6


def test_opcheck():
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16)
    torch.library.opcheck(torch.ops.hyperformer_fast.linear, (x, weight))


def test_compiled_in_one_graph(taken):
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16)
    compiled = torch.compile(lambda x: ops.linear(x, weight).relu(), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        x = torch.randn(rows, 16, requires_grad=True)
        compiled(x).sum().backward()
        mine, x.grad = x.grad, None
        ops.linear(x, weight).relu().sum().backward()
        assert torch.equal(mine, x.grad)
    assert taken


def test_compiled_before_it_was_tried(taken, monkeypatch):
    """Whether oneDNN can be taken is not known yet, and a compiler cannot find out."""
    monkeypatch.setattr(products, "_found", None)
    x, weight = torch.randn(6, 16), torch.randn(8, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.linear(x, weight), backend="eager")
    assert torch.equal(compiled(x), F.linear(x, weight))
    assert not taken
    monkeypatch.setattr(products, "_found", "")
    compiled(x)
    assert taken


@pytest.mark.parametrize("found", ["wrong numbers", "an error"])
def test_a_product_that_is_wrong_is_not_taken(monkeypatch, found):
    def broken(x, weight):
        if found == "an error":
            raise RuntimeError("no such primitive")
        return x @ weight.t() + 1e-3

    monkeypatch.setattr(products, "_onednn", broken)
    assert "product" in products._test()


def tiny(**fields):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, **fields
    )
    return T5ForConditionalGeneration(config).requires_grad_(False)


def batch():
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids[:, :5].contiguous()}


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_a_fused_t5(taken, kind):
    t5 = tiny(feed_forward_proj=kind, dropout_rate=0.0)
    given = batch()
    embeds = t5.shared(given.pop("input_ids")).requires_grad_()
    plain = t5(inputs_embeds=embeds, **given)
    (plain_gradient,) = torch.autograd.grad(plain.loss, embeds)
    fuse_t5(t5, {"products"})
    assert all(row.fused for row in explain_fusion(t5) if row.piece == "products")
    fused = t5(inputs_embeds=embeds, **given)
    (gradient,) = torch.autograd.grad(fused.loss, embeds)
    # The decoder's embeddings need no gradient, so neither do the five products of its first block that read only them.
    linears = sum(isinstance(module, nn.Linear) for module in t5.modules())
    assert len(taken) == 2 * linears - 5
    assert torch.allclose(plain.logits, fused.logits, rtol=1e-5, atol=1e-5)
    assert torch.allclose(plain_gradient, gradient, rtol=1e-4, atol=1e-7)
    taken.clear()
    unfuse_t5(t5)
    assert torch.equal(t5(inputs_embeds=embeds, **given).logits, plain.logits)
    assert not taken
    assert not any(type(module).__name__ == "FusedLinear" for module in t5.modules())


def test_what_is_not_fused_is_explained(taken, monkeypatch):
    t5 = tiny()
    t5.encoder.block[0].layer[0].SelfAttention.q.weight.requires_grad_(True)
    t5.encoder.block[0].layer[0].SelfAttention.k = nn.Linear(16, 16)
    t5.encoder.block[1].half()
    fuse_t5(t5, {"products"})
    reasons = {row.name: row.reason for row in explain_fusion(t5) if row.piece == "products" and not row.fused}
    assert reasons["encoder.block.0.layer.0.SelfAttention.q"].startswith("its weight is trained")
    assert reasons["encoder.block.0.layer.0.SelfAttention.k"] == "it has a bias"
    assert "float32" in reasons["encoder.block.1.layer.1.DenseReluDense.wi"]
    monkeypatch.setattr(products, "_found", "it is Sunday")
    assert all(
        r.reason == "it is Sunday" or r.reason for r in explain_fusion(unfuse_t5(tiny())) if r.piece == "products"
    )


def test_copies_and_pickles(taken):
    t5 = fuse_t5(tiny(dropout_rate=0.0), {"products"}).eval()
    expected = t5(**batch()).logits
    for other in (copy.deepcopy(t5), pickle.loads(pickle.dumps(t5))):
        taken.clear()
        assert torch.equal(other(**batch()).logits, expected)
        assert taken
    assert t5.state_dict().keys() == tiny().state_dict().keys()


def test_the_loss_of_a_fused_head_needs_no_logits():
    t5 = fuse_t5(tiny(dropout_rate=0.0), {"products", "loss"})
    assert next(row for row in explain_fusion(t5) if row.piece == "loss").fused
