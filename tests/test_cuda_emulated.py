"""The CUDA kernels in the emulator: weights and forward against the float64 truth, by the one rule."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import HOSTILE, hostile_packed, random_packed
from support.emulated import EmulatedCuda, needs_compiler, registered, thread_order
from support.tolerance import assert_accurate
from test_native import check_root
from test_ops import DTYPES, LAYOUTS, op_arguments, static

from hyperformer_fast import explain, reference, use_backend
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout

pytestmark = needs_compiler
NORMS = list(itertools.product([False, True], repeat=2))


def assert_folded(packed, layout, dtype):
    """Each part rounded once from float64: half a unit of its dtype, and what a rounded float64 sum may add."""
    mine, truth = EmulatedCuda().fold(packed, layout, dtype), reference.fold(packed, layout, torch.float64)
    for part, k, t in zip(reference.Folded._fields, mine, truth):
        assert k.shape == t.shape and k.is_contiguous(), part
        assert k.dtype == (dtype if part in ("wd", "wg") else torch.float32), part
        if part == "root" and layout.post_norm:
            check_root(k, packed, layout)
        if not t.numel() or part == "root":
            continue
        info, error = torch.finfo(k.dtype), (k.double() - t).abs()
        allowed = 0.51 * info.eps * t.abs() + info.smallest_normal * info.eps + 1e-13 * t.abs().max()
        assert (error <= allowed).all(), f"{part} off by {error.max():.1e}"
    return mine


def check(x, packed, layout, activation, index, save=True):
    """Fold and forward; out by the one rule, and what is saved as near the truth as the folded reference's."""
    backend = EmulatedCuda()
    folded = assert_folded(packed, layout, x.dtype)
    out, saved = backend.adapter_forward(x, folded, layout, activation, index, save)
    eager, eager_fp32 = (reference.adapter(t, packed.to(t.dtype), layout, activation, index) for t in (x, x.float()))
    eager_saved = reference.adapter_forward(
        x, reference.fold(packed, layout, x.dtype), layout, activation, index, True
    )[1]
    truth, true_saved = reference.adapter_forward(
        x.double(), reference.fold(packed.double(), layout, torch.float64), layout, activation, index, True
    )
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    assert_accurate(out, eager, truth, "out", eager_fp32)
    if index is not None:
        assert torch.equal(out[index == -1], x[index == -1])
    for name, k, e, t in zip(saved._fields, saved, eager_saved, true_saved):
        if not save:
            assert k.numel() == 0, name
        else:
            assert k.shape == t.shape, name
            # sums that may cancel: z and the mean are as accurate as what they add up, which is of x's size
            summed = [x.double()] if name in ("z", "pre_mean") else []
            largest = max((part.abs().max().item() for part in (t, *summed) if part.numel()), default=0.0)
            near = 5 * (e - t).abs().max().item() if t.numel() else 0.0
            torch.testing.assert_close(k.double(), t, rtol=0, atol=near + 2 * torch.finfo(x.dtype).eps * largest)
    return out, saved


@settings(
    max_examples=int(os.environ.get("HYPERFORMER_FAST_SWEEP_EXAMPLES", 150)), deadline=None, derandomize=True,
    print_blob=True,
)  # fmt: skip
@given(data=st.data())
def test_sweep(data):
    """Small shapes of every kind: below a tile, ragged, odd, b on and off a power of two."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    layout = AdapterLayout(
        draw(st.one_of(st.integers(4, 40), st.integers(41, 150)), label="d"),
        draw(st.sampled_from([1, 3, 5, 16, 17, 24, 32, 48, 65]), label="b"),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    shape = (draw(st.integers(1, 3), label="B"), draw(st.sampled_from([1, 3, 31, 33]), label="L"), layout.d)
    T = draw(st.integers(1, 3), label="T")
    kind = draw(st.sampled_from([torch.int32, torch.int64]), label="index")
    index = torch.randint(-1, T, shape[:1]).to(kind) if T > 1 or draw(st.booleans(), label="mixed") else None
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)), label="layout of x")](shape, dtype)
    packed = random_packed(layout, T).float()
    check(x, packed, layout, draw(st.sampled_from(ACTIVATIONS), label="activation"), index, draw(st.booleans()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [9, 24, 60, 127])
@pytest.mark.parametrize("d", [512, 768, 1024, 1032, 515])
def test_every_instantiation(d, b, dtype):
    """Widths that registers hold, a wider one in whole pieces, and one that is not aligned; each bottleneck's tile."""
    layout = AdapterLayout(d, b, pre_norm=b == 24)
    x = torch.randn(1, 3, d).to(dtype)
    check(x, random_packed(layout).float(), layout, "gelu_new", None)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights(kind):
    layout = AdapterLayout(96, 12)
    packed, x = hostile_packed(kind, layout).float(), torch.randn(64, 96)
    folded = assert_folded(packed, layout, x.dtype)
    out, _ = EmulatedCuda().adapter_forward(x, folded, layout, "gelu_new", None, False)
    truth = reference.adapter(x.double(), packed.double(), layout, "gelu_new")
    plain = reference.adapter(x, packed, layout, "gelu_new")
    if kind in ("cancelling columns", "rank one"):
        # the norm amplifies what any sum lost: within 8x of eager's own error
        worst = max((plain.double() - truth).abs().max(), torch.finfo(x.dtype).eps * truth.abs().max())
        assert (out.double() - truth).abs().max() <= 8 * worst
    else:
        assert_accurate(out, plain, truth, kind)


