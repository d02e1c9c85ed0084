"""What an adapter keeps for its backward: x, z, r and a pre-norm's mean and rstd; without a backward, nothing."""

from __future__ import annotations

import pytest
import torch
from support.cases import random_packed

from hyperformer_fast import ops
from hyperformer_fast.backends import backend_names, explain, use_backend
from hyperformer_fast.layout import AdapterLayout


def serving(dtype):
    for name in backend_names()[1:]:
        with use_backend(name):
            if explain("adapter_forward", dtype=dtype).chosen == name:
                yield name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_nothing_else_with_a_row_per_token(pre_norm, post_norm, dtype):
    N, layout = 53, AdapterLayout(40, 5, pre_norm=pre_norm, post_norm=post_norm)
    packed = random_packed(layout).float().requires_grad_()
    x = torch.randn(N, 40).to(dtype).requires_grad_()
    expected = [(N, 40), (N, 5)] + [(N,)] * (post_norm + 2 * pre_norm)
    for backend in serving(dtype):
        kept = []
        with (
            use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        ):
            ops.adapter(x, packed, layout, "gelu_new")
        assert sorted(tuple(t.shape) for t in kept if N in t.shape) == sorted(expected), backend


def test_without_a_gradient_nothing_is_kept():
    layout = AdapterLayout(40, 5, pre_norm=True)
    packed, x = random_packed(layout).float().requires_grad_(), torch.randn(53, 40)
    for backend in serving(torch.float32):
        kept = []
        with use_backend(backend), torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            ops.adapter(x, packed, layout, "gelu_new")
        assert kept == [], backend
