"""The compiled library: the raw fold against the reference, on fair and hostile weights; and how it is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.weights import check_root

from hyperformer_fast import native
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.reference import Folded
from hyperformer_fast.reference import fold as reference_fold

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [(False, True), (True, True), (False, False), (True, False)]

needs_library = pytest.mark.skipif(native.cpu_library() is None, reason=str(native.status()["reason"]))


def raw(packed: torch.Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    op = native.cpu_library().fold
    return Folded(*op(packed, layout.d, layout.b, layout.pre_norm, layout.post_norm, dtype))


def check(packed: torch.Tensor, layout: AdapterLayout, dtype: torch.dtype) -> Folded:
    """Every output against the reference: to a rounding where it is unique; the root through what it is the root of."""
    mine, expected = raw(packed, layout, dtype), reference_fold(packed, layout, dtype)
    for name, a, e in zip(Folded._fields, mine, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and a.is_contiguous(), name
    assert torch.equal(mine.wd, expected.wd)
    assert torch.equal(mine.scale, expected.scale)
    # Rounded once: half a unit of its dtype from the exact one, and what float64 sums in another order add.
    exact = reference_fold(packed, layout, torch.float64).wg
    info, largest = torch.finfo(dtype), exact.abs().amax().item() if exact.numel() else 0
    error = (mine.wg.double() - exact).abs()
    assert (error <= 0.505 * info.eps * exact.abs() + info.smallest_normal * info.eps + 1e-10 * largest).all()
    column = expected.vectors.abs().amax().item() if packed.numel() else 0
    torch.testing.assert_close(mine.vectors, expected.vectors, rtol=2e-7, atol=1e-14 * column)
    torch.testing.assert_close(mine.mean, expected.mean, rtol=2e-7, atol=1e-12)
    if layout.post_norm:
        check_root(mine.root, packed, layout)
    return mine


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pre_norm, post_norm", NORMS)
@pytest.mark.parametrize(
    "d, b",
    [(1, 1), (1, 3), (5, 1), (8, 7), (7, 8), (3, 20), (64, 2), (100, 15), (129, 16), (96, 48), (768, 24), (200, 128)],
)
def test_fold(d, b, pre_norm, post_norm, dtype):
    layout = AdapterLayout(d, b, pre_norm, post_norm)
    check(torch.randn(2, layout.numel), layout, dtype)


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 70),
    b=st.integers(1, 40),
    norms=st.sampled_from(NORMS),
    lead=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_fold_fuzz(d, b, norms, lead, dtype, scale):
    layout = AdapterLayout(d, b, *norms)
    generator = torch.Generator().manual_seed(d * 100 + b)
    packed = torch.randn(*lead, layout.numel, generator=generator) * scale
    mine = check(packed, layout, dtype)
    assert mine.wd.shape == (*lead, b, d) and mine.root.shape[: len(lead)] == tuple(lead)


def hostile(kind: str, layout: AdapterLayout) -> torch.Tensor:
    packed = torch.randn(2, layout.numel) * 0.02
    parts = layout.unpack(packed)
    W, bias = parts["up_weight"], parts["up_bias"]
    if kind == "zero column":
        W[..., 1] = 0
    elif kind == "zero":
        W.zero_(), bias.zero_()
    elif kind == "constant columns":
        W[:] = torch.randn(layout.b)
    elif kind == "duplicate columns":
        W[..., 1] = W[..., 0]
        bias.copy_(W[..., 2])
    elif kind == "rank one":
        W[:] = torch.randn(layout.d, 1) @ torch.randn(1, layout.b)
        bias.zero_()
    elif kind == "large mean":
        W += 1000.0
    elif kind == "tiny":
        W *= 1e-4
    elif kind == "subnormal":
        W *= 1e-38
    elif kind == "zero gamma":
        parts["post_gamma"].zero_()
    return packed


KINDS = [
    "zero column",
    "zero",
    "constant columns",
    "duplicate columns",
    "rank one",
    "large mean",
    "tiny",
    "subnormal",
    "zero gamma",
]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_weights(kind, dtype):
    layout = AdapterLayout(96, 12)
    mine = check(hostile(kind, layout), layout, dtype)
    assert all(t.isfinite().all() for t in mine)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_one(dtype):
    """Rounding up a payload of all ones would carry into the sign and leave a zero."""
    layout = AdapterLayout(96, 12)
    packed = torch.randn(1, layout.numel)
    layout.unpack(packed)["up_weight"][0, 3, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    mine = raw(packed, layout, dtype)
    assert mine.wg[0, 2].isnan().all() and mine.wg[0, 3:].isfinite().all()


@needs_library
@pytest.mark.parametrize("kind", ["zero", "rank one", "duplicate columns"])
def test_lost_pivots_leave_empty_rows(kind):
    layout = AdapterLayout(96, 12)
    root = raw(hostile(kind, layout), layout, torch.float32).root
    empty = (root == 0).all(-1).sum(-1)
    assert (empty == {"zero": 13, "rank one": 12, "duplicate columns": 2}[kind]).all()


@needs_library
def test_tiny_weights_do_not_go_subnormal():
    """fp16's smallest normal number is 6e-5: W_u ~ 1e-5 needs the column's power of two."""
    layout = AdapterLayout(96, 12)
    packed = torch.randn(1, layout.numel) * 1e-5
    largest = raw(packed, layout, torch.float16).wg.float().abs().amax(-1)
    assert ((largest >= 1) & (largest <= 2)).all()


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pre_norm, post_norm", NORMS)
def test_what_is_not_finite_is_seen(pre_norm, post_norm, value):
    """In each part in turn: the outputs are not finite just where the reference's are not, and the root has NaN."""
    layout = AdapterLayout(10, 3, pre_norm, post_norm)
    for name, piece in layout.slices.items():
        packed = torch.randn(1, layout.numel)
        packed[0, piece.start] = value
        mine, expected = raw(packed, layout, torch.float32), reference_fold(packed, layout, torch.float32)
        for output, a, e in zip(Folded._fields, mine, expected, strict=True):
            assert torch.equal(a.isfinite(), e.isfinite()), (name, output)
        assert torch.equal(mine.scale, expected.scale), name
        if post_norm and name in ("up_weight", "up_bias"):
            assert mine.root.isnan().any()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding(dtype):
    """Every 16-bit value, its neighbours in float32, every midpoint, and random bits, as torch rounds them."""
    exact = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = exact.view(torch.int32)
    middle = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}[dtype]
    near = torch.cat([bits + shift for shift in (-1, 0, 1, middle - 1, middle, middle + 1)])
    small = torch.arange(0, 1 << 12, dtype=torch.float32) * 2.0**-26
    values = torch.cat(
        [
            near.view(torch.float32),
            small,
            torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32).view(torch.float32),
        ]
    )
    layout = AdapterLayout(values.numel(), 1, post_norm=False)
    packed = torch.zeros(layout.numel)
    layout.unpack(packed)["up_weight"][:, 0] = values
    mine, expected = raw(packed, layout, dtype).wg[0], values.to(dtype)
    assert torch.equal(mine.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(mine[finite].view(torch.int16), expected[finite].view(torch.int16))


@needs_library
def test_strided_input():
    layout = AdapterLayout(24, 5, True, True)
    base = torch.randn(layout.numel, 6)
    packed = base.T[::2]
    for a, e in zip(raw(packed, layout, torch.float32), raw(packed.contiguous(), layout, torch.float32), strict=True):
        assert torch.equal(a, e)
    expanded = torch.randn(layout.numel).expand(3, 2, -1)
    check(expanded, layout, torch.float32)


@needs_library
def test_no_leading_dimension_and_empty_ones():
    layout = AdapterLayout(24, 5)
    assert check(torch.randn(layout.numel), layout, torch.float32).wd.shape == (5, 24)
    assert check(torch.randn(0, layout.numel), layout, torch.bfloat16).root.shape == (0, 6, 6)
    assert check(torch.randn(2, 0, 3, layout.numel), layout, torch.float16).wg.shape == (2, 0, 3, 5, 24)


@needs_library
def test_bits_do_not_depend_on_threads_or_company():
    layout = AdapterLayout(96, 12, True, True)
    packed = torch.randn(64, layout.numel)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = raw(packed, layout, torch.bfloat16)
        torch.set_num_threads(4)
        many = [raw(packed, layout, torch.bfloat16) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    alone = raw(packed[17], layout, torch.bfloat16)
    for i, expected in enumerate(one):
        assert all(torch.equal(run[i], expected) for run in many)
        assert torch.equal(alone[i], expected[17])


@needs_library
def test_outputs_are_fresh():
    layout = AdapterLayout(24, 5, False, False)
    packed = torch.randn(2, layout.numel)
    before = packed.clone()
    out = raw(packed, layout, torch.float32)
    for t in out:
        t.fill_(7.0)
    assert torch.equal(packed, before)
    assert len({t.untyped_storage().data_ptr() for t in out if t.numel()}) == 3


@needs_library
@pytest.mark.parametrize("pre_norm, post_norm", NORMS)
def test_opcheck(pre_norm, post_norm):
    layout = AdapterLayout(24, 5, pre_norm, post_norm)
    arguments = (torch.randn(3, layout.numel), 24, 5, pre_norm, post_norm, torch.bfloat16)
    torch.library.opcheck(native.cpu_library().fold.default, arguments, test_utils="test_schema")


P = AdapterLayout(8, 2).numel


@needs_library
@pytest.mark.parametrize(
    "packed, d, b, dtype, words",
    [
        (torch.zeros(1, P + 1), 8, 2, torch.float32, [str(P), str(P + 1)]),
        (torch.zeros(1, 0), 8, 2, torch.float32, [str(P), "got 0"]),
        (torch.zeros(1, P), 8, 3, torch.float32, [str(AdapterLayout(8, 3).numel), str(P)]),
        (torch.zeros(()), 8, 2, torch.float32, ["packed must be"]),
        (torch.zeros(1, 2), 0, 2, torch.float32, ["d = 0"]),
        (torch.zeros(1, 8 * 3), 8, 0, torch.float32, ["b = 0"]),
        (torch.zeros(1, P), -8, 2, torch.float32, ["d = -8"]),
        (torch.zeros(1, P), 8, 2**62, torch.float32, [str(2**62)]),
        (torch.zeros(1, P, dtype=torch.float64), 8, 2, torch.float32, ["float32", "float64"]),
        (torch.zeros(1, P, dtype=torch.bfloat16), 8, 2, torch.float32, ["float32", "bfloat16"]),
        (torch.zeros(1, P), 8, 2, torch.float64, ["float16", "float64"]),
        (torch.zeros(1, P), 8, 2, torch.int32, ["float16", "another dtype"]),
    ],
)
def test_bad_arguments_raise(packed, d, b, dtype, words):
    with pytest.raises(RuntimeError) as error:
        native.cpu_library().fold(packed, d, b, False, True, dtype)
    assert all(word in str(error.value) for word in words)


@needs_library
def test_the_library_has_no_python_abi():
    """One file serves every Python 3, so it may ask nothing of libpython or torch's bindings."""
    content = (native._PACKAGE / native.build_info()["libraries"]["cpu"]["file"]).read_bytes()
    assert b"PyInit_" not in content and b"libtorch_python" not in content and b"libpython" not in content


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package folder with sources beside it, and nothing built."""
    caches = (native.build_info, native._load, native.cpu_library, native.warn_once)
    package = tmp_path / "hyperformer_fast"
    package.mkdir()
    shutil.copytree(native._source_tree() / "csrc", tmp_path / "csrc")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(native, "_PACKAGE", package)
    monkeypatch.delenv("HYPERFORMER_FAST_BUILD", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield package
    for cache in caches:
        cache.cache_clear()


def built(package, **changes):
    info = {"mode": "auto", "libraries": {"cpu": {"file": "_hf_cpu.so"}}, "not_built": {}}
    info["libraries"]["cpu"]["source_hash"] = native.source_hash(package.parent / "csrc", "cpu")
    (package / "build_info.json").write_text(json.dumps(info | changes))


def test_never_built(elsewhere):
    status = native.status()
    assert native.cpu_library() is None and not status["built"] and "never built" in status["reason"]
    assert f"-e {elsewhere.parent}" in status["reason"]
    with pytest.warns(RuntimeWarning, match="without its compiled kernels.*pip install"):
        native.warn_once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.warn_once()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"libraries": 3}'])
def test_a_damaged_build_info_is_no_build(elsewhere, content):
    (elsewhere / "build_info.json").write_text(content)
    assert native.cpu_library() is None and "never built" in native.problem()


def test_why_it_was_not_built(elsewhere):
    built(elsewhere, libraries={}, not_built={"cpu": "no C++ compiler found"})
    assert "no C++ compiler found" in native.problem() and "no C++ compiler found" in native.status()["reason"]


def test_pure_python_on_request_is_quiet(elsewhere, monkeypatch):
    built(elsewhere, mode="none", libraries={}, not_built={"cpu": "HYPERFORMER_FAST_BUILD=none"})
    assert native.problem() is None and native.cpu_library() is None
    (elsewhere / "build_info.json").unlink()
    native.build_info.cache_clear()
    assert native.problem()
    monkeypatch.setenv("HYPERFORMER_FAST_BUILD", "none")
    assert native.problem() is None


def test_changed_sources_are_noticed(elsewhere):
    built(elsewhere)
    assert not native.stale("cpu") and native.problem() is None
    fold = elsewhere.parent / "csrc/cpu/isa/fold-inl.h"
    fold.write_text(fold.read_text() + "\n")
    assert native.stale("cpu") and "changed since" in native.problem() and "pip install" in native.problem()


def test_new_sources_are_noticed(elsewhere):
    built(elsewhere)
    (elsewhere.parent / "csrc/cpu/new.h").touch()
    assert native.stale("cpu")


def test_a_wheel_has_no_sources_and_is_not_stale(elsewhere):
    built(elsewhere)
    shutil.rmtree(elsewhere.parent / "csrc")
    assert not native.stale("cpu") and native.problem() is None


def test_a_library_that_does_not_load_is_a_reason(elsewhere):
    built(elsewhere)
    assert native.cpu_library() is None and "does not load in torch" in native.status()["reason"]
    for cache in (native._load, native.cpu_library):
        cache.cache_clear()
    (elsewhere / "_hf_cpu.so").write_bytes(b"not a library")
    assert native.cpu_library() is None and "does not load in torch" in native.status()["reason"]


def test_the_first_import_warns_once_and_loads_no_torch(tmp_path):
    package = native._PACKAGE
    ignore = shutil.ignore_patterns("*.so", "build_info.json", "__pycache__", "assets", "kernels")
    shutil.copytree(package, tmp_path / package.name, ignore=ignore)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hyperformer_fast, hyperformer_fast.native;"
        "print(hyperformer_fast.__file__); assert 'torch' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HYPERFORMER_FAST_BUILD")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert str(tmp_path) in done.stdout and done.stderr.count("RuntimeWarning: hyperformer_fast runs without") == 1


def test_the_import_does_not_wait_for_torch():
    code = "import sys; from hyperformer_fast import native; native.problem(); raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=None, cwd=native._source_tree())