def test_weights_that_float16_has_no_range_for():
    """r h may pass float16's range where W_u is tiny: the columns' powers of two must carry it."""
    layout = AdapterLayout(96, 12)
    packed = hostile_packed("tiny up", layout).float()
    check(torch.randn(2, 17, 96).half(), packed, layout, "gelu_new", None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pre", "post", "b"), [(*norms, 24) for norms in NORMS] + [(False, True, 80)])
def test_neither_threads_nor_copies_in_another_order_change_a_bit(pre, post, b, dtype):
    layout, index = AdapterLayout(520, b, pre, post), torch.tensor([1, -1, 0])
    x, packed = torch.randn(3, 34, 520).to(dtype), random_packed(layout, 2).float()
    results = []
    for order, copies in (
        ("forward", "late"),
        ("reverse", "late"),
        ("1", "early"),
        ("reverse", "early"),
        ("2", "late"),
    ):
        with thread_order(order, copies):
            folded = EmulatedCuda().fold(packed, layout, dtype)
            results.append((*folded, *_flat(EmulatedCuda().adapter_forward(x, folded, layout, "silu", index, True))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _flat(result):
    out, saved = result
    return out, *saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_h_is_that_of_the_rounded_z(dtype):
    """Which is all that the backward knows of it."""
    layout = AdapterLayout(128, 128, post_norm=False)
    packed = torch.zeros(1, layout.numel)
    parts = layout.unpack(packed)
    parts["down_bias"][:], parts["up_weight"][:] = torch.randn(128), torch.eye(128)
    folded = EmulatedCuda().fold(packed, layout, dtype)
    out, saved = EmulatedCuda().adapter_forward(torch.zeros(1, 128).to(dtype), folded, layout, "gelu_new", None, True)
    assert torch.equal(saved.z, parts["down_bias"].to(dtype))
    h = torch.nn.functional.gelu(saved.z.double(), approximate="tanh").to(dtype)
    assert (out == h).float().mean() > 0.98  # but for ties that float32 decides otherwise


GUARDED = """
import ctypes, mmap, sys, torch
from support.cases import random_packed
from support.emulated import EmulatedCuda
from hyperformer_fast.layout import AdapterLayout

def guarded(t, keep=[]):
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    keep.append(memory)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages * mmap.PAGESIZE - size)
    return copy.view(t.shape).copy_(t)

backend = EmulatedCuda()
for d in (40, 39):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layout = AdapterLayout(d, 5, True, True)
        folded = backend.fold(guarded(random_packed(layout, 2).float()), layout, dtype)
        x, index = guarded(torch.randn(3, 7, d).to(dtype)), guarded(torch.tensor([0, 1, 1]))
        out, _ = backend.adapter_forward(x, folded, layout, "gelu", index, True)
        folded = type(folded)(*map(guarded, folded))
        again, _ = backend.adapter_forward(x, folded, layout, "gelu", index, True)
        assert torch.equal(out, again)
E, G, g0 = (guarded(torch.randn(s)) for s in ((1, 3, 5), (1, 130, 5), (1, 130)))
backend.generate_weights(E, G, g0)
print("nothing beyond")
"""


def test_nothing_is_read_beyond_a_tensor():
    """Every input ends where a page that may not be touched begins."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{GUARDED}"], capture_output=True, text=True
    )
    assert "nothing beyond" in done.stdout, f"exit {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unknown_task_becomes_nan(dtype):
    """Its rows, and no others; without a word to the host."""
    layout = AdapterLayout(40, 5, pre_norm=True)
    x, packed = torch.randn(4, 3, 40).to(dtype), random_packed(layout, 2).float()
    folded = EmulatedCuda().fold(packed, layout, dtype)
    for wrong in (2, -2, 2**31 - 1):
        index = torch.tensor([0, wrong, -1, 1])
        out, saved = EmulatedCuda().adapter_forward(x, folded, layout, "relu", index, True)
        for part in (out, *saved):
            assert part[1].isnan().all() and part[[0, 2, 3]].isfinite().all()
        assert torch.equal(out[2], x[2]) and (saved.z[2] == 0).all() and (saved.r[2] == 0).all()


@pytest.mark.parametrize(
    ("Q", "n", "P", "k"), [(1, 24, 200, 64), (2, 35, 65, 5), (3, 1, 7, 130), (0, 2, 3, 4), (1, 2, 3, 0)]
)
def test_generate(Q, n, P, k):
    E, G, g0 = torch.randn(Q, n, k), torch.randn(Q, P, k), torch.randn(Q, P)
    truth = reference.generate_weights(E.double(), G.double(), g0.double())
    mine = EmulatedCuda().generate_weights(E, G, g0)
    assert_accurate(mine, reference.generate_weights(E, G, g0), truth)
    assert torch.equal(mine, EmulatedCuda().generate_weights(E.mT.contiguous().mT, G, g0))


def test_nothing_to_do():
    layout = AdapterLayout(40, 5)
    folded = EmulatedCuda().fold(torch.empty(0, layout.numel), layout, torch.float32)
    assert folded.wd.shape == (0, 5, 40)
    index = torch.full((2,), -1)
    x = torch.randn(2, 3, 40)
    assert torch.equal(EmulatedCuda().adapter_forward(x, folded, layout, "relu", index, False)[0], x)
    folded = EmulatedCuda().fold(torch.randn(1, layout.numel), layout, torch.float32)
    for shape in ((0, 40), (2, 0, 40)):
        out, saved = EmulatedCuda().adapter_forward(torch.empty(shape), folded, layout, "relu", None, True)
        assert out.shape == shape and saved.z.shape == (*shape[:-1], 5)


def test_opcheck():
    """The public ops' fakes tell what these kernels return."""
    public = torch.ops.hyperformer_fast
    with registered(), use_backend("cuda-emulated"):
        for (pre, post), mixed in itertools.product(NORMS, [False, True]):
            layout = AdapterLayout(13, 4, pre, post)
            x, packed, folded, index = op_arguments(layout, mixed=mixed)
            x, packed = x.detach(), packed.detach()
            for save in (False, True):
                torch.library.opcheck(
                    public.adapter_forward.default, (x, packed, *folded, index, *static(layout), save)
                )
            for dtype in DTYPES:
                torch.library.opcheck(public.fold.default, (packed.float(), *static(layout)[:4], dtype))
        E, G, g0 = (torch.randn(s) for s in ((2, 3, 4), (2, 5, 4), (2, 5)))
        torch.library.opcheck(public.generate_weights.default, (E, G, g0))


def test_the_public_op_takes_it():
    layout = AdapterLayout(40, 5)
    packed, x = random_packed(layout).float(), torch.randn(3, 40)
    with registered(), use_backend("cuda-emulated"):
        from hyperformer_fast import ops

        assert explain("adapter_forward", x).chosen == "cuda-emulated"
        refused = explain("adapter_backward", x)
        assert refused.chosen is None and "no kernel for adapter_backward" in refused.reasons["cuda-emulated"]
        mine = ops.adapter(x, packed, layout, "gelu_new")
    assert_accurate(
        mine, ops.adapter(x, packed, layout, "gelu_new"), ops.adapter(x.double(), packed.double(), layout, "gelu_new")
    )


WRONG = [
    ("x must be", lambda a: a | {"x": torch.randn(3, 41)}),
    ("dtype must be float32", lambda a: a | {"x": torch.randn(3, 40).double()}),
    ("wd must be float32, got bfloat16", lambda a: a | {"wd": a["wd"].bfloat16()}),
    ("root has the wrong shape", lambda a: a | {"root": a["root"][:, :-1].contiguous()}),
    ("wg must be contiguous", lambda a: a | {"wg": a["wg"].mT.contiguous().mT}),
    ("task_index must be int32 or int64", lambda a: a | {"task_index": torch.zeros(3)}),
    ("one entry per sample", lambda a: a | {"task_index": torch.zeros(2, dtype=torch.int64)}),
    ("b must be at most 128, got 129", lambda a: a | {"b": 129}),
    ("activation must be from 0 to 3, got 4", lambda a: a | {"activation": 4}),
]


@pytest.mark.parametrize(("words", "spoil"), WRONG, ids=[words for words, _ in WRONG])
def test_wrong_arguments_are_errors(words, spoil):
    layout = AdapterLayout(40, 5)
    folded = EmulatedCuda().fold(torch.randn(1, layout.numel), layout, torch.float32)
    right = {"x": torch.randn(3, 40), **folded._asdict(), "task_index": None, "d": 40, "b": 5, "pre_norm": False,
             "post_norm": True, "activation": 0, "save": False}  # fmt: skip
    op = EmulatedCuda().library().adapter_forward
    op(*right.values())
    with pytest.raises(RuntimeError, match=words):
        op(*spoil(right).values())
