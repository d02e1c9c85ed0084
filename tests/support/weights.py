"""The rules for folded weights, and for weights that are made to break them; one home for every backend's tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hyperformer_fast import reference
from hyperformer_fast.layout import AdapterLayout

from .cases import hostile_packed
from .tolerance import assert_accurate


def check_root(root: Tensor, packed: Tensor, layout: AdapterLayout) -> None:
    """R^T R = Wa^T Wa / d, each entry relative to its two columns' lengths; no library's Cholesky is involved."""
    assert torch.equal(root, root.triu())
    parts = layout.unpack(packed.double())
    wa = torch.cat([parts["up_weight"], parts["up_bias"].unsqueeze(-1)], -1)
    wa = wa - wa.mean(-2, keepdim=True)
    gram = wa.mT @ wa / layout.d
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (root.double().mT @ root.double() - gram).abs()
    left, right = length.unsqueeze(-1), length.unsqueeze(-2)
    float32 = torch.finfo(torch.float32)
    # Roundings of R to float32, whose subnormal step is tiny * eps; and what a large mean leaves of float64's digits.
    allowed = 4 * float32.eps * left * right + (layout.b + 1) * float32.tiny * float32.eps * (left + right)
    if packed.numel():
        allowed = allowed + 1e-13 * parts["up_weight"].abs().amax() ** 2
    assert (error <= allowed).all()


def assert_folded(mine: reference.Folded, packed: Tensor, layout: AdapterLayout, dtype: torch.dtype) -> None:
    """Each part rounded once from float64: half a unit of its dtype, and what a rounded float64 sum may add.

    ``root`` by what it is for, since rows of it may differ in sign or, of dependent columns, in all digits.
    """
    truth = reference.fold(packed.double(), layout, torch.float64)
    for part, k, t in zip(reference.Folded._fields, mine, truth):
        assert k.shape == t.shape and k.is_contiguous(), part
        assert k.dtype == (dtype if part in ("wd", "wg") else torch.float32), part
        if part == "root":
            if layout.post_norm:
                check_root(k, packed, layout)
        elif t.numel():
            info, error = torch.finfo(k.dtype), (k.double() - t).abs()
            smallest = info.smallest_normal * info.eps  # of the subnormal numbers
            allowed = 0.51 * info.eps * t.abs() + smallest + 1e-13 * t.abs().max()
            assert (error <= allowed).all(), f"{dtype}: {part} off by {error.max():.1e}"


def check_hostile_weights(kind: str, adapter: Callable[[Tensor, Tensor, AdapterLayout, str], Tensor]) -> None:
    """An adapter whose weights are of a kind of ``HOSTILE``: its output by the one rule where eager can keep it."""
    layout = AdapterLayout(96, 12)
    packed, x = hostile_packed(kind, layout).float(), torch.randn(64, 96)
    out = adapter(x, packed, layout, "gelu_new")
    truth = reference.adapter(x.double(), packed.double(), layout, "gelu_new")
    plain = reference.adapter(x, packed, layout, "gelu_new")
    if kind in ("cancelling columns", "rank one"):
        # the norm amplifies what any sum lost: within 8x of eager's own error
        worst = max((plain.double() - truth).abs().max(), torch.finfo(x.dtype).eps * truth.abs().max())
        assert (out.double() - truth).abs().max() <= 8 * worst
    else:
        assert_accurate(out, plain, truth, kind)
