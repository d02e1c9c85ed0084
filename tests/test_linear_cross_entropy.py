"""The cross-entropy of a frozen head in chunks: the loss of transformers, its gradient, and what never exists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerance import assert_accurate
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from hyperformer_fast import ops
from hyperformer_fast.ops import head_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(rows=(4, 7), d=24, V=61, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, d, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, d, generator=draw, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, rows, generator=draw)
    if labels.numel() > 3:
        labels.view(-1)[1::3] = -100
    return hidden, weight, labels


def eager(hidden, weight, labels, smoothing=0.0, reduction="mean"):
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction=reduction)


def with_gradient(loss, hidden):
    (gradient,) = torch.autograd.grad(2.5 * loss, hidden)
    return loss.detach(), gradient


@pytest.fixture(params=[1, 5, 1000], ids=lambda rows: f"{rows} rows a chunk")
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", request.param * 61 * 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_torchs_loss_of_the_logits(rows_per_chunk, smoothing, reduction):
    hidden, weight, labels = case()
    found = ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, reduction=reduction)
    wanted = eager(hidden, weight, labels, smoothing, reduction)
    torch.testing.assert_close(with_gradient(found, hidden), with_gradient(wanted, hidden), rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        again = ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, reduction=reduction)
    assert torch.equal(again, found)


def test_it_is_what_the_trainer_smooths():
    hidden, weight, labels = case(dtype=torch.float32)
    found = ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1)
    wanted = LabelSmoother(0.1)({"logits": F.linear(hidden, weight)}, labels)
    torch.testing.assert_close(with_gradient(found, hidden), with_gradient(wanted, hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_as_accurate_as_eager_pytorch(dtype, smoothing, monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 17 * 301 * 2)
    hidden, weight, labels = case((5, 13), d=48, V=301, dtype=dtype)
    found = with_gradient(ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing), hidden)
    plain = with_gradient(eager(hidden, weight, labels, smoothing), hidden)
    wide = hidden.detach().double().requires_grad_()
    truth = with_gradient(eager(wide, weight.double(), labels, smoothing), wide)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for name, ours, theirs, right in zip(("loss", "gradient"), found, plain, truth):
        assert_accurate(ours, theirs, right, name, dtype=dtype)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, torch.Tensor) and not function.is_view:
                self.numel = max(self.numel, each.numel())
        return out


def test_no_tensor_has_the_logits_of_all_rows(monkeypatch):
    hidden, weight, labels = case((8, 16), d=4, V=500, dtype=torch.float32)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 10 * 500 * 4)
    with _Largest() as largest:
        ops.linear_cross_entropy(hidden, weight, labels).backward()
    assert largest.numel <= 10 * 500
    with _Largest() as largest:
        eager(hidden, weight, labels).backward()
    assert largest.numel == 8 * 16 * 500


@pytest.mark.parametrize("count", [0, 1])
def test_rows_that_do_not_count(count):
    hidden, weight, labels = case()
    labels[:] = -100
    labels[0, :count] = 3
    total = ops.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(total, hidden)
    assert (total == 0) == (not count) and gradient[1:].count_nonzero() == 0
    assert gradient.isfinite().all() and gradient[0, :count].count_nonzero() == count * hidden.shape[-1]
    mean = ops.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(mean, eager(hidden, weight, labels), equal_nan=True)


@pytest.mark.parametrize("rows", [(), (3,), (2, 3, 2), (0,), (2, 0)], ids=str)
def test_any_shape_and_strides(rows):
    hidden, weight, labels = case(rows)
    found = ops.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    flat = eager(hidden.reshape(-1, 24), weight, labels.reshape(-1), reduction="sum")
    found = with_gradient(found, hidden)
    torch.testing.assert_close(found, with_gradient(flat, hidden))
    strided = hidden.detach().new_zeros(*rows, 48)[..., ::2].copy_(hidden.detach()).requires_grad_()
    columns = weight.t().contiguous().t()
    again = ops.linear_cross_entropy(strided, columns, labels, reduction="sum")
    torch.testing.assert_close(with_gradient(again, strided), found)


def test_expanded_hidden_states():
    _, weight, labels = case()
    row = torch.randn(24, dtype=torch.float64, requires_grad=True)
    found = ops.linear_cross_entropy(row.expand(4, 7, 24), weight, labels)
    wanted = eager(row.expand(4, 7, 24), weight, labels)
    torch.testing.assert_close(with_gradient(found, row), with_gradient(wanted, row))


def test_another_label_may_be_ignored():
    hidden, weight, labels = case()
    labels[labels == -100] = 7
    found = ops.linear_cross_entropy(hidden, weight, labels, ignore_index=7)
    wanted = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), ignore_index=7)
    torch.testing.assert_close(with_gradient(found, hidden), with_gradient(wanted, hidden))


def test_autocast_casts_as_it_does_for_a_linear():
    hidden, weight, labels = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradient(ops.linear_cross_entropy(hidden, weight, labels), hidden)
        plain = with_gradient(F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten()), hidden)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-3)
    rounded = hidden.detach().bfloat16().requires_grad_()
    exact = with_gradient(ops.linear_cross_entropy(rounded, weight.bfloat16(), labels), rounded)
    assert torch.equal(found[0], exact[0]) and torch.equal(found[1].bfloat16(), exact[1])


def test_gradcheck():
    hidden, weight, labels = case((2, 3), d=5, V=7)
    assert torch.autograd.gradcheck(
        lambda x: ops.linear_cross_entropy(x, weight, labels, label_smoothing=0.2), (hidden,), fast_mode=False
    )


def test_the_registered_op():
    hidden, weight, labels = case(dtype=torch.float32)
    op = torch.ops.hyperformer_fast.linear_cross_entropy.default
    for need_grad in (False, True):
        x = hidden if need_grad else hidden.detach()
        torch.library.opcheck(op, (x, weight, labels, 0.1, -100, need_grad))


def test_it_compiles_in_one_graph():
    hidden, weight, labels = case(dtype=torch.float32)

    def loss(hidden, labels):
        return ops.linear_cross_entropy(2 * hidden, weight, labels, label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (slice(None), slice(2)):
        found, wanted = (f(hidden[rows], labels[rows]) for f in (compiled, loss))
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(each, hidden)[0] for each in (found, wanted)))


def test_functorch_runs_it_in_plain_pytorch():
    hidden, weight, labels = case()
    loss = lambda x, y: ops.linear_cross_entropy(x, weight, y, reduction="sum")  # noqa: E731
    found = torch.func.vmap(torch.func.grad(loss))(hidden.detach(), labels)
    (wanted,) = torch.autograd.grad(eager(hidden, weight, labels, reduction="sum"), hidden)
    torch.testing.assert_close(found, wanted)
    _, tangent = torch.func.jvp(lambda x: loss(x, labels), (hidden.detach(),), (torch.ones_like(hidden),))
    torch.testing.assert_close(tangent, wanted.sum())


def test_there_is_no_second_derivative():
    hidden, weight, labels = case()
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(61, 23).double()}, r"weight must be \[V, 24\] .* got \[61, 23\]"),
        ({"weight": torch.zeros(61).double()}, r"weight must be \[V, d\], got \[61\]"),
        ({"weight": torch.zeros(61, 24)}, "weight must have hidden's torch.float64, got torch.float32"),
        ({"weight": torch.zeros(61, 24).double().requires_grad_()}, "weight must not require a gradient"),
        ({"labels": torch.zeros(4, 6, dtype=torch.long)}, r"labels must be \[4, 7\], .* got \[4, 6\]"),
        ({"labels": torch.zeros(4, 7)}, "labels must be int64, got torch.float32"),
        ({"labels": torch.full((4, 7), 61)}, "labels must be from 0 to 60, or -100 .* got 61"),
        ({"labels": torch.full((4, 7), -1)}, "labels must be from 0 to 60, or -100 .* got -1"),
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1, got -0.1"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"hidden": torch.zeros(4, 7, 24).long()}, "hidden must be of a floating dtype"),
        ({"impl": "nobody"}, "nobody"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(zip(("hidden", "weight", "labels"), case())) | change
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)
