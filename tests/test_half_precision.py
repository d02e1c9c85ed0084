"""T5s in half precision, and under autocast: what a bare T5 survives, one with adapters does."""

from __future__ import annotations

import pytest
import torch
from support.t5s import batch, tiny_model, tiny_t5

from hyperformer_fast import use_backend

MIXED = ["cola", "mnli", "mnli", "stsb"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_t5s(dtype):
    exact = tiny_model(t5=tiny_t5(dtype=torch.float32))
    half = tiny_model(t5=tiny_t5(dtype=dtype))
    assert {p.dtype for p in half.hypernetworks.parameters()} == {torch.float32}
    if dtype == torch.float16:
        # as from_pretrained leaves it (_keep_in_fp32_modules): one stack then sees two dtypes
        half.t5.encoder.block[0].layer[-1].DenseReluDense.wo.float()
        half.t5.decoder.block[1].layer[-1].DenseReluDense.wo.float()
    a, b = exact(**batch(), task=MIXED), half(**batch(), task=MIXED)
    assert b.logits.dtype == dtype
    assert (a.logits - b.logits).norm() < 0.03 * a.logits.norm()
    b.loss.backward()
    assert half.task_embeddings.task_to_embeddings["mnli"].grad.dtype == torch.float32


def test_autocast():
    model = tiny_model(t5=tiny_t5(dtype=torch.float32))
    exact = model(**batch(), task=MIXED)
    exact.loss.backward()
    grad = model.hypernetworks["encoder"].generator.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch(), task=MIXED)
    out.loss.backward()
    assert (exact.logits - out.logits).norm() < 0.03 * exact.logits.norm()
    assert (model.hypernetworks["encoder"].generator.weight.grad - grad).norm() < 0.2 * grad.norm()


def overflowing_t5():
    """One feature of one feed-forward leaves float16's range; the block around it clamps that."""
    t5 = tiny_t5(dtype=torch.float32)
    with torch.no_grad():
        feed_forward = t5.encoder.block[1].layer[-1].DenseReluDense
        feed_forward.wi.weight.mul_(5)
        feed_forward.wo.weight[3] = 6e4
    return t5.half()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("task", ["mnli", MIXED], ids=["one", "mixed"])
def test_what_overflows_in_float16_is_survived(backend, task):
    t5 = overflowing_t5()
    outputs = []
    handle = t5.encoder.block[1].layer[-1].DenseReluDense.register_forward_hook(lambda *a: outputs.append(a[-1]))
    assert t5(**batch()).logits.isfinite().all() and outputs[0].isinf().any()
    handle.remove()
    model = tiny_model(t5=t5)
    with use_backend(backend):
        out = model(**batch(), task=task)
        out.loss.backward()
    assert out.logits.isfinite().all()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 10 and all(g.isfinite().all() for g in gradients)
    assert model.hypernetworks["encoder"].generator.weight.grad.abs().sum() > 0


def test_finite_numbers_and_their_gradients_are_untouched():
    """The largest finite numbers pass as they are, with their gradient; an infinity has none, as behind T5's clamp."""
    from hyperformer_fast.sites import StackWeights

    model = tiny_model(t5=tiny_t5(dtype=torch.float16))
    net = model.hypernetworks["encoder"]
    with torch.no_grad():
        packed = net(model.task_embeddings()[:1])
    x = torch.zeros(1, 3, 32, dtype=torch.float16)
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = 65504, -65504, torch.inf
    x.requires_grad_()
    out = StackWeights(net, packed.zero_(), "gelu_new").adapt(x, 0, None)
    assert torch.equal(out[0, :2], x[0, :2]) and out[0, 2, 2] == 65504
    out.sum().backward()
    expected = torch.ones_like(x)
    expected[0, 2, 2] = 0
    assert torch.equal(x.grad, expected)
