"""Small adapters of every kind for hypothesis to draw: below a tile, ragged, odd, b on and off a power of two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st
from test_ops import DTYPES, LAYOUTS, away_from_the_kink
from torch import Tensor

from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout

from .cases import random_packed


class Drawn(NamedTuple):
    x: Tensor
    g: Tensor
    packed: Tensor
    layout: AdapterLayout
    activation: str
    index: Tensor | None


def draw_case(draw, bottlenecks: list[int]) -> Drawn:
    """x, a gradient of the same shape in a layout of its own, and weights for both; never near relu's kink."""
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    layout = AdapterLayout(
        draw(st.one_of(st.integers(4, 40), st.integers(41, 150)), label="d"),
        draw(st.sampled_from(bottlenecks), label="b"),
        draw(st.booleans(), label="pre-norm"),
        draw(st.booleans(), label="post-norm"),
    )
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    shape = (draw(st.integers(1, 3), label="B"), draw(st.sampled_from([1, 3, 31, 33]), label="L"), layout.d)
    T = draw(st.integers(1, 3), label="T")
    kind = draw(st.sampled_from([torch.int32, torch.int64]), label="index")
    index = torch.randint(-1, T, shape[:1]).to(kind) if T > 1 or draw(st.booleans(), label="mixed") else None
    x, g = (LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)), label=f"layout of {name}")](shape, dtype) for name in "xg")
    packed = random_packed(layout, T).float()
    activation = draw(st.sampled_from(ACTIVATIONS), label="activation")
    if activation == "relu":
        assume(away_from_the_kink(x, packed, layout, index))
    return Drawn(x, g, packed, layout, activation, index)
