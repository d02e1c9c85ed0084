"""The compiled Triton kernels of the pieces between a T5's matrix products in the PTX interpreter: the mask bit for
bit, values against float64, accesses out of bounds, and unordered accesses to shared memory. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's own interpreter compiles nothing", allow_module_level=True)


from support.tolerance import INTERPRETED_EPS

from hyperformer_fast import philox, t5_reference
from hyperformer_fast.kernels import entry
from hyperformer_fast.layout import NO_DROPOUT, Dropout
from ptx.triton_kernels import interpreted

ON = [(90, torch.bfloat16), (80, torch.float32), (80, torch.float16)]
on_each = pytest.mark.parametrize(("arch", "dtype"), ON, ids=str)

DROPOUT = Dropout(0.25, torch.tensor([-(2**40) - 77]), 2**33 + 5)


def wide(argument):
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def checked(name: str, arch: int, *arguments, spoilt=lambda kernel, ptx: ptx) -> tuple[Tensor, ...]:
    """The results of a host function, whose launches were interpreted. The reference in float64 has the same."""
    with interpreted(arch, spoilt) as ran:
        mine = getattr(entry, name)(*arguments)
    assert ran and not (found := [hazard for launch in ran for hazard in launch.hazards]), found[:5]
    truth = getattr(t5_reference, name)(*map(wide, arguments))
    coarsest = max(torch.finfo(a.dtype).eps for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    mine, truth = ((found,) if isinstance(found, Tensor) else found for found in (mine, truth))
    for i, (k, t) in enumerate(zip(mine, truth, strict=True)):
        assert k.shape == t.shape, f"result {i} of {name}"
        allowed = max(coarsest, INTERPRETED_EPS[k.dtype] * torch.finfo(k.dtype).eps) * t.norm()
        error = (k.double() - t).norm()
        assert error <= allowed, f"result {i} of {name} is {error / allowed:.1f} times as far off as it may be"
    return mine


@on_each
def test_residual(arch, dtype):
    """Rows that end within a tile, and one that lies apart."""
    torch.manual_seed(0)
    x, y, weight = torch.randn(5, 768).to(dtype), torch.randn(5, 800).to(dtype)[:, :768], torch.randn(768)
    out, normed, rstd = checked("residual_forward", arch, x, y, DROPOUT, weight, 1e-6, True)
    checked("residual_backward", arch, x, normed, out, weight, rstd, DROPOUT, True, True)
    checked("residual_backward", arch, None, normed.to(dtype), out, weight.to(dtype), rstd, NO_DROPOUT, False, True)


@on_each
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated gelu"])
def test_act_dropout(arch, dtype, gated):
    torch.manual_seed(0)
    a, g = torch.randn(3, 1100).to(dtype), torch.randn(3, 1100).to(dtype)
    c, activation = (torch.randn(3, 1100).to(dtype), "gelu_new") if gated else (None, "relu")
    checked("act_dropout_forward", arch, a, c, activation, DROPOUT)
    checked("act_dropout_backward", arch, g, a, c, activation, DROPOUT)


@on_each
@pytest.mark.parametrize("keys", [128, 75])
def test_softmax_dropout(arch, dtype, keys):
    torch.manual_seed(0)
    scores, bias = torch.randn(2, 3, 4, keys).to(dtype), torch.randn(1, 3, 4, keys).to(dtype)
    mask = (torch.arange(keys) < keys - 9).expand(2, 1, 1, keys)
    _, probabilities = checked("softmax_dropout_forward", arch, scores, bias, mask, DROPOUT, True)
    g = torch.randn(2, 3, 4, keys).to(dtype)
    checked("softmax_dropout_backward", arch, g, probabilities, DROPOUT)


@on_each
def test_cross_entropy(arch, dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4500).to(dtype), torch.tensor([4499, -100, 0])
    checked("cross_entropy_forward", arch, logits, labels, 0.1, -100, True)


@pytest.mark.parametrize(("arch", "dtype"), ON[:2], ids=str)
def test_the_mask_has_the_bits_of_the_definition(arch, dtype):
    """In every kernel, forward and backward, for a width that no vector fills."""
    ones, zeros = torch.ones(6, 3, 43, dtype=dtype), torch.zeros(6, 3, 43, dtype=dtype)
    kept = philox.kept(DROPOUT, ones.shape)
    with interpreted(arch):
        masks = [
            entry.residual_forward(zeros, ones, DROPOUT, None, 1e-6, False)[0],
            entry.residual_backward(ones, None, None, None, None, DROPOUT, True, False)[1],
            entry.act_dropout_forward(ones, None, "relu", DROPOUT),
            *entry.act_dropout_backward(ones, ones, ones, "relu", DROPOUT),
            entry.softmax_dropout_forward(zeros.unsqueeze(1), None, None, DROPOUT, True)[0].squeeze(1),
        ]
    for mask in masks:
        assert torch.equal(mask != 0, kept)


def test_a_product_cut_short_is_found():
    """The high half of one of Philox's products becomes the low one."""

    def spoilt(kernel, ptx):
        assert "mul.hi.u32" in ptx
        return ptx.replace("mul.hi.u32", "mul.lo.u32", 1)

    x = torch.ones(2, 16)
    with pytest.raises(AssertionError, match="times as far off"):
        checked("act_dropout_forward", 90, x, None, "relu", DROPOUT, spoilt=spoilt)
