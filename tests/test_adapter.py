from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperformer_fast import FusedHyperAdapter, reference


def test_equals_the_reference_with_its_gradients():
    module = FusedHyperAdapter(12, 3, 5, add_layer_norm_before_adapter=True).double()
    x = torch.randn(4, 2, 12, dtype=torch.float64, requires_grad=True)
    e = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, -1, 2, 2])
    weight, bias = module.generator.weight, module.generator.bias
    packed = reference.generate_weights(e[None], weight, bias)[0]
    expected = reference.adapter(x, packed, module.layout, "gelu_new", index)
    out = module(x, e, index)
    g = torch.randn_like(out)
    leaves = (x, e, weight, bias)
    for mine, theirs in zip(
        [out, *torch.autograd.grad(out, leaves, g)], [expected, *torch.autograd.grad(expected, leaves, g)]
    ):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-13)
    assert torch.allclose(module(x, e[1]), reference.adapter(x, packed[1:2], module.layout, "gelu_new"))


@pytest.mark.parametrize("conditional", [False, True])
def test_drops_into_any_model(conditional):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.adapter = FusedHyperAdapter(16, 4, 8, "relu", conditional_layer_norm=conditional)
            self.embedding = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x + self.adapter(self.linear(x), self.embedding)

    block = Block()
    x = torch.randn(5, 16)
    loss = block(x).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in block.parameters())
    again = Block()
    again.load_state_dict(block.state_dict())
    assert torch.equal(block(x), again(x))


def test_bad_arguments_are_named():
    for arguments, message in (
        ((0, 1, 1), "input_dim"),
        ((8, 2.0, 1), "down_sample_size.*2.0"),
        ((8, 2, -1), "embedding_dim.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedHyperAdapter(*arguments)
    with pytest.raises(ValueError, match="non_linearity.*'elu'"):
        FusedHyperAdapter(8, 2, 4, "elu")
    module = FusedHyperAdapter(8, 2, 4)
    with pytest.raises(ValueError, match=r"\[4\] or \[T, 4\], got \[5\]"):
        module(torch.randn(2, 8), torch.randn(5))
    with pytest.raises(ValueError, match="task_index"):
        module(torch.randn(2, 8), torch.randn(3, 4))
