"""What ``rows_kernel`` hands to the kernels of the weight gradients: dz, r h, m2 and s = g . gamma of every row; and
tiles of every width whose rows stay in registers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.cases import random_packed
from support.watch import watch
from test_ops import DTYPES, check_against_truth

from hyperformer_fast import reference
from hyperformer_fast.backends.triton import TritonBackend
from hyperformer_fast.kernels import tiles
from hyperformer_fast.layout import AdapterLayout, AdapterSpec, Saved


@pytest.fixture(autouse=True)
def _watched():
    with watch() as seen:
        yield seen


def handed_on(layout, packed, x, g, index=None):
    """dz, r h, m2 and s from the kernel, and the same in float64 from the z and r that the forward saved."""
    from hyperformer_fast.kernels import adapter_backward as module

    backend, spec = TritonBackend(), AdapterSpec(layout, "gelu_new")
    folded = reference.fold(packed, layout, x.dtype)
    _, saved = backend.adapter_forward(x, folded, spec, index, True)
    with mock.patch.object(module, "weight_gradients", return_value=torch.zeros_like(packed)) as handed:
        backend.adapter_backward(g, x, saved, packed, folded, spec, index, True, True)
    return handed.call_args.args[3], truth(layout, packed, saved, folded, g, index)


def truth(layout, packed, saved: Saved, folded, g, index):
    g, z = g.double().flatten(0, -2), saved.z.double().flatten(0, -2)
    task = torch.zeros(len(z), dtype=torch.int64) if index is None else index.repeat_interleave(len(z) // len(index))
    wg, scale, root, vectors = (part.double()[task] for part in (folded.wg, folded.scale, folded.root, folded.vectors))
    h, b = reference.activate(z, "gelu_new"), layout.b
    slope = reference.activate_grad(z, "gelu_new")
    t = torch.einsum("nd,nbd->nb", g, wg)
    if not layout.post_norm:
        return t * slope, h, None, None
    r, t = saved.r.double().flatten(), t * scale
    along_bias = (g * vectors[:, b : b + layout.d]).sum(1)
    m2 = ((t * h).sum(1) + along_bias) * r / layout.d
    q = torch.einsum("nij,nj->ni", root, torch.cat([h, torch.ones(len(h), 1)], 1))
    u = torch.einsum("ni,nij->nj", q, root)[:, :b]
    dz = r[:, None] * (t - (m2 * layout.d * r)[:, None] * u) * slope
    gamma = layout.unpack(packed.double())["post_gamma"][task]
    return dz, r[:, None] * h, m2, (g * gamma).sum(1)


def assert_close(mine, expected):
    for name, k, t in zip(("dz", "r h", "m2", "s"), mine, expected):
        if t is None:
            assert not k.numel(), name
        else:
            eps = torch.finfo(k.dtype).eps
            assert k.shape == t.shape and k.isfinite().all(), name
            assert (k - t).norm() <= 8 * eps * t.norm(), f"{name}: {(k - t).norm() / eps / t.norm():.1f} eps"


@pytest.mark.parametrize(("pre", "post"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "b"), [(40, 3), (256, 16), (96, 33)])
def test_sums_of_each_row(d, b, dtype, pre, post):
    layout = AdapterLayout(d, b, pre, post)
    x, g = (torch.randn(3, 21, d).to(dtype) for _ in range(2))
    mine, expected = handed_on(layout, random_packed(layout, 2).float(), x, g, torch.tensor([1, 0, 1]))
    # r h leaves float16's range (the next test), and is never rounded to it
    assert mine[1].dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert_close(mine, expected)


@pytest.mark.parametrize("post", [True, False])
def test_r_h_beyond_float16(post):
    layout = AdapterLayout(64, 8, False, post)
    packed = random_packed(layout).float()
    parts = layout.unpack(packed)
    parts["up_weight"].mul_(1e-6)
    parts["up_bias"].mul_(1e-6)
    parts["down_weight"].mul_(500)
    x, g = (torch.randn(40, 64).half() for _ in range(2))
    (_, rh, _, _), (_, expected, _, _) = handed_on(layout, packed, x, g)
    assert not post or expected.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(rh.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("pre", "post"), [(False, True), (True, False)])
@pytest.mark.parametrize("columns", [16, 32, 64, 128, 256])
def test_kept_rows_of_every_width_of_a_tile(columns, pre, post):
    """Sums over one to eight warps, and columns beyond the last of a tile. Sixteen columns are less than a warp's: such
    rows are not kept."""
    layout = AdapterLayout(200, 20, pre, post)
    tile = tiles.Tile(16, columns, max(1, columns // 32), keep=True)
    x, g = (torch.randn(2, 19, 200).bfloat16() for _ in range(2))
    with tiles.forced("forward", tile), tiles.forced("backward", tile):
        packed, index = random_packed(layout, 2).float(), torch.tensor([1, 0])
        check_against_truth(x, g, packed, layout, "silu", index, backend="triton")


def test_mixed_tasks_give_the_bits_of_each_task_alone():
    layout = AdapterLayout(256, 24)
    packed = random_packed(layout, 2).float()
    x, g = (torch.randn(4, 33, 256).bfloat16() for _ in range(2))
    index, spec, backend = torch.tensor([1, -1, 0, 7]), AdapterSpec(layout, "gelu_new"), TritonBackend()
    folded = reference.fold(packed, layout, x.dtype)
    out, saved = backend.adapter_forward(x, folded, spec, index, True)
    dx, _ = backend.adapter_backward(g, x, saved, packed, folded, spec, index, True, True)
    assert torch.equal(out[1], x[1]) and torch.equal(dx[1], g[1])
    assert out[3].isnan().all() and dx[3].isnan().all() and saved.z[3].isnan().all() and not saved.z[1].any()
    for sample, task in ((0, 1), (2, 0)):
        one = reference.fold(packed[task : task + 1], layout, x.dtype)
        alone, kept = backend.adapter_forward(x[sample], one, spec, None, True)
        back, _ = backend.adapter_backward(g[sample], x[sample], kept, packed[task], one, spec, None, True, False)
        assert torch.equal(out[sample], alone) and torch.equal(dx[sample], back)
