"""Repeated launches of Triton kernels: the same kernels with the same arguments as Triton itself would launch.

No kernel is compiled or run. A launch is compared by the kernel that Triton would have compiled for it, and by every
argument.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its interpreter",
)


class Compiled:
    """Stands for a compiled kernel, of which there is one for each key of Triton's."""

    def __init__(self, name, key, log):
        self.name, self.key, self.log = name, key, log
        self.function, self.packed_metadata = 7, (4, 1, 0)
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, x, y, z, stream, function, metadata, description, before, after, *args):
        addresses = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args)
        self.log.append((self.key, (x, y, z), stream, function, metadata, addresses))


@pytest.fixture
def log(monkeypatch):
    """The launches, on a GPU that is not there."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from stub_gpu import stub_gpu
    from triton.runtime.jit import JITFunction

    from hyperformer_fast.kernels import stack

    launches = []

    def compile(self, key, signature, device, *rest):
        kernel = Compiled(self.__name__, (self.__name__, key), launches)
        self.device_caches[device][0][key] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compile)
    monkeypatch.setattr(stack, "_plans", {})
    before = _forget_kernels()
    with stub_gpu():
        yield launches
    for function, caches in before.items():
        function.device_caches = caches


def _forget_kernels():
    """Takes away what Triton compiled; returns it."""
    from triton.runtime.jit import JITFunction

    from hyperformer_fast.kernels import adapter_backward, adapter_forward, finish, fold, schedule, weight_gradients

    found = {}
    for module in (adapter_backward, adapter_forward, finish, fold, schedule, weight_gradients):
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                found[kernel] = kernel.device_caches
                kernel.device_caches = type(kernel.device_caches)(kernel.create_binder)
    return found


@pytest.fixture
def compared(log, monkeypatch):
    """Every repeated launch is made once more by Triton, with the very same tensors, and must be the same. The list
    has the number of launches of each repetition."""
    from hyperformer_fast.kernels import launch, stack

    plain, repeated, expected = launch.Plan.__call__, [], []

    def call(self, addresses):
        log.clear()
        if plain(self, addresses):
            expected[:] = log
        log.clear()
        return False

    keep = launch.Plans.keep

    def check(self, key, recorded):
        if expected:
            assert log[: len(expected)] == expected and len(recorded._launches) == len(expected)
            repeated.append(len(expected))
            expected.clear()
        keep(self, key, recorded)

    monkeypatch.setattr(launch.Plan, "__call__", call)
    monkeypatch.setattr(launch.Plans, "keep", check)
    monkeypatch.setattr(stack, "MOST_PART_BYTES", 1 << 40)
    return repeated


LAYOUTS = [
    AdapterLayout(32, 16),
    AdapterLayout(32, 12, False, True),
    AdapterLayout(48, 4, True, True),
    AdapterLayout(33, 5, True, False),
]
#: numbers behind a row, the row's first number, and how many samples lie between two
PLACES = [(0, 0, 1)] * 4 + [(16, 0, 1), (16, 16, 2), (5, 3, 1)]


def placed(shape, dtype, place):
    """A tensor with contiguous rows, in its place of a larger one."""
    (B, M, d), (pad, start, spread) = shape, place
    return torch.empty(B * spread, M, d + pad, dtype=dtype)[::spread, :, start : start + d]


@st.composite
def inputs(draw, T):
    """What distinguishes a call from another."""
    mixed = T > 1 or draw(st.booleans())
    return SimpleNamespace(
        B=draw(st.integers(1, 3)),
        M=draw(st.sampled_from([1, 5, 40])),
        places=draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2)),
        index=draw(st.sampled_from([torch.int32, torch.int64])) if mixed else None,
        step=draw(st.integers(1, 2)),
        save=draw(st.booleans()),
        needs=draw(st.sampled_from([(True, True), (True, False), (False, True)])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def _sweep(compared, data):
    from hyperformer_fast.kernels import tiles
    from hyperformer_fast.kernels.stack import TritonStack

    draw = data.draw
    layout, T = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 3))
    spec = AdapterSpec(layout, draw(st.sampled_from(ACTIVATIONS)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    masters = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    stack = TritonStack(torch.zeros(3, T, layout.numel, dtype=masters), spec, dtype)
    kinds = draw(st.lists(inputs(T), min_size=1, max_size=3))
    precision = torch.backends.cuda.matmul.fp32_precision

    def call(kind, site):
        shape = kind.B, kind.M, layout.d
        x, g = (placed(shape, dtype, draw(st.sampled_from(kind.places))) for _ in range(2))
        index = None
        if kind.index:
            index = torch.zeros(kind.step * kind.B, dtype=kind.index)[:: kind.step]
        out, saved = stack.forward(x, site, index, kind.save, lambda: None)
        assert out.is_contiguous() and out.shape == x.shape and out.dtype == dtype
        if kind.save:
            stack.backward(g, x, saved, site, index, *kind.needs, False)

    try:
        for _ in range(draw(st.integers(2, 8))):
            chosen = draw(st.sampled_from(kinds)), draw(st.integers(0, 2))
            change = draw(st.sampled_from([None, None, None, "tile", "tf32", "ieee"]))
            if change == "tile":
                with tiles.forced("forward", tiles.Tile(16, 32, 4)), tiles.forced("weights", tiles.Tile(16, 32, 4)):
                    call(*chosen)
                continue
            if change:
                torch.backends.cuda.matmul.fp32_precision = change
            call(*chosen)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def test_a_repeated_launch_is_the_launch(compared):
    _sweep(compared)
    assert set(compared) == {1, 2}, "neither forwards nor backwards may be missing among the repeated launches"


LAYOUT = AdapterLayout(32, 16)


def test_strides_belong_to_a_plan(compared):
    """Each of the two tensors in each of two places, after the other of them was recorded in its."""
    site = Site()
    for _ in range(2):
        for place_of_x, place_of_g in itertools.product([(0, 0, 1), (16, 0, 1)], repeat=2):
            x, g = (placed((2, 8, LAYOUT.d), torch.bfloat16, place) for place in (place_of_x, place_of_g))
            saved = site(x)[1]
            site.stack.backward(g, x, saved, 0, None, True, True, False)
    assert set(compared) == {1, 2}


class Site:
    """A site whose forward is repeated from the second call on."""

    def __init__(self, T=1):
        from hyperformer_fast.kernels.stack import TritonStack

        self.packed = torch.zeros(2, T, LAYOUT.numel)
        self.stack = TritonStack(self.packed, AdapterSpec(LAYOUT, "relu"), torch.bfloat16)
        self.x = torch.zeros(2, 8, LAYOUT.d, dtype=torch.bfloat16)

    def __call__(self, x=None):
        return self.stack.forward(self.x if x is None else x, 0, None, True, lambda: None)


def asked_triton(monkeypatch):
    """A list that gets an entry whenever Triton is asked for a launch."""
    from triton.runtime.jit import JITFunction

    run, asked = JITFunction.run, []
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (asked.append(self.__name__), run(self, *a, **k))[1])
    return asked


def test_triton_is_asked_once(log, monkeypatch):
    asked, site = asked_triton(monkeypatch), Site()
    site()
    assert asked == ["gram_kernel", "fold_kernel", "adapter_forward_kernel"]
    log.clear()
    site()
    site(torch.ones(2, 8, 32, dtype=torch.bfloat16))
    assert len(asked) == 3 and len(log) == 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run", "replaced"])
def test_hooks_are_called(log, monkeypatch, hook):
    """A profiler that starts after the kernels were recorded."""
    from triton import knobs

    from hyperformer_fast.kernels.adapter_forward import adapter_forward_kernel

    site, called = Site(), []
    site()
    asked = asked_triton(monkeypatch)
    if hook == "pre_run":
        monkeypatch.setattr(adapter_forward_kernel, "pre_run_hooks", adapter_forward_kernel.pre_run_hooks)
        adapter_forward_kernel.add_pre_run_hook(lambda *a, **k: called.append(a))
    elif hook == "replaced":
        plain, knobs.runtime.launch_enter_hook = knobs.runtime.launch_enter_hook, lambda metadata: None
    else:
        getattr(knobs.runtime, hook).add(called.append)
    try:
        site()
        assert asked == ["adapter_forward_kernel"]
    finally:
        if hook == "pre_run":
            adapter_forward_kernel.pre_run_hooks.clear()
        elif hook == "replaced":
            knobs.runtime.launch_enter_hook = plain
        else:
            getattr(knobs.runtime, hook).remove(called.append)
    site()
    assert len(asked) == 1


def test_another_driver_or_device(log, monkeypatch):
    import triton

    site = Site()
    site()
    asked, active = asked_triton(monkeypatch), triton.runtime.driver.active
    with monkeypatch.context() as changed:
        changed.setattr(active, "get_current_device", lambda: 1)
        site()
    assert len(asked) == 1
    with monkeypatch.context() as changed:
        changed.setattr(triton.runtime.driver, "_active", type(active)(80))
        site()
    assert len(asked) == 2
    site()  # recorded for that driver in the meantime
    assert len(asked) == 3
    site()
    assert len(asked) == 3


def recorded(body, tensors):
    from hyperformer_fast.kernels import launch

    with launch.recording(tensors) as found:
        body()
    return found.plan


def test_what_cannot_be_repeated_is_not(log):
    from hyperformer_fast.kernels.adapter_forward import adapter_forward
    from hyperformer_fast.kernels.fold import fold
    from hyperformer_fast.layout import Folded, Saved

    spec = AdapterSpec(LAYOUT, "relu")
    packed, x = torch.zeros(1, LAYOUT.numel), torch.zeros(8, 32)
    folded, out, saved = fold(packed, LAYOUT, x.dtype), torch.empty_like(x), Saved.empty(x, LAYOUT)
    tensors = [x, out, *folded, *saved]
    run = lambda x=x, folded=folded: adapter_forward(x, folded, spec, None, True, out, saved)  # noqa: E731
    plan = recorded(run, tensors)
    assert len(plan.launches) == 1
    # An operator of PyTorch would not be repeated, nor would a kernel get a tensor that is no longer there.
    assert not recorded(lambda: (out.zero_(), run()), tensors).launches
    assert not recorded(lambda: run(folded=Folded(*(part.clone() for part in folded))), tensors).launches
    assert not recorded(run, [x, out, *folded]).launches
    # Other tensors of these shapes may be repeated: nothing is kept, and the next call is recorded.
    wide = torch.zeros(8, 64)
    left, right = wide[:, :32], wide[:, 32:]
    assert recorded(lambda: run(x=left), [left, right, *tensors[1:]]) is None
    shifted = torch.zeros(8 * 32 + 1)[1:].view(8, 32)
    assert recorded(lambda: run(x=shifted), [shifted, *tensors[1:]]) is None
    assert not plan([shifted.data_ptr(), *(t.data_ptr() for t in tensors[1:])])
    assert plan([t.data_ptr() for t in tensors])


def test_plans_are_forgotten_where_there_are_too_many(log, monkeypatch):
    from hyperformer_fast.kernels import launch

    monkeypatch.setattr(launch, "_MOST_PLANS", 3)
    site = Site()
    for rows in range(1, 8):
        site(torch.zeros(1, rows, 32, dtype=torch.bfloat16))
    assert len(site.stack._plans._plans) <= 3


def test_other_versions_of_triton_are_asked(log, monkeypatch):
    from hyperformer_fast.kernels import launch

    monkeypatch.setattr(launch, "_fits", False)
    site = Site()
    site()
    asked = asked_triton(monkeypatch)
    site()
    assert asked == ["adapter_forward_kernel"]


class OnTheDevice(TorchDispatchMode):
    """Refuses what reads a tensor's values on the host, or copies to another device, as no CUDA graph may contain."""

    READS = {
        "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2",
        "unique_consecutive", "unique_dim", "bincount", "repeat_interleave", "_to_copy", "copy_", "_pin_memory",
    }  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.READS, f"{name} within a step"
        return func(*args, **(kwargs or {}))


