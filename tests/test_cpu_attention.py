"""What is the C++ kernels' own in attention and the loss: instruction sets, threads, tiles, heads read in place, raw
ops that refuse what would crash them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from support.pieces import attention_case, cross_entropy_case, dropout_of, softmax_case
from support.tolerance import assert_accurate

from hyperformer_fast import native, philox
from hyperformer_fast.backends.cpu import INSTRUCTION_SETS, ISA_VARIABLE, CpuBackend
from hyperformer_fast.layout import NO_DROPOUT

pytestmark = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENTH = dropout_of(0.1, stream=2**33 + 5)
#: Lq, Lk, dk, dv: one query, tails of every kind, several tiles of queries, several parts of a head.
SHAPES = (
    (1, 1, 1, 1),
    (1, 37, 16, 16),
    (3, 16, 8, 9),
    (8, 128, 64, 64),
    (130, 33, 17, 5),
    (70, 600, 24, 40),
    (300, 7, 8, 8),
)


def check_case(case, dtype: torch.dtype, heads: int, what: str) -> None:
    """The tolerance rule, over the numbers of each head: few gradients of one row may cancel to any accuracy."""
    mine, eager, truth = (
        case.run(apply, convert)
        for apply, convert in (
            (case.mine, lambda t: t),
            (case.eager, lambda t: t),
            (case.eager, lambda t: t.double()),
        )
    )
    for i, results in enumerate(zip(mine, eager, truth)):
        assert_accurate(*(t.reshape(heads, -1) for t in results), f"{i} of {what}", dtype=dtype)


def masks(B: int, Lq: int, Lk: int, dtype: torch.dtype):
    """No mask, one of keys, one of pairs, one with closed rows; True means that a query attends."""
    keys = torch.rand(B, 1, 1, Lk) < 0.7
    keys[..., 0] = True
    pairs = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq if Lk > Lq else 0)
    closed = (torch.rand(B, 1, Lq, Lk) < 0.5) & (torch.arange(Lq) % 3 != 1)[:, None]
    return None, keys, pairs, torch.zeros(closed.shape, dtype=dtype).masked_fill(~closed, -torch.inf)


def check_attention() -> None:
    B, H = 2, 3
    for i, ((Lq, Lk, dk, dv), dtype) in enumerate(itertools.product(SHAPES, DTYPES)):
        torch.manual_seed(i)
        # As a T5 makes them: [B, L, H, d] turned.
        q, k, v = (torch.randn(B, L, H, d).to(dtype).transpose(1, 2) for L, d in ((Lq, dk), (Lk, dk), (Lk, dv)))
        q.mul_(dk**-0.5)
        bias = torch.randn(1, H, Lq, Lk).to(DTYPES[i % 2 * (i % 3)]) if i % 2 else None
        mask = masks(B, Lq, Lk, dtype)[i % 4]
        case = attention_case(q, k, v, bias, mask, (1.0, 0.3)[i % 2], (TENTH, NO_DROPOUT)[i % 3 == 2], frozen=(3,))
        check_case(case, dtype, B * H, f"attention {Lq, Lk, dk, dv, dtype}")


def check_softmax() -> None:
    for i, (Lk, dtype) in enumerate(itertools.product((1, 7, 16, 37, 129, 300), DTYPES)):
        torch.manual_seed(i)
        scores = torch.randn(2, 3, 5, Lk + 1).to(dtype)[..., 1:]
        case = softmax_case(scores, None, masks(2, 5, Lk, dtype)[i % 4], (TENTH, NO_DROPOUT)[i % 3 == 2])
        check_case(case, dtype, 6, f"softmax {Lk, dtype}")


def check_masks() -> None:
    """What is dropped is what philox.py says, in the softmax and inside attention, both ways."""
    backend = CpuBackend()
    for Lq, Lk in ((1, 1), (5, 37), (70, 130)):
        weights = philox.apply(torch.full((2, 3, Lq, Lk), 1 / Lk, dtype=torch.float64), TENTH)
        zeros = torch.zeros(2, 3, Lq, Lk)
        out, probabilities = backend.softmax_dropout_forward(zeros, None, None, TENTH, True)
        torch.testing.assert_close(out.double(), weights, rtol=1e-6, atol=0)
        # With values that are the unit vectors, the output is the weights and the gradient of v their sums.
        q, k, v = torch.zeros(2, 3, Lq, 8), torch.zeros(2, 3, Lk, 8), torch.eye(Lk).expand(2, 3, Lk, Lk)
        out, probabilities = backend.attention_forward(q, k, v, None, None, 1.0, TENTH, True)
        torch.testing.assert_close(out.double(), weights, rtol=1e-6, atol=0)
        g = torch.ones(2, 3, Lq, Lk)
        dv = backend.attention_backward(g, q, k, v, probabilities, 1.0, TENTH, None)[2]
        torch.testing.assert_close(dv.double(), weights.sum(2).unsqueeze(-1).expand(dv.shape), rtol=1e-5, atol=0)


def check_cross_entropy() -> None:
    for i, (V, dtype) in enumerate(itertools.product((1, 15, 16, 100, 1031), DTYPES)):
        torch.manual_seed(i)
        logits, labels = (4 * torch.randn(9, V)).to(dtype), torch.randint(V, (9,))
        labels[i % 9] = -100
        check_case(cross_entropy_case(logits, labels, (0.0, 0.1, 1.0)[i % 3]), dtype, 1, f"loss {V, dtype}")


def check_everything() -> None:
    from hyperformer_fast import backends

    with backends.use_backend("cpu"):
        check_attention()
        check_softmax()
        check_masks()
        check_cross_entropy()


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


def everything(q, k, v, g, bias, mask):
    """All results of the kernels for attention, its softmax and a loss."""
    backend = CpuBackend()
    out, probabilities = backend.attention_forward(q, k, v, bias, mask, 0.5, TENTH, True)
    gradients = backend.attention_backward(g, q, k, v, probabilities, 0.5, TENTH, bias.shape)
    scores = (q @ k.mT).contiguous()
    weights, before = backend.softmax_dropout_forward(scores, bias, mask, TENTH, True)
    dscores = backend.softmax_dropout_backward(scores, before, TENTH)
    rows = scores.reshape(-1, scores.shape[-1])
    losses = backend.cross_entropy_forward(rows, torch.arange(len(rows)) % rows.shape[1], 0.1, 3, True)
    return [out, probabilities, *gradients, weights, before, dscores, *losses]


def arguments(B, H, Lq, Lk, d, dtype=torch.float32):
    q, k, v, g = (torch.randn(B, L, H, d).to(dtype).transpose(1, 2) for L in (Lq, Lk, Lk, Lq))
    return q, k, v, g, torch.randn(1, H, Lq, Lk).to(dtype), torch.rand(B, 1, 1, Lk) < 0.8


def test_every_number_of_threads_gives_the_same_bits():
    tensors = arguments(3, 5, 290, 75, 24)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything(*tensors)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(everything(*tensors), first))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_any_strides(dtype):
    """Heads that lie apart, numbers that do, expanded ones, biases and masks of any strides are as their copies."""
    tensors = arguments(2, 3, 5, 37, 8, dtype)
    first = everything(*(t.contiguous() for t in tensors))
    turned = [t.mT.contiguous().mT for t in tensors]
    apart = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in tensors]
    expanded = [*tensors[:4], tensors[4].expand(2, 3, 5, 37), tensors[5].expand(2, 3, 5, 37)]
    for views in (tensors, turned, apart, expanded):
        for i, (a, b) in enumerate(zip(everything(*views), first)):
            # The gradient of a bias that is given for each sample is not summed over the samples.
            assert torch.equal(a, b) or (i == 5 and views is expanded), i


def test_outputs_lie_as_the_linear_layers_read_them():
    q, k, v, g, bias, mask = arguments(2, 3, 5, 7, 8)
    out, _, dq, dk, dv, *_ = everything(q, k, v, g, bias, mask)
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, dq, dk, dv))


def test_raw_ops_refuse_what_they_cannot_read():
    library, seed = native.cpu_library(), torch.tensor([1])
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    scores, plain = torch.randn(2, 3, 4, 5), (0.0, None, 0)

    def forward(q=q, k=k, v=v, bias=None, mask=None, dropout=plain):
        return library.attention_forward(q, k, v, bias, mask, 1.0, *dropout, True)

    def backward(g=q, probabilities=scores):
        return library.attention_backward(g, q, k, v, probabilities, 1.0, *plain, False)

    refusals = [
        ("q must have four dimensions", lambda: forward(q=q[0])),
        ("q must be float32, bfloat16 or float16", lambda: forward(q.double(), k.double(), v.double())),
        ("k must be float32", lambda: forward(k=k.half())),
        ("k has the wrong shape", lambda: forward(k=k[..., :7])),
        ("v has the wrong shape", lambda: forward(v=v[:, :, :4])),
        ("bias cannot be broadcast", lambda: forward(bias=torch.zeros(4, 4))),
        ("bias must be float32, bfloat16 or float16", lambda: forward(bias=torch.ones(4, 5, dtype=torch.bool))),
        ("mask must be float32", lambda: forward(mask=torch.ones(4, 5, dtype=torch.int64))),
        ("mask must have at most four dimensions", lambda: forward(mask=torch.zeros(1, 1, 1, 4, 5))),
        ("needs a seed", lambda: forward(dropout=(0.5, None, 0))),
        ("p must be from 0 to 1", lambda: forward(dropout=(1.5, seed, 0))),
        ("g has the wrong shape", lambda: backward(g=k)),
        ("probabilities has the wrong shape", lambda: backward(probabilities=scores[..., :4].contiguous())),
        ("probabilities must be contiguous", lambda: backward(probabilities=scores.mT.contiguous().mT)),
        ("scores must have four", lambda: library.softmax_dropout_forward(scores[0], None, None, *plain, True)),
        ("g must be float32", lambda: library.softmax_dropout_backward(scores.half(), scores, *plain)),
        (r"logits must be \[N, V\]", lambda: library.cross_entropy_forward(scores, seed, 0.0, -100, True)),
        (r"labels must be int64 \[4\]", lambda: library.cross_entropy_forward(scores[0, 0], seed, 0.0, -100, True)),
    ]
    for words, call in refusals:
        with pytest.raises(RuntimeError, match=words):
            call()


def test_a_wrong_label_is_not_read():
    """The public op refuses such a label; the kernel, which must not crash, gives NaN."""
    logits = torch.randn(3, 20)
    for label in (-1, 20, 2**40):
        labels = torch.tensor([1, label, -100])
        loss, gradient = native.cpu_library().cross_entropy_forward(logits, labels, 0.1, -100, True)
        assert loss.isnan().tolist() == [False, True, False] and loss[2] == 0
        assert gradient[1].isnan().all() and not gradient[2].any() and gradient[0].isfinite().all()
