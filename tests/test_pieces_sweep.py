"""The pieces of a T5 on every backend that serves them on a CPU, with drawn arguments, against float64."""

from __future__ import annotations

import os

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from support.pieces import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    act_dropout_case,
    attention_case,
    check,
    cross_entropy_case,
    dropout_of,
    residual_case,
    rms_norm_case,
    serves,
    softmax_case,
)

from hyperformer_fast.activations import ACTIVATIONS

#: A run of all tests tries few, and always the same; ``make fuzz`` tries 2,000 of each, others with each seed.
SWEEP_EXAMPLES = int(os.environ.get("HYPERFORMER_FAST_PIECES_EXAMPLES", 60))
SWEEP_SEED = os.environ.get("HYPERFORMER_FAST_PIECES_SEED")


def sweep(test):
    if SWEEP_SEED:
        test = seed(int(SWEEP_SEED))(test)
    return settings(max_examples=SWEEP_EXAMPLES, derandomize=not SWEEP_SEED, deadline=None, print_blob=True)(test)


class Draw:
    """What the sweeps draw."""

    def __init__(self, data):
        self._draw = data.draw
        torch.manual_seed(self._draw(st.integers(0, 2**31), label="seed"))
        self.dtype = self.of(DTYPES, "dtype")

    def of(self, values, label=None):
        return self._draw(st.sampled_from(list(values)), label=label)

    def size(self, low, high, label=None):
        return self._draw(st.integers(low, high), label=label)

    def flag(self, label=None):
        return self._draw(st.booleans(), label=label)

    def shape(self, columns=80):
        lead = self._draw(st.lists(st.integers(1, 5), max_size=3), label="lead")
        return (*lead, self.size(8, columns, "n"))

    def tensor(self, shape, layouts=tuple(LAYOUTS)):
        return LAYOUTS[self.of(layouts, "layout")](shape, self.dtype)

    def dropout(self):
        p = self.of([0.0, 0.1, 0.5, 0.9], "p")
        return dropout_of(p, self.size(-(2**63), 2**63 - 1, "seed of the mask"), self.of([0, 1, 2**40 + 3], "stream"))

    def weight(self, n):
        return torch.randn(n).to(self.of([self.dtype, torch.float32], "dtype of the weight"))

    def check(self, case):
        for backend in BACKENDS:
            if serves(backend, case, self.dtype):
                check(case, self.dtype, backend)


@sweep
@given(data=st.data())
def test_sweep_residual(data):
    draw = Draw(data)
    shape = draw.shape()
    hidden, y = draw.tensor(shape), draw.tensor(shape)
    weight = draw.weight(shape[-1]) if draw.flag("norm") else None
    frozen = draw.of([(), (), (0,), (1,), (2,)] if weight is not None else [(), (0,), (1,)], "frozen")
    draw.check(residual_case(hidden, y, weight, draw.dropout(), frozen=frozen))


@sweep
@given(data=st.data())
def test_sweep_rms_norm(data):
    draw = Draw(data)
    shape = draw.shape()
    x, weight = draw.tensor(shape), draw.weight(shape[-1])
    draw.check(rms_norm_case(x, weight, draw.of([1e-6, 1e-2]), draw.of([(), (0,), (1,), (0, 1)], "frozen")))


@sweep
@given(data=st.data())
def test_sweep_act_dropout(data):
    draw = Draw(data)
    shape = draw.shape()
    a, activation = draw.tensor(shape), draw.of(ACTIVATIONS, "activation")
    c = draw.tensor(shape) if draw.flag("gated") else None
    draw.check(act_dropout_case(a, c, activation, draw.dropout(), draw.of([(), (0,)]) if c is not None else ()))


def _bias_and_mask(draw, shape):
    """A bias and a mask for scores of this shape, of any shape that can be broadcast to it. No row is closed."""

    def smaller():
        kept = tuple(n if draw.flag() else 1 for n in shape)
        return kept[draw.size(0, 3, "dimensions that are left out") :]

    bias = None
    if draw.flag("bias"):
        bias = torch.randn(smaller()).to(draw.of([draw.dtype, torch.float32]))
    kind = draw.of(["none", "bool", "additive", "-inf"], "mask")
    if kind == "none":
        return bias, None
    attend = torch.rand(smaller()) < 0.7
    attend[..., :1] = True
    if kind == "bool":
        return bias, attend
    lowest = -torch.inf if kind == "-inf" else torch.finfo(draw.dtype).min
    return bias, torch.zeros(attend.shape, dtype=draw.dtype).masked_fill(~attend, lowest)


@sweep
@given(data=st.data())
def test_sweep_softmax(data):
    draw = Draw(data)
    shape = (draw.size(1, 3), draw.size(1, 3), draw.size(1, 7), draw.size(1, 70, "keys"))
    bias, mask = _bias_and_mask(draw, shape)
    frozen = draw.of([(), (1,)]) if bias is not None else ()
    draw.check(softmax_case(draw.tensor(shape), bias, mask, draw.dropout(), frozen))


@sweep
@given(data=st.data())
def test_sweep_attention(data):
    draw = Draw(data)
    B, H, Lq, Lk, dk = draw.size(1, 3), draw.size(1, 3), draw.size(1, 9), draw.size(1, 40, "keys"), draw.size(4, 40)
    dv = draw.of([dk, 8])
    bias, mask = _bias_and_mask(draw, (B, H, Lq, Lk))
    q, k, v = (draw.tensor(shape) for shape in ((B, H, Lq, dk), (B, H, Lk, dk), (B, H, Lk, dv)))
    if draw.flag("scores of the order of 1"):
        q = q * dk**-0.5
    frozen = draw.of([(), (3,)]) if bias is not None else ()
    draw.check(attention_case(q, k, v, bias, mask, draw.of([1.0, 0.5]), draw.dropout(), frozen))


@sweep
@given(data=st.data())
def test_sweep_cross_entropy(data):
    draw = Draw(data)
    N, V = draw.size(1, 6, "N"), draw.size(2, 300, "V")
    labels = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -100)
    draw.check(cross_entropy_case(draw.tensor((N, V)), labels, draw.of([0.0, 0.1, 1.0], "smoothing")))
