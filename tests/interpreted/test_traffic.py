"""How many bytes the kernels ask for, whatever a cache serves: x once in, out once out, the weights once a program."""

from __future__ import annotations

import torch
from support.cases import random_packed
from support.watch import watch

from hyperformer_fast import reference
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.kernels import tiles
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

N, D, B = 4096, 768, 24


def setting():
    layout = AdapterLayout(D, B)
    packed = random_packed(layout).float()
    x = torch.randn(N, D).bfloat16()
    return layout, packed, x, reference.fold(packed, layout, x.dtype)


def bytes_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_forward():
    layout, _, x, folded = setting()
    with watch() as seen:
        TritonBackend().adapter_forward(x, folded, AdapterSpec(layout, "gelu_new"), None, False)
    programs = N // tiles.forward(D, B, x.dtype, False, 0).BM
    needed = 2 * bytes_of(x) + programs * bytes_of(*folded[:5])
    assert seen.loaded["X"] == seen.stored["OUT"] == bytes_of(x)
    assert seen.loaded.total() + seen.stored.total() <= 1.15 * needed


def test_backward_of_x():
    layout, packed, x, folded = setting()
    x = x[:512]
    _, saved = reference.adapter_forward(x, folded, AdapterSpec(layout, "gelu_new"), None, True)
    with watch() as seen:
        TritonBackend().adapter_backward(
            x, x.clone(), saved, packed, folded, AdapterSpec(layout, "gelu_new"), None, True, False
        )
    programs = len(x) // tiles.backward(D, B, x.dtype, False, 0).BM
    needed = 2 * bytes_of(x) + bytes_of(saved.z, saved.r) + programs * bytes_of(*folded[:5])
    assert seen.loaded["G"] == seen.stored["DX"] == bytes_of(x) and not seen.loaded["X"]
    assert seen.loaded.total() + seen.stored.total() <= 1.15 * needed
