from __future__ import annotations

import pytest
import torch

from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import SPEC_SCHEMA, AdapterLayout, AdapterSpec, accumulator_dtype


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_pack_is_the_inverse_of_unpack(pre, post):
    layout = AdapterLayout(6, 2, pre, post)
    assert layout.numel == 2 * 6 * 2 + 2 + 6 + 12 * (pre + post)
    packed = torch.arange(3.0 * layout.numel).view(3, layout.numel)
    parts = layout.unpack(packed)
    assert torch.equal(layout.pack(parts), packed)
    assert parts["up_weight"].shape == (3, 6, 2) and parts["down_weight"].shape == (3, 2, 6)
    assert ("pre_gamma" in parts, "post_beta" in parts) == (pre, post)
    assert sum(p[0].numel() for p in parts.values()) == layout.numel


def test_wrong_sizes_are_named():
    layout = AdapterLayout(6, 2)
    with pytest.raises(ValueError, match=f"{layout.numel} numbers.*got 5"):
        layout.unpack(torch.zeros(5))
    with pytest.raises(ValueError, match="b must be at least 1, got 0"):
        AdapterLayout(6, 0)
    parts = layout.unpack(torch.zeros(layout.numel))
    with pytest.raises(ValueError, match="up_bias"):
        layout.pack({**parts, "up_bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="post_beta is missing"):
        layout.pack({name: part for name, part in parts.items() if name != "post_beta"})


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_a_spec_survives_as_the_arguments_of_an_op(pre, post):
    layout = AdapterLayout(6, 2, pre, post)
    assert AdapterLayout.from_arguments(*layout.arguments) == layout
    for activation in ACTIVATIONS:
        spec = AdapterSpec(layout, activation)
        assert AdapterSpec.from_arguments(*spec.arguments) == spec
        assert len(spec.arguments) == SPEC_SCHEMA.count(",") + 1


def test_accumulators_are_float64_where_anything_is():
    assert accumulator_dtype(torch.bfloat16) == accumulator_dtype(torch.float16, torch.float32) == torch.float32
    assert accumulator_dtype(torch.float32, torch.float64) == torch.float64
