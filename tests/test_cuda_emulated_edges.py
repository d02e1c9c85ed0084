"""The emulated CUDA ops at their edges: nothing read beyond a tensor, unknown tasks, empty inputs, wrong arguments."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from support.cases import random_packed
from support.emulated import EmulatedCuda, few_rows, needs_compiler
from support.tolerance import assert_accurate
from test_ops import DTYPES

from hyperformer_fast import reference
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

pytestmark = needs_compiler
NEEDED = list(itertools.product([False, True], repeat=2))


GUARDED = """
import ctypes, mmap, sys, torch
from support.cases import random_packed
from support.emulated import EmulatedCuda, few_rows
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

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
        packed = guarded(random_packed(layout, 2).float())
        folded = backend.fold(packed, layout, dtype)
        x, index = guarded(torch.randn(3, 7, d).to(dtype)), guarded(torch.tensor([0, 1, 1]))
        out, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "gelu"), index, True)
        arguments = packed, folded, AdapterSpec(layout, "gelu"), index, True, True
        gradients = backend.adapter_backward(x, x, saved, *arguments)
        folded = type(folded)(*map(guarded, folded))
        again, _ = backend.adapter_forward(x, folded, AdapterSpec(layout, "gelu"), index, True)
        assert torch.equal(out, again)
        with few_rows(0):
            backend.adapter_forward(x, folded, AdapterSpec(layout, "gelu"), index, True)
        generator = (guarded(torch.randn(s)) for s in ((2, 6), (layout.numel, 6), (layout.numel,)))
        backend.hyper_adapter(x, *generator, AdapterSpec(layout, "gelu"), index, True)
        arguments = packed, folded, *arguments[2:]
        again = backend.adapter_backward(guarded(x), x, type(saved)(*map(guarded, saved)), *arguments)
        assert all(map(torch.equal, gradients, again))
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


@pytest.mark.parametrize("few", [0, 1000], ids=["rows by 32", "row by row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unknown_task_becomes_nan(dtype, few):
    """Its rows, and no others; without a word to the host."""
    layout = AdapterLayout(40, 5, pre_norm=True)
    x, packed = torch.randn(4, 3, 40).to(dtype), random_packed(layout, 2).float()
    folded = EmulatedCuda().fold(packed, layout, dtype)
    for wrong in (2, -2, 2**31 - 1):
        index = torch.tensor([0, wrong, -1, 1])
        with few_rows(few):
            out, saved = EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, "relu"), index, True)
        for part in (out, *saved):
            assert part[1].isnan().all() and part[[0, 2, 3]].isfinite().all()
        assert torch.equal(out[2], x[2]) and (saved.z[2] == 0).all() and (saved.r[2] == 0).all()
        g = torch.randn_like(x)
        dx, dpacked = EmulatedCuda().adapter_backward(
            g, x, saved, packed, folded, AdapterSpec(layout, "relu"), index, True, True
        )
        assert dx[1].isnan().all() and torch.equal(dx[2], g[2]) and dx[[0, 3]].isfinite().all()
        assert dpacked.isfinite().all() and dpacked.any(1).all()


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
    assert torch.equal(EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, "relu"), index, False)[0], x)
    folded = EmulatedCuda().fold(torch.randn(1, layout.numel), layout, torch.float32)
    for shape in ((0, 40), (2, 0, 40)):
        out, saved = EmulatedCuda().adapter_forward(torch.empty(shape), folded, AdapterSpec(layout, "relu"), None, True)
        assert out.shape == shape and saved.z.shape == (*shape[:-1], 5)


@pytest.mark.parametrize(("need_dx", "need_dpacked"), NEEDED)
@pytest.mark.parametrize("post", [False, True])
def test_what_is_not_needed_is_empty(need_dx, need_dpacked, post):
    backend, layout = EmulatedCuda(), AdapterLayout(20, 3, True, post)
    packed, x = random_packed(layout).float(), torch.randn(3, 20)
    folded = backend.fold(packed, layout, torch.float32)
    _, saved = backend.adapter_forward(x, folded, AdapterSpec(layout, "silu"), None, True)
    both = backend.adapter_backward(x, x, saved, packed, folded, AdapterSpec(layout, "silu"), None, True, True)
    some = backend.adapter_backward(
        x, x, saved, packed, folded, AdapterSpec(layout, "silu"), None, need_dx, need_dpacked
    )
    for needed, mine, full in zip((need_dx, need_dpacked), some, both):
        assert torch.equal(mine, full) if needed else mine.numel() == 0


WRONG = [
    ("x must be \\[..., 40", lambda a: a | {"x": torch.randn(3, 41)}),
    ("float32, bfloat16 or float16, got float64", lambda a: a | {"x": torch.randn(3, 40).double()}),
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


def test_limits_that_are_none_are_errors():
    with pytest.raises(RuntimeError, match="rows must be from 0 to 2147483647, got -1"):
        EmulatedCuda().library().use_few_rows(-1)


def test_wrong_gradients_are_errors():
    layout, x = AdapterLayout(40, 5), torch.randn(3, 40)
    packed = torch.randn(1, layout.numel)
    folded = EmulatedCuda().fold(packed, layout, torch.float32)
    _, saved = EmulatedCuda().adapter_forward(x, folded, AdapterSpec(layout, "relu"), None, True)
    for words, g, kept in (
        ("g must have x's dtype and shape", torch.randn(3, 41), saved),
        ("g must have x's dtype and shape", x.half(), saved),
        ("z has the wrong shape", x, saved._replace(z=saved.z[:2])),
        ("r must be float32, got float64", x, saved._replace(r=saved.r.double())),
    ):
        with pytest.raises(RuntimeError, match=words):
            EmulatedCuda().adapter_backward(g, x, kept, packed, folded, AdapterSpec(layout, "relu"), None, True, True)
