"""The kernels on a GPU: large shapes, every option, graphs, streams, offsets beyond 32 bits.

``HYPERFORMER_FAST_TEST_DEVICE`` names another device than "cuda": with "cpu" these tests try themselves out.
``HYPERFORMER_FAST_TEST_BACKENDS`` names the backends, separated by commas. A dozen fixed examples come first; they
compile some sixty Triton kernels. The sweep compiles about six for every example: ``HYPERFORMER_FAST_SWEEP_SECONDS``
ends it after a time, and ``HYPERFORMER_FAST_SWEEP_EXAMPLES`` after a number.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.cases import HOSTILE, hostile_packed, random_packed
from support.tolerance import assert_accurate
from test_ops import DTYPES, away_from_the_kink, check_against_truth

from hyperformer_fast import backends, get_hyperformer_model, ops, reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.parameters import published_config
from hyperformer_fast.tiny import load_tiny

DEVICE = os.environ.get("HYPERFORMER_FAST_TEST_DEVICE", "cuda")
ON_GPU = DEVICE.startswith("cuda")
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU, and torch sees none")
#: Quick backends of the device, the reference apart.
BACKENDS = os.environ.get("HYPERFORMER_FAST_TEST_BACKENDS", "triton,cuda" if ON_GPU else "cpu").split(",")
SWEEP_SECONDS = float(os.environ.get("HYPERFORMER_FAST_SWEEP_SECONDS", "inf"))


def skip_where_absent(name: str) -> None:
    reason = next(found["reason"] for found in backends.backend_report() if found["name"] == name)
    if reason:
        pytest.skip(f"needs the backend {name}: {reason}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    skip_where_absent(request.param)
    with backends.use_backend(request.param):
        yield request.param


class Example(NamedTuple):
    """An adapter and a batch of 5 x 37 rows."""

    layout: AdapterLayout
    dtype: torch.dtype
    activation: str = "gelu_new"
    T: int = 1  #: tasks; with more than one, some samples have none
    contiguous: bool = True

    def __str__(self) -> str:
        norms = "-".join(name for name, on in (("pre", self.layout.pre_norm), ("post", self.layout.post_norm)) if on)
        return f"{self.layout.d}-{self.layout.b}-{norms}-{self.dtype}-{self.activation}-{self.T}"


#: Every published shape, dtype, norm and activation, widths and bottlenecks off a power of two, rows that stay on chip
#: and rows that do not.
EXAMPLES = [
    Example(AdapterLayout(768, 24), torch.bfloat16),
    Example(AdapterLayout(768, 24), torch.bfloat16, T=3),
    Example(AdapterLayout(768, 24), torch.float32, T=3, contiguous=False),
    Example(AdapterLayout(768, 24), torch.float16),
    Example(AdapterLayout(768, 24, pre_norm=True), torch.bfloat16, "gelu", T=3, contiguous=False),
    Example(AdapterLayout(512, 16), torch.float32, "silu"),
    Example(AdapterLayout(1024, 32), torch.bfloat16, "silu", T=2),
    Example(AdapterLayout(1024, 128), torch.bfloat16, T=2),
    Example(AdapterLayout(1024, 64, pre_norm=True), torch.float32, T=2),
    Example(AdapterLayout(97, 5, post_norm=False), torch.float16, "gelu", T=2, contiguous=False),
    Example(AdapterLayout(2050, 24), torch.bfloat16, T=2, contiguous=False),
    Example(AdapterLayout(40, 3, pre_norm=True, post_norm=False), torch.float32, "relu", T=2),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example(backend, example):
    layout, T = example.layout, example.T
    index = torch.tensor([0, T - 1, -1, 1, 0], device=DEVICE) if T > 1 else None
    packed = random_packed(layout, T).float().to(DEVICE)
    while True:
        x, g = (torch.randn(5, 37, 2 * layout.d).to(DEVICE, example.dtype)[..., : layout.d] for _ in range(2))
        if example.contiguous:
            x, g = x.contiguous(), g.contiguous()
        if example.activation != "relu" or away_from_the_kink(x, packed, layout, index):
            break
    check_against_truth(x, g, packed, layout, example.activation, index, backend=backend)


class Sweep:
    """When the sweep ends, and how many examples were checked until then."""

    def __init__(self, seconds: float):
        self.end, self.checked = time.monotonic() + seconds, 0


@pytest.fixture(scope="module")
def sweep():
    made = Sweep(SWEEP_SECONDS)
    yield made
    print(f"\nsweep: {made.checked} examples checked")


@pytest.mark.parametrize("backend_name", BACKENDS)
@settings(max_examples=int(os.environ.get("HYPERFORMER_FAST_SWEEP_EXAMPLES", 400)), deadline=None, print_blob=True)
@given(data=st.data())
def test_sweep(backend_name, sweep, data):
    skip_where_absent(backend_name)
    if time.monotonic() > sweep.end:
        return
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    layout = AdapterLayout(
        draw(st.sampled_from([8, 40, 96, 512, 768, 1024, 1536, 2050]), label="d"),
        draw(st.sampled_from([1, 3, 16, 24, 32, 48, 64, 96, 128]), label="b"),
        draw(st.booleans(), label="pre-norm"),
        draw(st.booleans(), label="post-norm"),
    )
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    B, L, T = (draw(st.integers(1, n), label=name) for name, n in (("B", 5), ("L", 300), ("T", 3)))
    mixed = T > 1 or draw(st.booleans(), label="mixed")
    index = torch.randint(-1, T, (B,), device=DEVICE) if mixed else None
    x, g = (torch.randn(B, L, 2 * layout.d).to(DEVICE, dtype)[..., : layout.d] for _ in range(2))
    if draw(st.booleans(), label="contiguous"):
        x, g = x.contiguous(), g.contiguous()
    packed = random_packed(layout, T).float().to(DEVICE)
    activation = draw(st.sampled_from(ACTIVATIONS), label="activation")
    if activation == "relu":
        assume(away_from_the_kink(x, packed, layout, index))
    check_against_truth(x, g, packed, layout, activation, index, backend=backend_name)
    sweep.checked += 1


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights(backend, kind):
    layout = AdapterLayout(96, 12)
    packed = hostile_packed(kind, layout).float().to(DEVICE)
    x = torch.randn(64, 96, device=DEVICE)
    truth = reference.adapter(x.double(), packed.double(), layout, "gelu_new")
    plain = reference.adapter(x, packed, layout, "gelu_new")
    worst = max((plain.double() - truth).abs().max(), torch.finfo(x.dtype).eps * truth.abs().max())
    assert (ops.adapter(x, packed, layout, "gelu_new").double() - truth).abs().max() <= 8 * worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_whole_stack_is_generated_and_folded(backend, dtype):
    layout = AdapterLayout(768, 24)
    E, G, g0 = (torch.randn(s, device=DEVICE) for s in ((2, 50, 64), (2, layout.numel, 64), (2, layout.numel)))
    packed = ops.generate_weights(E, G, g0)
    folded = ops.fold(packed, layout, dtype)
    truth = reference.generate_weights(E.double(), G.double(), g0.double())
    assert (packed.double() - truth).norm() <= 1e-6 * truth.norm()
    for mine, exact in zip(folded, reference.fold(packed.double(), layout, torch.float64)):
        assert (mine.double() - exact).norm() <= torch.finfo(mine.dtype).eps * exact.norm()


def test_a_model_trains_as_with_the_reference(backend):
    losses = {}
    for name in (backend, "reference"):
        torch.manual_seed(0)
        model = get_hyperformer_model(load_tiny()[0], published_config("hyperformer++")).to(DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        index = torch.tensor([0, 3, 1, 0], device=DEVICE)
        losses[name] = []
        with backends.use_backend(name):
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids, task_index=index).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[name].append(loss.item())
    for mine, theirs in zip(*losses.values()):
        assert abs(mine - theirs) <= 1e-4 * theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 7, 64, 65])
@pytest.mark.parametrize(("d", "b"), [(512, 16), (768, 24), (1024, 128), (515, 5)])
def test_a_decoding_step(backend, d, b, N, dtype):
    """Each row another task's; with folded weights, and generated in the same call."""
    layout = AdapterLayout(d, b)
    E, G = (torch.randn(s, device=DEVICE) for s in ((8, 64), (layout.numel, 64)))
    G, g0 = 0.01 * G, random_packed(layout)[0].float().to(DEVICE)
    x, index = torch.randn(N, 1, d, device=DEVICE).to(dtype), torch.arange(N, device=DEVICE) % 9 - 1
    with torch.no_grad():
        packed = ops.generate_weights(E[None], G[None], g0[None])[0]
        mine = ops.adapter(x, packed, layout, "gelu_new", task_index=index)
        whole = ops.hyper_adapter(x, E, G, g0, layout, "gelu_new", index)
    exact = reference.generate_weights(*(t.double()[None] for t in (E, G, g0)))[0]
    truth = reference.adapter(x.double(), exact, layout, "gelu_new", index)
    plain = reference.adapter(x, packed, layout, "gelu_new", index)
    plain_fp32 = reference.adapter(x.float(), packed, layout, "gelu_new", index)
    for out in (mine, whole):
        assert_accurate(out, plain, truth, "out", plain_fp32)
        assert torch.equal(out[index == -1], x[index == -1])