def test_the_guard_notices_a_read():
    with OnTheDevice():
        for read in (lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: t.cpu().to(torch.float64)):
            with pytest.raises(AssertionError, match="within a step"):
                read(torch.ones(3))


@pytest.mark.parametrize("mixed", [False, True], ids=["one task", "mixed tasks"])
def test_a_step_can_be_captured(log, monkeypatch, mixed):
    """A step of a stack neither reads back nor synchronises, and its launches depend on shapes alone."""
    from hyperformer_fast import backends, ops

    for name in ("synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *a, _name=name: pytest.fail(f"torch.cuda.{_name} within a step"))
    T = 3 if mixed else 1
    packed = torch.zeros(2, T, LAYOUT.numel).requires_grad_()
    x, g = torch.zeros(4, 8, LAYOUT.d, dtype=torch.bfloat16).requires_grad_(), torch.ones(4, 8, LAYOUT.d).bfloat16()

    def step(tasks):
        log.clear()
        with backends.use_backend("triton"), OnTheDevice():
            stack = ops.Stack(packed, LAYOUT, "relu")
            out = stack.adapter(stack.adapter(x, 0, tasks), 1, tasks)
            torch.autograd.grad(out, (x, packed), g)
        return [(key, grid) for key, grid, *_ in log]

    tasks = [torch.tensor(t) if mixed else None for t in ([0, 1, 2, 0], [0, 0, 0, 0], [-1, 2, 2, -1])]
    launches = [step(t) for t in tasks]
    assert len(launches[0]) == (10 if mixed else 9)
    assert launches[0] == launches[1] == launches[2]
