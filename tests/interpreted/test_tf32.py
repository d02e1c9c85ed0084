"""Operands of tf32 products: rounded to nearest, not truncated; and float32 made of three of them."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from support.cases import random_packed
from support.tolerance import assert_accurate

from hyperformer_fast import reference
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.kernels.common import rounded
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

INF = math.inf


@triton.jit
def _rounded_kernel(X, OUT, PRECISION: tl.constexpr, N: tl.constexpr):
    """Write what a product of this precision reads of X [N], float32, to OUT [N]."""
    i = tl.arange(0, N)
    tl.store(OUT + i, rounded(tl.load(X + i), PRECISION))


def read_as(precision: str, values: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(values)
    _rounded_kernel[(1,)](values, out, PRECISION=precision, N=values.numel())
    return out


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_rounding():
    step = 2.0**-10
    values = torch.tensor([1 + step / 2, 1 + step / 2 - 2**-20, -1 - 1.75 * step, 0.0, -0.0, INF, -INF, math.nan])
    expected = torch.tensor([1 + step, 1.0, -1 - 2 * step, 0.0, -0.0, INF, -INF, math.nan])
    torch.testing.assert_close(read_as("tf32", values), expected, rtol=0, atol=0, equal_nan=True)
    assert read_as("tf32", values)[4].signbit()
    assert torch.equal(read_as("ieee", values[:4]), values[:4])


def test_rounding_at_the_ends_of_the_range():
    bits = torch.tensor([0x7F7FFFFF, 0x7F7FEFFF, 0x7FFFFFFF, 0x00000FFF], dtype=torch.int32)
    largest, smaller, nan, tiny = read_as("tf32", bits.view(torch.float32)).tolist()
    assert largest == smaller == float.fromhex("0x1.ffcp127")  # truncated, because rounding up would be infinite
    assert math.isnan(nan) and tiny == 0


def test_random_numbers_lose_half_a_step_at_most():
    values = torch.randn(1024) * torch.logspace(-30, 30, 1024)
    read = read_as("tf32", values)
    assert (read.view(torch.int32) & 0x1FFF == 0).all()
    error = (read.double() - values.double()) / values.double()
    assert error.abs().max() <= 2**-11
    assert (error * values.sign()).mean().abs() < 2**-14  # truncated, all numbers shrink: 2^-12 on average


def test_generate_rounds(tf32):
    """Sums of one product show what its operands were."""
    E, G = 1 + torch.rand(1, 5, 1), 1 + torch.rand(1, 7, 1)
    mine = TritonBackend().generate_weights(E, G, torch.zeros(1, 7))
    expected = read_as("tf32", torch.nn.functional.pad(E.flatten(), (0, 3)))[:5, None]
    expected = expected * read_as("tf32", torch.nn.functional.pad(G.flatten(), (0, 1)))[:7]
    assert torch.equal(mine[0], expected)
    assert not torch.equal(mine, reference.generate_weights(E, G, torch.zeros(1, 7)))


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18], ids=str)
def test_three_products_are_as_good_as_float32(scale):
    E, G, g0 = torch.randn(1, 9, 200), torch.randn(1, 65, 200) * scale, torch.randn(1, 65) * scale
    truth = reference.generate_weights(E.double(), G.double(), g0.double())
    mine = TritonBackend().generate_weights(E, G, g0)
    assert_accurate(mine, reference.generate_weights(E, G, g0), truth)
    # 2^-20 of each product, and the roundings of sums of 200
    bound = E.double().abs() @ G.double().abs().mT * (2**-20 + 200 * 2**-24)
    assert ((mine - truth).abs() <= bound + truth.abs() * 2**-23).all()


def test_three_products_of_subnormal_and_huge_numbers():
    E, G = torch.randn(1, 4, 64), torch.randn(1, 70, 64)
    for e, g in ((1e3, 1e-40), (1e20, 1e-42), (1e-41, 1e20), (1e-2, 3e37)):
        mine = TritonBackend().generate_weights(E * e, G * g, torch.zeros(1, 70))
        truth = reference.generate_weights((E * e).double(), (G * g).double(), torch.zeros(1, 70).double())
        step = 2.0**-148 * ((E * e).abs().amax().double() + (G * g).abs().amax())
        assert ((mine - truth).abs() <= 1e-6 * truth.abs().max() + 64 * step).all(), (e, g)


def test_three_products_keep_infinities_and_nan():
    """An infinity times a number that tf32 holds exactly, whose rest is zero, is not NaN."""
    E, G, g0 = torch.ones(1, 4, 64), torch.randn(1, 9, 64), torch.zeros(1, 9)
    E[0, 0, 0], E[0, 1, 0], E[0, 2, 0] = INF, -INF, math.nan
    G[0, 0, 0], G[0, 1, 0], G[0, 2, 0], G[0, 3, 5], G[0, 4, 5] = 0.0, 1.0, -1.5, INF, math.nan
    mine, plain = TritonBackend().generate_weights(E, G, g0), reference.generate_weights(E, G, g0)
    assert torch.equal(mine.isnan(), plain.isnan()) and torch.equal(mine.isinf(), plain.isinf())
    infinite = plain.isinf()
    assert torch.equal(mine[infinite], plain[infinite]) and infinite.any() and plain.isnan().any()


def test_the_adapters_products_round_their_operands(tf32):
    """The interpreter multiplies float32 exactly, so that only rounded operands make a difference."""
    layout = AdapterLayout(72, 5, pre_norm=True)
    spec, backend = AdapterSpec(layout, "gelu_new"), TritonBackend()
    packed = random_packed(layout, 1).float()
    x, g = torch.randn(19, 72), torch.randn(19, 72)
    folded = backend.fold(packed, layout, torch.float32)

    def results(precision: str) -> dict[str, torch.Tensor]:
        torch.backends.cuda.matmul.fp32_precision = precision
        out, saved = backend.adapter_forward(x, folded, spec, None, True)
        z = saved.z
        saved = saved._replace(z=exact_z) if exact_z is not None else saved
        dx, dpacked = backend.adapter_backward(g, x, saved, packed, folded, spec, None, True, True)
        parts = {name: layout.unpack(dpacked)[name] for name in ("down_weight", "up_weight")}
        return {"out": out - x, "z": z, "dx": dx - g, **parts}

    exact_z = None
    plain = results("ieee")
    exact_z = plain["z"]
    for name, found in results("tf32").items():
        error = (found - plain[name]).norm() / plain[name].norm()
        assert 2**-14 < error < 2**-9, name
