"""A stack whose weights are kept: the numbers of a stack that lives for one forward, by one op for each site."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import backends, ops
from hyperformer_fast.backends import registry
from hyperformer_fast.layout import NO_DROPOUT, AdapterLayout, AdapterSpec, Folded
from hyperformer_fast.ops import prepared_stack
from hyperformer_fast.philox import draw

SITES, TASKS = 3, 4
LAYOUT = AdapterLayout(32, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

compiled = pytest.mark.skipif(not registry.get("cpu").availability(), reason="the CPU library is not there")


def stacks(layout=LAYOUT, tasks=TASKS, activation="gelu_new"):
    """The same weights, for one forward and for many."""
    torch.manual_seed(0)
    packed = torch.stack([random_packed(layout, tasks).float() for _ in range(SITES)])
    return ops.Stack(packed, layout, activation), ops.PreparedStack(packed, layout, activation)


def rows(samples, length, dtype=torch.float32, d=LAYOUT.d):
    return torch.randn(samples, length, d).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "length"), [(1, 1), (4, 1), (3, 5), (16, 1), (17, 1), (2, 40), (0, 3), (2, 0)], ids=str
)
def test_adapters_of_mixed_tasks(samples, length, dtype):
    once, many = stacks()
    index = torch.arange(samples) % (TASKS + 1) - 1
    for site in range(SITES):
        for kind in (torch.int32, torch.int64):
            x = rows(samples, length, dtype)
            assert torch.equal(many.adapter(x, site, index.to(kind)), once.adapter(x, site, index.to(kind)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "length"), [(1, 1), (5, 3), (33, 1)], ids=str)
def test_adapters_of_one_task_of_many(samples, length, dtype):
    once, many = stacks()
    for task in range(TASKS):
        alone = ops.Stack(once._packed[:, task : task + 1].contiguous(), LAYOUT, "gelu_new")
        x = rows(samples, length, dtype)
        assert torch.equal(many.of_task(task).adapter(x, 1, None), alone.adapter(x, 1, None))


@compiled
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
@pytest.mark.parametrize("norms", itertools.product([False, True], repeat=2), ids=str)
def test_few_rows_have_the_bits_of_many(norms, activation):
    for d, b in ((512, 16), (768, 24), (16, 1), (48, 9), (64, 31)):
        once, many = stacks(AdapterLayout(d, b, *norms), 2, activation)
        x = rows(16, 2, d=d)  # more rows than the kernel for few takes
        index = torch.arange(16) % 3 - 1
        together = once.adapter(x, 0, index)
        for first, last in ((0, 1), (1, 2), (2, 6), (0, 8)):
            assert torch.equal(many.adapter(x[first:last], 0, index[first:last]), together[first:last])


def test_rows_with_any_strides():
    once, many = stacks()
    index = torch.tensor([2, 0])
    x = torch.randn(3, LAYOUT.d, 2).permute(2, 0, 1)
    assert torch.equal(many.adapter(x, 0, index), once.adapter(x.contiguous(), 0, index))
    x = torch.randn(1, 1, LAYOUT.d).expand(2, 3, -1)
    assert torch.equal(many.adapter(x, 0, index[[0, 0, 1]][::2]), once.adapter(x.contiguous(), 0, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [1, 20])
def test_the_residual_and_its_norm(samples, weight, dtype):
    once, many = stacks()
    index = torch.arange(samples) % TASKS
    y, hidden = rows(samples, 1, dtype), rows(samples, 1, dtype)
    norm = None if weight is None else torch.randn(2, LAYOUT.d)[:, ::1][1].to(weight)
    got, expected = (s.adapter_residual(y, hidden, 2, index, NO_DROPOUT, norm, 1e-6) for s in (many, once))
    if norm is None:
        got, expected = (got,), (expected,)
    for mine, theirs in zip(got, expected):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


def test_a_residual_that_no_single_op_serves():
    once, many = stacks()
    y, hidden, weight = rows(2, 1), rows(2, 1), torch.randn(2 * LAYOUT.d)[::2]
    index = torch.tensor([1, 3])
    for arguments in (
        (y, hidden, 0, index, NO_DROPOUT, weight),  # strides
        (y.bfloat16(), hidden, 0, index),  # autocast
        (y, hidden.clone().requires_grad_(), 0, index),
    ):
        got, expected = many.adapter_residual(*arguments), once.adapter_residual(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    dropout = draw(0.5, y)
    got, expected = (s.adapter_residual(y, hidden, 0, index, dropout) for s in (many, once))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got == hidden).any()


def test_gradients_of_inputs_flow():
    once, many = stacks()
    x, index = rows(3, 2), torch.tensor([0, -1, 2])
    gradients = []
    for stack in (once, many):
        leaf = x.clone().requires_grad_()
        stack.adapter(leaf, 1, index).pow(2).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_functorch_and_forward_mode():
    once, many = stacks(tasks=1)
    x, tangent = rows(3, 2).double(), rows(3, 2).double()
    got, expected = (torch.func.jvp(lambda x, s=s: s.adapter(x, 0, None), (x,), (tangent,)) for s in (many, once))
    for mine, theirs in zip(got, expected):
        assert torch.equal(mine, theirs)
    batched = torch.func.vmap(lambda row: many.adapter(row, 0, None))(x)
    torch.testing.assert_close(batched, once.adapter(x, 0, None))


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [
        (rows(2, 1)[..., :7], torch.tensor([0, 1]), r"\[\.\.\., 32\].*7"),
        (rows(2, 1), torch.tensor([0, 1, 2]), "one entry per sample|of x's 2"),
        (rows(2, 1), torch.tensor([0.0, 1.0]), "int32 or int64"),
        (rows(2, 1), torch.tensor([0, TASKS]), f"to {TASKS - 1}, got {TASKS}"),
        (rows(2, 1), torch.tensor([0, -2]), "from -1 .*got -2"),
        (rows(2, 1), None, "task_index"),
        (rows(2, 1).long(), torch.tensor([0, 1]), "floating"),
    ],
)
def test_arguments_that_do_not_fit(x, index, message):
    _, many = stacks()
    many.adapter(rows(2, 1), 0, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        many.adapter(x, 0, index)


def test_a_residual_that_does_not_fit():
    _, many = stacks()
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="hidden must"):
        many.adapter_residual(rows(2, 1), rows(3, 1), 0, index)
    with pytest.raises(ValueError, match="weight must be"):
        many.adapter_residual(rows(2, 1), rows(2, 1), 0, index, NO_DROPOUT, torch.ones(3))


def test_backends_by_name():
    _, many = stacks()
    x, index = rows(2, 1), torch.tensor([3, 1])
    expected = many.adapter(x, 0, index)
    with backends.use_backend("reference"):
        torch.testing.assert_close(many.adapter(x, 0, index), expected, rtol=1e-5, atol=1e-5)
    if registry.get("cpu").availability():
        with backends.use_backend("cpu"):
            assert torch.equal(many.adapter(x, 0, index), expected)
            with pytest.raises(backends.BackendError, match="float64"):
                many.adapter(x.double(), 0, index)


def test_the_views_of_single_tasks_are_few():
    _, many = stacks(tasks=40)
    for task in range(40):
        many.of_task(task).adapter(rows(1, 1), 0, None)
    assert len(many._of_tasks) == prepared_stack._TASKS_KEPT
    assert many.of_task(39) is many.of_task(39)


def test_bytes_are_counted_once():
    _, many = stacks()
    bare = many.nbytes
    assert bare == SITES * TASKS * LAYOUT.numel * 4
    many.make_ready(torch.float32)
    folded = many.nbytes
    many.of_task(2).adapter(rows(1, 1), 0, None)
    many.adapter(rows(1, 1), 0, torch.tensor([1]))
    assert bare < folded == many.nbytes < 2.5 * bare


def prepared_op():
    cpu = registry.get("cpu")
    folded = cpu.fold(random_packed(LAYOUT, 2).float(), LAYOUT, torch.float32)
    (weights,) = cpu.prepare([folded], AdapterSpec(LAYOUT, "relu"))
    return cpu.library(), folded, weights


@compiled
def test_the_raw_ops_refuse_what_was_not_prepared():
    library, folded, weights = prepared_op()
    x, index = rows(2, 1), torch.tensor([0, 1])
    call = library.prepared_adapter
    assert torch.equal(call(x, weights, index, -1)[1:], call(x[1:], weights, None, 1))
    changed = weights.clone()
    changed[:2] = 0
    for wrong in (weights[:-8], weights[16:].clone(), weights[:4], weights.double(), changed, torch.zeros(0)):
        with pytest.raises(RuntimeError, match="what `prepare` returned"):
            call(x, wrong, index, -1)
    for task, tasks in ((2, None), (0, index), (-1, None)):
        with pytest.raises(RuntimeError, match="task"):
            call(x, weights, tasks, task)
    with pytest.raises(RuntimeError, match="dtype that the weights were prepared for"):
        call(x.bfloat16(), weights, index, -1)
    for name, part in folded._asdict().items():
        with pytest.raises(RuntimeError, match=name):
            library.prepare(
                *folded._replace(**{name: part[..., :-1].contiguous()}), *AdapterSpec(LAYOUT, "relu").arguments
            )
    with pytest.raises(RuntimeError, match="hidden has the wrong shape"):
        library.prepared_adapter_residual(rows(3, 1), x, weights, index, -1, None, 1e-6)
    with pytest.raises(RuntimeError, match="norm_weight must be"):
        library.prepared_adapter_residual(x, x, weights, index, -1, torch.ones(3), 1e-6)


@compiled
def test_a_wrong_kernel_for_few_rows_is_not_trusted(monkeypatch):
    cpu = registry.get("cpu")
    real = type(cpu).site_call

    def wrong(self, weights, task):
        call = real(self, weights, task)
        return call._replace(adapter=lambda x, index: call.adapter(x, index) * 1.01)

    monkeypatch.setattr(type(cpu), "site_call", wrong)
    assert any("adapter_forward" in fault for fault in backends.selftest.faults(cpu))


def test_folded_weights_are_those_of_the_stack():
    once, many = stacks()
    whole = many._sites_folded(torch.float32)
    one = many.of_task(2)._sites_folded(torch.float32)
    for of_site, of_whole, expected in zip(one, whole, once._sites_folded(torch.float32)):
        for mine, theirs, plain in zip(of_site, of_whole, expected):
            assert torch.equal(theirs, plain)
            assert mine.numel() == 0 or mine.data_ptr() == theirs[2].data_ptr()
    assert isinstance(one[0], Folded)
