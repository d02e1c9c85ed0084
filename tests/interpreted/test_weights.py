"""``generate_weights`` and ``fold`` against the float64 truth; their memory accesses."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import HOSTILE, hostile_packed, random_packed
from support.tolerance import assert_accurate
from support.watch import watch
from support.weights import assert_folded
from test_ops import DTYPES

from hyperformer_fast import reference
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.layout import AdapterLayout

NORMS = list(itertools.product([False, True], repeat=2))


@pytest.fixture(autouse=True)
def _watched():
    with watch() as seen:
        yield seen


@pytest.mark.parametrize(("Q", "n", "P", "k"), [(1, 24, 200, 64), (2, 35, 65, 5), (3, 1, 7, 130), (1, 3, 64, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generate(Q, n, P, k, dtype):
    E, G, g0 = (torch.randn(shape).to(dtype) for shape in ((Q, n, k), (Q, P, k), (Q, P)))
    truth = reference.generate_weights(E.double(), G.double(), g0.double())
    mine = TritonBackend().generate_weights(E, G, g0)
    assert mine.dtype == dtype
    assert_accurate(mine, reference.generate_weights(E, G, g0), truth)
    assert torch.equal(mine, TritonBackend().generate_weights(E.mT.contiguous().mT, G, g0))


def test_generate_of_nothing():
    for Q, n, P, k in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 3, 0)):
        E, G, g0 = torch.randn(Q, n, k), torch.randn(Q, P, k), torch.randn(Q, P)
        assert torch.equal(TritonBackend().generate_weights(E, G, g0), reference.generate_weights(E, G, g0))


@pytest.mark.parametrize(("pre", "post"), NORMS)
@pytest.mark.parametrize(
    ("d", "b", "lead"), [(40, 3, (2, 3)), (64, 16, (1,)), (97, 33, (2,)), (768, 24, ()), (1100, 9, ())]
)
def test_fold(d, b, lead, pre, post):
    layout = AdapterLayout(d, b, pre, post)
    packed = random_packed(layout, 6)[: max(1, torch.Size(lead).numel())].reshape(*lead, -1).float()
    for dtype in DTYPES:
        assert_folded(TritonBackend().fold(packed, layout, dtype), packed, layout, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        half = packed.to(dtype)
        assert_folded(TritonBackend().fold(half, layout, dtype), half, layout, dtype)


def test_fold_of_rows_wider_than_a_tile():
    layout = AdapterLayout(1100, 9, True, True)
    packed = random_packed(layout).float()
    assert_folded(TritonBackend().fold(packed, layout, torch.bfloat16), packed, layout, torch.bfloat16)


@pytest.mark.parametrize("b", [12, 40])
@pytest.mark.parametrize("kind", HOSTILE)
def test_fold_of_hostile_weights(kind, b):
    layout = AdapterLayout(96, b)
    packed = hostile_packed(kind, layout).float()
    mine = TritonBackend().fold(packed, layout, torch.float32)
    truth = reference.fold(packed.double(), layout, torch.float64)
    root, expected = mine.root.double(), truth.root
    gram, gram_truth = root.mT @ root, expected.mT @ expected
    norms = gram_truth.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((gram - gram_truth).abs() <= 1e-6 * norms.unsqueeze(-1) * norms.unsqueeze(-2) + 1e-12).all()
    for name in ("wd", "wg", "vectors", "scale", "mean"):
        k, t = getattr(mine, name).double(), getattr(truth, name)
        assert (k - t).abs().max() <= 1e-6 * t.abs().max(), name


@pytest.mark.parametrize("row", [0, 1])
def test_fold_of_an_outlier(row):
    """The sums are taken of W_u minus its first row, so a first row far from the others is the worst."""
    layout = AdapterLayout(300, 20)
    packed = random_packed(layout).float()
    layout.unpack(packed)["up_weight"][0, row] *= 1e6
    layout.unpack(packed)["up_bias"][0, row] *= 1e6
    assert_folded(TritonBackend().fold(packed, layout, torch.float32), packed, layout, torch.float32)


def test_fold_of_nothing():
    layout = AdapterLayout(20, 3)
    assert TritonBackend().fold(random_packed(layout)[:0].float(), layout, torch.float32).wd.shape == (0, 3, 20)


@pytest.mark.parametrize("b", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_fold_shows_what_is_not_finite(b, value):
    layout = AdapterLayout(20, b)
    for part, place in (("up_weight", (0, 5, 1)), ("up_weight", (0, 0, 2)), ("up_bias", (0, 7))):
        packed = random_packed(layout).float()
        layout.unpack(packed)[part][place] = value
        folded, truth = (fold(packed, layout, torch.float32) for fold in (TritonBackend().fold, reference.fold))
        assert folded.root.isnan().any()
        assert torch.equal(folded.mean.isfinite(), truth.mean.isfinite())
        assert torch.equal(folded.wg.isfinite(), truth.wg.isfinite())
