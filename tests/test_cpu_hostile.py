"""Hostile calls of the raw ops: each is refused or right, and none ends the process.

Run as a script, this file makes the calls and prints a line of JSON for each; the tests run it in a process of its own
and judge the lines. The last line of a process that died names the call that killed it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import native, reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout

pytestmark = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)

LAYOUT = AdapterLayout(8, 2, pre_norm=True)
STATIC = (8, 2, True, True, 0)
NAMES = {
    "adapter_forward": "x wd wg vectors scale root mean task_index d b pre_norm post_norm activation save",
    "adapter_backward": "g x z r pre_mean pre_rstd packed wd wg vectors scale root mean task_index d b pre_norm"
    " post_norm activation need_dx need_dpacked",
    "fold": "packed d b pre_norm post_norm dtype",
    "generate_weights": "E G g0",
    "hyper_adapter": "x E G g0 task_index d b pre_norm post_norm activation save",
}
#: What the ops may take, being the same numbers: the result must be the plain call's, bit for bit.
SAME = ("strided", "column-major", "offset", "negative view", "imaginary part", "needs a gradient")
#: Other calls that are as good as the first: fold takes any leading dimensions; forward's weights have one shape
#: whether there was a pre-norm or not; hyper_adapter folds for any x and any number of tasks.
OTHER = (
    *(("fold", "packed", what) for what in ("one dimension more", "a row less", "a row more")),
    ("adapter_forward", "pre_norm", "flipped"),
    ("hyper_adapter", "E", "a row more"),
    *(("hyper_adapter", "x", what) for what in ("float16", "bfloat16")),
)
#: Only rows (and an index, and what is to be folded) may lie anyhow: the rest is expected contiguous.
ANY_STRIDES = ("x", "g", "task_index", "fold packed")


def good_calls():
    torch.manual_seed(0)
    library = native.cpu_library()
    packed = random_packed(LAYOUT, 2).float()
    folded = reference.fold(packed, LAYOUT, torch.float32)
    x, g, index = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.tensor([1, -1, 0])
    _, *saved = library.adapter_forward(x, *folded, index, *STATIC, True)
    return {
        "adapter_forward": [x, *folded, index, *STATIC, True],
        "adapter_backward": [g, x, *saved, packed, *folded, index, *STATIC, True, True],
        "fold": [packed, *STATIC[:4], torch.float32],
        "generate_weights": [torch.randn(1, 2, 5), torch.randn(1, 7, 5), torch.randn(1, 7)],
        "hyper_adapter": [x, torch.randn(2, 5), torch.randn(LAYOUT.numel, 5), packed[0], index, *STATIC, True],
    }


def tensors(t):
    """name -> a tensor, or what is none, to stand for ``t``."""
    floating = t.is_floating_point()
    found = {
        "None": None,
        "a list": [t],
        "a number": 3,
        "meta": t.to("meta"),
        "sparse": t.to_sparse(),
        "without dimensions": torch.zeros((), dtype=t.dtype),
        "empty": torch.zeros(0, dtype=t.dtype),
        "bool": t.bool(),
        "complex": t.to(torch.complex64),
        "uint8": t.to(torch.uint8),
        "float64": t.double(),
        "float16": t.half(),
        "one dimension more": t.unsqueeze(0),
        "a column less": t[..., :-1],
        "a row less": t[:-1],
        "a row more": torch.cat([t, t[:1]]),
        "2^55 rows": t[:1].expand(2**55, *t.shape[1:]),
        "strided": torch.stack([t, t], -1)[..., 0],
        "column-major": t.mT.contiguous().mT if t.dim() > 1 else t,
        "offset": torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    }
    if floating:
        found |= {
            "float8": t.to(torch.float8_e4m3fn),
            "quantised": torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "negative view": torch._neg_view(-t),
            "imaginary part": torch.complex(t, -t).conj().imag,
            "needs a gradient": t.clone().requires_grad_(),
        }
    else:
        found |= {"too high": t + 1, "too low": t - 1, "2^62": t + 2**62, "-2^63": t.clamp(max=0) - 2**63}
    return found


def variants(name, value):
    if isinstance(value, torch.Tensor):
        return tensors(value)
    if isinstance(value, bool):
        return {"flipped": not value, "a string": "a"} if name not in ("save", "need_dx", "need_dpacked") else {}
    if isinstance(value, torch.dtype):
        others = (torch.float64, torch.int8, torch.complex64, torch.quint8, torch.float8_e5m2)
        return {str(d): d for d in others} | {"None": None, "77": 77, "-1": -1}
    numbers = (-1, 7, 2**24 - 1, 2**24, 2**31, 2**62, 2**63 - 1, -(2**63), None, 1.5, "a")
    return {repr(v): v for v in numbers} | ({"0": 0, "1": 1} if name != "activation" else {})


def bits(results):
    return [t.detach().contiguous().numpy().tobytes().hex() for t in results]


def make_every_call():
    warnings.simplefilter("ignore")  # torch's own, on tensors that it means to drop
    library = native.cpu_library()
    for op, arguments in good_calls().items():
        plain = bits(getattr(library, op)(*arguments))
        for i, name in enumerate(NAMES[op].split()):
            for what, value in variants(name, arguments[i]).items():
                print(json.dumps({"op": op, "name": name, "what": what}), flush=True)
                try:
                    results = getattr(library, op)(*arguments[:i], value, *arguments[i + 1 :])
                    outcome = "same" if bits(results) == plain else "other numbers"
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
                print(json.dumps({"outcome": outcome}), flush=True)


@pytest.fixture(scope="module")
def outcomes():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"status {done.returncode} in {lines[-1] if lines else None}\n{done.stderr[-3000:]}"
    assert len(lines) % 2 == 0 and len(lines) > 1000
    return [call | result for call, result in zip(lines[::2], lines[1::2])]


def test_no_call_ends_the_process_or_passes_unnoticed(outcomes):
    for call in outcomes:
        name = f"fold {call['name']}" if call["op"] == "fold" else call["name"]
        free = name in ANY_STRIDES or call["what"] not in ("strided", "column-major")
        if (call["op"], call["name"], call["what"]) in OTHER:
            assert call["outcome"] in ("same", "other numbers"), call
            continue
        allowed = call["what"] in SAME and free
        # Contiguous already where it has one dimension, or none of any size: nothing to refuse.
        if call["what"] == "column-major" and call["outcome"] == "same":
            allowed = True
        assert (call["outcome"] == "same") == allowed and call["outcome"] != "other numbers", call


@pytest.mark.parametrize("op", NAMES)
def test_refusals_name_what_is_wrong(op, outcomes):
    """What a caller can get wrong by accident: the message has the name of the argument, or says what it is not for."""
    accidents = ("float64", "float16", "a column less", "a row more", "without dimensions", "strided")
    for call in outcomes:
        if call["op"] != op or call["what"] not in accidents or call["outcome"] in ("same", "other numbers"):
            continue
        words = call["outcome"]
        assert words.startswith("RuntimeError"), call
        # A wrong x or wd can also be seen as another's fault, that is named instead.
        assert any(word in words for word in NAMES[op].replace("_", " ").split() + NAMES[op].split()), call


def test_no_dimension_is_no_row():
    """An x without dimensions once read sizes before their start."""
    calls = good_calls()
    x, *rest = calls["adapter_forward"]
    for scalar in (torch.tensor(1.0), torch.tensor(1.0, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 8\]"):
            native.cpu_library().adapter_forward(scalar, *rest)
    with pytest.raises(RuntimeError, match=r"wd must be \[T, b, d\]"):
        native.cpu_library().adapter_forward(x, torch.tensor(1.0), *rest[1:])


def test_a_gradient_through_a_raw_op_is_not_lost_in_silence():
    packed = random_packed(LAYOUT).float().requires_grad_()
    out = native.cpu_library().fold(packed, *STATIC[:4], torch.float32)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out.sum().backward()
    assert any("autograd kernel was not registered" in str(w.message) for w in caught)


NORMS = list(itertools.product([False, True], repeat=2))


def forward_and_backward(x, packed, layout, index=None, activation=0):
    library = native.cpu_library()
    folded = library.fold(packed, layout.d, layout.b, layout.pre_norm, layout.post_norm, x.dtype)
    static = (layout.d, layout.b, layout.pre_norm, layout.post_norm, activation)
    out, *saved = library.adapter_forward(x, *folded, index, *static, True)
    g = torch.ones_like(x)
    return [out, *library.adapter_backward(g, x, *saved, packed, *folded, index, *static, True, True)]


def plain(x, packed, layout):
    x, packed = x.detach().requires_grad_(), packed.detach().requires_grad_()
    out = reference.adapter(x, packed, layout, "gelu_new")
    return [out.detach(), *torch.autograd.grad(out.sum(), (x, packed))]


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize(("d", "b"), [(1, 1), (1, 400), (2, 401), (33, 257), (400, 399), (3000, 1)])
def test_extreme_shapes(d, b, pre, post):
    layout = AdapterLayout(d, b, pre, post)
    packed, x = random_packed(layout).float(), torch.randn(67, d)
    truth = plain(x.double(), packed.double(), layout)
    # A layer norm over two numbers cancels; else some hundred terms are added, in another order than elsewhere.
    allowed = 1e-3 if d <= 2 and (pre or post) else 1e-5
    for name, mine, true in zip(("out", "dx", "dpacked"), forward_and_backward(x, packed, layout), truth):
        error, largest = (mine - true).abs().max().item(), true.abs().max().item()
        assert error <= allowed * max(1, largest), f"{name}: {error:.2e}, the largest is {largest:.2e}"


@pytest.mark.parametrize("rows", [torch.randn(9, 4)[:, 2:3], torch.randn(1, 9).T, torch.randn(1, 1).expand(9, 1)])
def test_one_column_of_any_stride(rows):
    layout = AdapterLayout(1, 3, post_norm=False)
    packed = random_packed(layout).float()
    mine, contiguous = (forward_and_backward(x, packed, layout) for x in (rows, rows.contiguous()))
    assert all(torch.equal(a, e) for a, e in zip(mine, contiguous))


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40])
@pytest.mark.parametrize("activation", range(4))
def test_what_is_not_finite_is_seen(value, pre, post, activation):
    """In x it stays in its row; in each part of the weights it reaches what it reaches in the reference, or more.

    More, for the folded arithmetic multiplies before it sums: a NaN is never lost.
    """
    layout = AdapterLayout(20, 3, pre, post)
    x, packed = torch.randn(70, 20), random_packed(layout, 2).float()
    index = torch.arange(70) % 3 - 1
    bad = x.clone()
    bad[4, 19] = value
    bad[3, 0] = value  # without an adapter
    out, dx, _ = forward_and_backward(bad, packed, layout, index, activation)
    truth = reference.adapter(bad, packed, layout, ACTIVATIONS[activation], index)
    assert torch.equal(out.isfinite(), truth.isfinite())
    assert dx[[i for i in range(70) if i != 4]].isfinite().all()
    for name, piece in layout.slices.items():
        wrong = packed.clone()
        wrong[1, piece.start] = value
        out, _, dpacked = forward_and_backward(x, wrong, layout, index, activation)
        truth = reference.adapter(x, wrong, layout, ACTIVATIONS[activation], index)
        assert (out.isfinite() <= truth.isfinite()).all(), name
        assert out[index != 1].isfinite().all() and dpacked[0].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [20, 64])
def test_a_nan_whose_payload_is_all_ones_stays_one(d, dtype):
    """Rounding such a NaN up would carry into the sign, and store a zero."""
    layout = AdapterLayout(d, 3)
    packed = random_packed(layout).float()
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    layout.unpack(packed)["post_beta"][0, [0, d - 1]] = nan
    out, *_ = forward_and_backward(torch.randn(5, d).to(dtype), packed, layout)
    assert out[:, [0, d - 1]].isnan().all() and out[:, 1:-1].isfinite().all()


def test_no_rows_of_any_kind():
    layout = AdapterLayout(8, 2)
    packed = random_packed(layout, 2).float()
    for shape, index in (
        ((0, 8), None),
        ((0, 3, 8), torch.zeros(0, dtype=torch.int64)),
        ((2, 0, 8), torch.tensor([0, 1])),
        ((3, 0, 2**40, 8), None),
    ):
        out, dx, dpacked = forward_and_backward(torch.empty(shape), packed[: 1 if index is None else 2], layout, index)
        assert out.shape == dx.shape == shape and not dpacked.any()
    x = torch.randn(2, 8)
    out, dx, dpacked = forward_and_backward(x, packed[:0], layout, torch.tensor([-1, -1]))
    assert torch.equal(out, x) and torch.equal(dx, torch.ones_like(x)) and dpacked.shape == (0, layout.numel)


if __name__ == "__main__":
    make_every_call()
