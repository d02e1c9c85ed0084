"""What is the C++ kernels' own in the pieces of a T5: instruction sets, threads, rows read in place, raw ops that
refuse what would crash them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from support.cases import random_packed
from support.tolerance import assert_accurate

from hyperformer_fast import native, philox
from hyperformer_fast import t5_reference as truth
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.backends.cpu import INSTRUCTION_SETS, ISA_VARIABLE, CpuBackend
from hyperformer_fast.layout import NO_DROPOUT, AdapterLayout, AdapterSpec, Dropout, normed_dtype

pytestmark = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Whole vectors and tails of every instruction set; several draws of columns (128 at a time) and blocks of rows.
WIDTHS = (1, 7, 16, 37, 64, 129, 513, 768)
EPS = 1e-6


def dropout(p: float, seed: int = -(2**62) + 12345, stream: int = 2**33 + 5) -> Dropout:
    return Dropout(p, torch.tensor([seed]), stream) if p else NO_DROPOUT


def rows(n: int, dtype: torch.dtype, count: int = 5) -> torch.Tensor:
    """Rows that lie apart from each other, and begin anywhere."""
    return torch.randn(3, count, n + 3).to(dtype)[:, :, 1 : n + 1]


def check_masks() -> None:
    """The bits are those of philox.py, wherever a row ends; p = 1 drops everything, even NaN."""
    backend = CpuBackend()
    for n, p in itertools.product(WIDTHS, (0.1, 0.5, 1 / 65536, 1.0)):
        drop = dropout(p)
        out = backend.act_dropout_forward(torch.ones(3, 70, n), None, "relu", drop)
        assert torch.equal(out, philox.apply(torch.ones(3, 70, n), drop)), (n, p)
    dead = torch.full((2, 40), torch.nan)
    assert not backend.act_dropout_forward(dead, dead, "silu", dropout(1.0)).any()
    hidden = torch.ones(2, 40)
    assert torch.equal(backend.residual_forward(hidden, dead, dropout(1.0), None, EPS, False)[0], hidden)


def check_residual() -> None:
    backend = CpuBackend()
    # The norm of one number is its sign, whose gradient cancels.
    for i, (n, dtype, weight_dtype) in enumerate(itertools.product(WIDTHS[1:], DTYPES, DTYPES)):
        torch.manual_seed(i)
        drop = dropout((0.0, 0.3, 0.1)[i % 3], i)
        hidden, y, g_out = (rows(n, dtype) for _ in range(3))
        weight = (torch.rand(n) + 0.5).to(weight_dtype)
        g_normed = rows(n, normed_dtype(dtype, weight_dtype))
        if i % 4 == 0:
            hidden, drop = None, NO_DROPOUT
        arguments = (hidden, y, drop, weight, EPS, True)
        mine = backend.residual_forward(*arguments)
        wide = truth.residual_forward(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
        summed = y if hidden is None else mine[0]
        kept = (summed, weight, mine[2])
        g_out = None if hidden is None else g_out
        back = backend.residual_backward(g_out, g_normed, *kept, drop, True, True)
        plain = truth.residual_backward(g_out, g_normed, *kept, drop, True, True)
        exact = truth.residual_backward(
            *(t if t is None else t.double() for t in (g_out, g_normed, *kept)), drop, True, True
        )
        eager = truth.residual_forward(*arguments)
        coarser = max(dtype, weight_dtype, key=lambda t: torch.finfo(t).eps)
        for name, k, e, t in zip(
            ("out", "normed", "rstd", "dhidden", "dy", "dweight"), (*mine, *back), (*eager, *plain), (*wide, *exact)
        ):
            assert k.dtype == e.dtype, (name, k.dtype, e.dtype)
            # What is normed is the rounded sum, and float32 results then rest on rounded ones.
            assert_accurate(k, e, t, f"{name} at {n, dtype, weight_dtype}", dtype=coarser)


def check_activations() -> None:
    backend = CpuBackend()
    for i, (n, dtype, activation) in enumerate(itertools.product(WIDTHS, DTYPES, ACTIVATIONS)):
        torch.manual_seed(i)
        drop = dropout((0.0, 0.3, 0.1)[i % 3], i)
        g, a = rows(n, dtype), rows(n, dtype)
        gate = rows(n, dtype) if i % 2 else None
        wide = (g.double(), a.double(), None if gate is None else gate.double())
        calls = ("out", "act_dropout_forward", slice(1, 3)), ("gradient", "act_dropout_backward", slice(0, 3))
        for name, call, which in calls:
            results = [
                getattr(where, call)(*tensors[which], activation, drop)
                for where, tensors in ((backend, (g, a, gate)), (truth, (g, a, gate)), (truth, wide))
            ]
            for k, e, t in zip(*(r if isinstance(r, tuple) else (r,) for r in results)):
                assert_accurate(k, e, t, f"{name} at {n, dtype, activation}")


def check_adapter_residual() -> None:
    """One pass has the bits of the adapter and the sum in turn, tasks that are mixed or absent included."""
    backend = CpuBackend()
    for i, ((d, b), dtype) in enumerate(itertools.product(((37, 3), (96, 8), (130, 17)), DTYPES)):
        torch.manual_seed(i)
        spec = AdapterSpec(AdapterLayout(d, b, pre_norm=i % 2 == 1), ACTIVATIONS[i % 4])
        mixed = i % 3 != 0
        packed = random_packed(spec.layout, 3 if mixed else 1).float()
        folded = backend.fold(packed, spec.layout, dtype)
        index = torch.tensor([2, -1, 0]) if mixed else None
        hidden, y, drop = rows(d, dtype, 70), rows(d, dtype, 70), dropout((0.2, 0.0)[i % 2])
        weight = None if i % 4 == 3 else torch.rand(d).to(DTYPES[i % 3])
        arguments = (folded, spec, index, drop, weight, EPS)
        for save in (False, True):
            mine = backend.adapter_residual_forward(hidden, y, *arguments, save)
            adapted, saved = backend.adapter_forward(y, folded, spec, index, save)
            out, normed, rstd = backend.residual_forward(hidden, adapted, drop, weight, EPS, save)
            for k, e in zip((mine[0], *mine[1], *mine[2:]), (out, *saved, normed, rstd)):
                assert torch.equal(k, e), (d, b, dtype)


def check_everything() -> None:
    check_masks()
    check_residual()
    check_activations()
    check_adapter_residual()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from hyperformer_fast import backends\n"
        "report = next(r for r in backends.backend_report() if r['name'] == 'cpu')\n"
        "if report['available']:\n"
        "    import importlib.util as u\n"
        f"    spec = u.spec_from_file_location('t', {__file__!r})\n"
        "    m = u.module_from_spec(spec)\n    spec.loader.exec_module(m)\n    m.check_everything()\n"
        "    print('checked')\n"
        "else:\n    print(report['reason'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, ISA_VARIABLE: isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if "checked" not in done.stdout:
        pytest.skip(f"needs a CPU with {isa}: {done.stdout.strip()}")


def test_every_number_of_threads_gives_the_same_bits():
    backend, n, drop = CpuBackend(), 96, dropout(0.1)
    torch.manual_seed(0)
    hidden, y, g, g_normed = (torch.randn(1111, n) for _ in range(4))
    weight = torch.rand(n)
    spec = AdapterSpec(AdapterLayout(n, 8), "gelu_new")
    folded = backend.fold(random_packed(spec.layout).float(), spec.layout, torch.float32)

    def results():
        forward = backend.residual_forward(hidden, y, drop, weight, EPS, True)
        fused = backend.adapter_residual_forward(hidden, y, folded, spec, None, drop, weight, EPS, True)
        return [
            *forward,
            *backend.residual_backward(g, g_normed, forward[0], weight, forward[2], drop, True, True),
            backend.act_dropout_forward(y, hidden, "gelu_new", drop),
            *backend.act_dropout_backward(g, y, hidden, "gelu_new", drop),
            *(fused[0], *fused[1], *fused[2:]),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(results(), first))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_strides(dtype):
    """Rows that lie apart, columns that do, and expanded ones are the same numbers as their copies."""
    backend, drop, weight = CpuBackend(), dropout(0.3), torch.rand(24).to(dtype)
    base = torch.randn(6, 5, 24).to(dtype)
    for view in (base.transpose(0, 1), base[::2], base[:, :1].expand(6, 5, 24), base[..., :1].expand(6, 5, 24)):
        views, copies = (view, view), (view.contiguous(), view.contiguous())
        results = []
        for hidden, y in (views, copies):
            out, normed, rstd = backend.residual_forward(hidden, y, drop, weight, EPS, True)
            back = backend.residual_backward(hidden, y, hidden, weight, rstd, drop, True, True)
            results.append(
                [out, normed, rstd, *back, backend.act_dropout_forward(y, hidden, "silu", drop)]
                + [*backend.act_dropout_backward(y, hidden, y, "silu", drop)]
            )
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(*results))


def test_no_rows_and_no_columns():
    backend, drop = CpuBackend(), dropout(0.5)
    for shape in ((0, 8), (3, 0), (2, 0, 8), (0,)):
        x, weight = torch.zeros(shape), torch.ones(shape[-1])
        out, normed, rstd = backend.residual_forward(x, x, drop, weight, EPS, True)
        dhidden, dy, dweight = backend.residual_backward(x, x, out, weight, rstd, drop, True, True)
        assert out.shape == normed.shape == dhidden.shape == dy.shape == shape and rstd.shape == shape[:-1]
        assert torch.equal(dweight, torch.zeros(shape[-1]))
        assert backend.act_dropout_forward(x, None, "gelu", drop).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_and_what_is_not_finite(dtype):
    """-0 + -0 is -0; an infinity or NaN stays in its row, and one that is dropped is gone."""
    backend = CpuBackend()
    zero = torch.full((2, 24), -0.0).to(dtype)
    out = backend.residual_forward(zero, zero, NO_DROPOUT, None, EPS, False)[0]
    assert torch.signbit(out).all()
    hidden, y, weight = torch.randn(40, 24).to(dtype), torch.randn(40, 24).to(dtype), torch.ones(24)
    drop = dropout(0.5)
    kept = philox.kept(drop, y.shape)
    y[:, 20] = torch.inf
    y[:, 3] = torch.nan
    out, normed, _ = backend.residual_forward(hidden, y, drop, weight, EPS, True)
    assert torch.equal(out[:, 20].isinf(), kept[:, 20]) and torch.equal(out[:, 3].isnan(), kept[:, 3])
    clean = ~(kept[:, 20] | kept[:, 3])
    assert torch.equal(normed.isfinite().all(1), clean) and clean.any()


def test_raw_ops_refuse_what_they_cannot_read():
    library, x, seed = native.cpu_library(), torch.randn(4, 8), torch.tensor([1])
    weight, rstd = torch.ones(8), torch.ones(4)
    forward, backward, act = library.residual_forward, library.residual_backward, library.act_dropout_forward
    refusals = [
        ("hidden must be float32", lambda: forward(x.half(), x, 0.0, None, 0, None, EPS, True)),
        ("hidden has the wrong shape", lambda: forward(x[:3], x, 0.0, None, 0, None, EPS, True)),
        ("y must be float32, bfloat16 or float16", lambda: forward(None, x.double(), 0.0, None, 0, weight, EPS, True)),
        (r"y must be \[..., n\]", lambda: forward(None, x[0, 0], 0.0, None, 0, weight, EPS, True)),
        (r"weight must be \[8\]", lambda: forward(x, x, 0.0, None, 0, weight[:7], EPS, True)),
        ("without hidden", lambda: forward(None, x, 0.5, seed, 0, weight, EPS, True)),
        ("p must be from 0 to 1", lambda: forward(x, x, 1.5, seed, 0, None, EPS, True)),
        ("p must be from 0 to 1", lambda: act(x, None, 0, float("nan"), seed, 0)),
        ("needs a seed", lambda: act(x, None, 0, 0.5, None, 0)),
        ("needs a seed", lambda: act(x, None, 0, 0.5, seed.int(), 0)),
        ("needs a seed", lambda: act(x, None, 0, 0.5, torch.tensor([], dtype=torch.int64), 0)),
        ("activation must be from 0 to 3", lambda: act(x, None, 4, 0.0, None, 0)),
        ("c has the wrong shape", lambda: act(x, x[:, :7], 0, 0.0, None, 0)),
        ("must be a gradient", lambda: backward(None, None, x, weight, rstd, 0.0, None, 0, True, True)),
        ("needs out, weight and rstd", lambda: backward(x, x, x, weight, None, 0.0, None, 0, True, True)),
        ("rstd has the wrong shape", lambda: backward(x, x, x, weight, rstd[:3], 0.0, None, 0, True, True)),
        ("g_normed must be float32", lambda: backward(x, x.half(), x, weight, rstd, 0.0, None, 0, True, True)),
        ("g_out has the wrong shape", lambda: backward(x[:2], x, x, weight, rstd, 0.0, None, 0, True, True)),
        ("up to 4294967295 rows", lambda: act(x[:1].expand(2**32, 8), None, 0, 0.5, seed, 0)),
    ]
    for words, call in refusals:
        with pytest.raises(RuntimeError, match=words):
            call()
