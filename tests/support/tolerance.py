"""The rules by which a kernel's result is right."""

from __future__ import annotations

import torch
from torch import Tensor

#: What compiled kernels may lose where their code is interpreted, over a whole tensor, in eps of x's dtype. To round a
#: result once costs 0.2 to 0.3; float32 sums of 768 products cost more.
INTERPRETED_EPS = {torch.bfloat16: 0.7, torch.float16: 0.7, torch.float32: 8.0}
#: The same for folded weights, which are computed in float64 and rounded once, in eps of their own dtype.
FOLDED_EPS = 0.4


def assert_accurate(
    kernel: Tensor,
    eager: Tensor,
    truth: Tensor,
    name: str = "result",
    eager_fp32: Tensor | None = None,
    dtype: torch.dtype | None = None,
    terms: Tensor | None = None,
    slack: Tensor | None = None,
) -> None:
    """Hold ``kernel`` to the error that eager PyTorch makes in the same dtype.

    ``||k - t|| <= 2 ||e - t|| + 4 eps ||t||`` over the tensor, and ``max|k - t| <= 4 max|e - t| + 8 eps max|t|`` row by
    row, so that one wrong row cannot hide.

    Args:
        kernel: k, the result under test.
        eager: e, plain PyTorch in the same dtype with the weights cast to it.
        truth: t, the float64 reference of the very tensors passed.
        eager_fp32: stands for e, rounded once, where e is not finite but t fits the dtype.
        dtype: of the op's ``out``, whose eps counts; by default k's own. A float32 weight gradient of a bfloat16
            adapter rests on the bfloat16 z that the forward rounded and kept.
        terms: of a result that is a sum of numbers which are themselves rounded, as the gradient of a bias is of the
            gradients of scores: the sum of their absolute values, like ``truth``. To round n terms, each by eps of
            itself, changes their sum by up to eps times this, whatever the sum is. So it stands for t beside eps.
        slack: how far rounding moves each number of the result, to first order (rounding.py). It is added to eps t.
    """
    assert kernel.shape == truth.shape, f"{name}: shape {list(kernel.shape)}, expected {list(truth.shape)}"
    if kernel.numel() == 0:
        return
    eps = torch.finfo(dtype or kernel.dtype).eps
    if eager_fp32 is not None and not eager.isfinite().all() and truth.abs().max() <= torch.finfo(kernel.dtype).max:
        eager = eager_fp32.to(kernel.dtype)
    k, e, t, size, off = (
        tensor.detach().double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
        for tensor in (kernel, eager, truth, truth if terms is None else terms, 0 * truth if slack is None else slack)
    )
    assert k.isfinite().all(), f"{name}: not finite"
    got, allowed = (k - t).norm(), 2 * (e - t).norm() + 4 * (eps * size.norm() + off.norm())
    assert got <= allowed, f"{name}: error {got:.3e} over the tensor, {allowed:.3e} allowed"
    got = (k - t).abs().amax(1)
    allowed = 4 * (e - t).abs().amax(1) + 8 * (eps * size.abs().amax(1) + off.amax(1))
    row = (got - allowed).argmax()
    assert got[row] <= allowed[row], f"{name}: error {got[row]:.3e} in row {row}, {allowed[row]:.3e} allowed"