def adapter_and_leaves(dtype=torch.bfloat16, T=2, B=4, L=33):
    layout = AdapterLayout(768, 24)
    leaves = torch.randn(B, L, 768, device=DEVICE).to(dtype), random_packed(layout, T).float().to(DEVICE)
    index = torch.arange(B, device=DEVICE) % T

    embeddings = torch.randn(T, 6, device=DEVICE), torch.randn(layout.numel, 6, device=DEVICE)

    def step(x, packed):
        out = ops.adapter(x, packed, layout, "gelu_new", task_index=index)
        whole = ops.hyper_adapter(x.detach(), *embeddings, packed[0].detach(), layout, "gelu_new", index)
        return [out, whole, *torch.autograd.grad(out, (x, packed), torch.ones_like(out))]

    return step, [leaf.requires_grad_() for leaf in leaves], layout, index


def test_compiles_in_one_graph(backend):
    _, (x, packed), layout, index = adapter_and_leaves()
    apply = lambda x, packed: ops.adapter(x, packed, layout, "gelu_new", task_index=index)  # noqa: E731
    assert torch.equal(torch.compile(apply, fullgraph=True)(x, packed), apply(x, packed))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: CUDA graphs")
def test_a_cuda_graph_replays_it(backend):
    step, leaves, *_ = adapter_and_leaves()
    expected = step(*leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*leaves)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams")
def test_the_current_stream_is_used(backend):
    step, leaves, *_ = adapter_and_leaves()
    expected = step(*leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(*leaves)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: nothing is read back from it")
def test_nothing_waits_for_the_device(backend):
    step, leaves, *_ = adapter_and_leaves()
    step(*leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU of 20 GB")
def test_more_numbers_than_32_bits_count(backend):
    layout = AdapterLayout(1024, 16)
    packed = random_packed(layout).float().to(DEVICE)
    N = 2**31 // 1024 + 70
    x = torch.zeros(N, 1024, device=DEVICE, dtype=torch.bfloat16)
    x[-70:] = torch.randn(70, 1024, device=DEVICE)
    with torch.no_grad():
        out, few = (ops.adapter(rows, packed, layout, "gelu_new") for rows in (x, x[-70:].clone()))
    assert torch.equal(out[-70:], few)
