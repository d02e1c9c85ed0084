"""What is the C++ kernels' own: instruction sets, threads, rows read in place, and raw ops that refuse what would crash
them."""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from support.activations import check_activations_everywhere
from support.cases import HOSTILE, random_packed
from support.tolerance import assert_accurate
from support.weights import check_hostile_weights

from hyperformer_fast import backends, native, ops, reference
from hyperformer_fast.activations import ACTIVATIONS
from hyperformer_fast.backends.cpu import INSTRUCTION_SETS, ISA_VARIABLE, CpuBackend
from hyperformer_fast.layout import AdapterLayout, AdapterSpec

pytestmark = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)


def run(x, g, packed, layout, activation, index, backend):
    x, packed = x.detach().requires_grad_(), packed.detach().requires_grad_()
    with backends.use_backend(backend):
        out = ops.adapter(x, packed, layout, activation, task_index=index)
        return [out.detach(), *torch.autograd.grad(out, (x, packed), g)]


def eager(x, g, packed, layout, activation, index):
    x, packed = x.detach().requires_grad_(), packed.detach().requires_grad_()
    out = reference.adapter(x, packed, layout, activation, index)
    return [out.detach(), *torch.autograd.grad(out, (x, packed), g)]


# One case of each: tails of vectors (d, b not multiples of 16), several row blocks (64) and parts (128), more rows of a
# task than it takes to spread the weights (512), every activation and norm.
CASES = [
    (d, b, rows, activation, pre, post)
    for (d, b, rows), activation, (pre, post) in zip(
        [
            (768, 24, 300),
            (48, 3, 65),
            (37, 16, 140),
            (130, 17, 64),
            (16, 1, 1),
            (5, 40, 9),
            (96, 130, 70),
            (512, 16, 260),
        ],
        itertools.cycle(ACTIVATIONS),
        itertools.cycle([(False, True), (True, True), (False, False), (True, False), (False, True)]),
    )
]


def check_rounding() -> None:
    """z is the nearest number of x's dtype, ties to even: with a down-projection that copies x, z = x + bias."""
    d = 48
    layout = AdapterLayout(d, d)
    packed = torch.zeros(1, layout.numel)
    parts = layout.unpack(packed)
    parts["down_weight"].copy_(torch.eye(d))
    parts["down_bias"].copy_(torch.cat([torch.arange(d // 2) * 2.0**-9, torch.randn(d // 2)]))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.cat([torch.ones(65, d // 2), torch.randn(65, d // 2)], 1).to(dtype)
        folded = reference.fold(packed, layout, dtype)
        _, z, *_ = native.cpu_library().adapter_forward(x, *folded, None, d, d, False, True, 0, True)
        assert torch.equal(z, (x.float() + parts["down_bias"]).to(dtype)), dtype


def check_cases() -> None:
    check_rounding()
    for d, b, rows, activation, pre, post in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            torch.manual_seed(d)
            layout = AdapterLayout(d, b, pre, post)
            packed = random_packed(layout, 3).float()
            x, g = (torch.randn(4, rows, d).to(dtype) for _ in range(2))
            index = torch.tensor([2, 0, -1, 2])
            arguments = (packed, layout, activation, index)
            mine = run(x, g, *arguments, "cpu")
            truth = eager(x.double(), g.double(), packed.double(), *arguments[1:])
            for name, k, e, t in zip(("out", "dx", "dpacked"), mine, eager(x, g, *arguments), truth):
                if activation == "relu" and name != "out":
                    continue  # rounding a weight can turn relu's derivative; test_ops' sweep keeps away from the kink
                assert_accurate(k, e, t, f"{name} at {d, b, rows, activation, pre, post, dtype}", dtype=dtype)


def test_shapes_that_meet_every_loop():
    check_cases()


def check_a_nan_stays_one():
    """Rounding up a payload of all ones would carry into the sign and store a zero."""
    layout = AdapterLayout(40, 5)
    packed = torch.randn(1, layout.numel)
    layout.unpack(packed)["post_beta"][0, 7] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        backend, x = CpuBackend(), torch.randn(33, 40).to(dtype)
        out, _ = backend.adapter_forward(
            x, backend.fold(packed, layout, dtype), AdapterSpec(layout, "gelu_new"), None, False
        )
        assert out[:, 7].isnan().all() and out[:, 8:].isfinite().all(), dtype


def test_a_nan_stays_one():
    check_a_nan_stays_one()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import pytest\nfrom hyperformer_fast import backends\n"
        "report = next(r for r in backends.backend_report() if r['name'] == 'cpu')\n"
        "print(report['reason']) if not report['available'] else None\n"
        "if report['available']:\n"
        "    import importlib.util as u\n"
        f"    spec = u.spec_from_file_location('t', {__file__!r})\n"
        "    m = u.module_from_spec(spec)\n    spec.loader.exec_module(m)\n"
        "    m.check_cases()\n    m.check_activations()\n    m.check_whole_range()\n    m.check_sixteen_bits()\n"
        "    m.check_rounding_is_unbiased()\n    m.check_a_nan_stays_one()\n    print('checked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, ISA_VARIABLE: isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if "checked" not in done.stdout:
        pytest.skip(f"needs a CPU with {isa}: {done.stdout.strip()}")


CANCELLING_FOLD = """
import torch
from hyperformer_fast import backends, native
from hyperformer_fast.layout import AdapterLayout
layout = AdapterLayout(64, 8)
packed = torch.randn(1, layout.numel, generator=torch.Generator().manual_seed(0))
up = layout.unpack(packed)["up_weight"]
up[..., 1:] = up[..., :1] + 1e-5 * up[..., 1:]
if next(r for r in backends.backend_report() if r["name"] == "cpu")["available"]:
    folded = native.cpu_library().fold(packed, 64, 8, False, True, torch.float32)
    print(native.cpu_library().instruction_set(), folded[4].numpy().tobytes().hex())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 CPU")
def test_the_forced_instruction_set_folds_too():
    """Nearly equal columns show float64's last bits, in which AVX2's fused multiply-adds differ from SSE2's products.

    The fold once chose its own instruction set when the library was loaded, whatever was forced.
    """
    if any("-fsanitize" in flag for flag in native.build_info().get("libraries", {}).get("cpu", {}).get("flags", ())):
        pytest.skip("needs a build that fuses multiply-adds, which one for the sanitizers does not")
    results = {}
    for isa in ("portable", "avx2"):
        code = f"import sys; sys.path[:0] = {sys.path!r}\n{CANCELLING_FOLD}"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, ISA_VARIABLE: isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        if not done.stdout:
            pytest.skip(f"needs a CPU with {isa}")
        code, results[isa] = done.stdout.split()
        assert INSTRUCTION_SETS[int(code)] == isa
    assert results["portable"] != results["avx2"]


def test_an_instruction_set_that_is_not_there_is_refused():
    code = "from hyperformer_fast import backends, explain; print(explain('adapter_forward'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, ISA_VARIABLE: "avx9"}, capture_output=True, text=True
    )
    assert (
        "reference (asked for: auto)" in done.stdout
        and "avx9 is not one of portable, avx2, avx512, avx512_bf16" in done.stdout
    )


def test_the_number_of_threads_changes_no_bit():
    layout = AdapterLayout(64, 8, pre_norm=True)
    x, g, packed = torch.randn(8, 200, 64), torch.randn(8, 200, 64), random_packed(layout, 3).float()
    index = torch.tensor([0, 1, 2, -1, 2, 1, 0, 0])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(x, g, packed, layout, "gelu", index, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights(kind):
    with backends.use_backend("cpu"):
        check_hostile_weights(kind, ops.adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, k", [(1, 64), (3, 5), (4, 1)])
def test_one_call_for_a_site_is_generation_folding_and_application(T, k, dtype):
    layout = AdapterLayout(40, 5)
    E, G, g0 = torch.randn(T, k), torch.randn(layout.numel, k) * 0.1, torch.randn(layout.numel) * 0.1
    x, index = torch.randn(6, 7, 40).to(dtype), torch.tensor([0, -1, T - 1, 0, T - 1, 0])
    library, static = native.cpu_library(), (40, 5, False, True, 0)
    out, *rest = library.hyper_adapter(x, E, G, g0, index, *static, True)
    packed, folded = rest[4], rest[5:]
    torch.testing.assert_close(packed.double(), E.double() @ G.double().T + g0.double(), rtol=1e-6, atol=1e-6)
    for mine, alone in zip(folded, library.fold(packed, *static[:4], dtype)):
        assert torch.equal(mine, alone)
    for mine, alone in zip((out, *rest[:4]), library.adapter_forward(x, *folded, index, *static, True)):
        assert torch.equal(mine, alone)


def exact_activation(name, z):
    """act(z) and act'(z) in float64, by forms that do not cancel in the tails."""
    z = z.double().requires_grad_()
    values = {
        "gelu_new": lambda: z * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)),
        "gelu": lambda: z * 0.5 * torch.special.erfc(-z / 2**0.5),
        "relu": lambda: torch.relu(z),
        "silu": lambda: z * torch.sigmoid(z),
    }[name]()
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


def check_activations() -> None:
    """Each over its whole range: one row whose bottleneck holds every z; its weights' gradients are act and act'."""
    sizes = torch.cat([torch.logspace(-38, 8, 300), torch.linspace(0.01, 110, 700)])
    z = torch.cat([sizes, -sizes, torch.zeros(1)])
    layout = AdapterLayout(1, len(z), False, False)
    packed = torch.zeros(1, layout.numel)
    parts = layout.unpack(packed)
    parts["down_weight"][0, :, 0], parts["up_weight"][:] = z, 1
    packed.requires_grad_()
    for name in ACTIVATIONS:
        with backends.use_backend("cpu"):
            ops.adapter(torch.ones(1, 1), packed, layout, name).sum().backward()
        gradient = layout.unpack(packed.grad)
        packed.grad = None
        h, slope = gradient["up_weight"][0, 0], gradient["down_bias"][0]
        true_h, true_slope = exact_activation(name, z)
        # below e^-87 the exponential is 0
        floor = 1e-37 * z.double().abs().clamp(min=1) ** 3
        for mine, true in ((h, true_h), (slope, true_slope)):
            excess = (mine - true).abs() - 3e-7 * (1 + true.abs()) - floor
            assert (excess <= 0).all(), f"{name}: {mine[excess.argmax()]} at {z[excess.argmax()]}"
        # the lower tail keeps digits of its own, erfc's fewer than the logistic function's
        tail, digits = (z > -6, 1e-3) if name == "gelu" else (z == z, 2e-5)
        assert ((h - true_h).abs() <= digits * true_h.abs() + floor)[tail].all(), name


def check_whole_range() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_activations_everywhere(CpuBackend(), dtype)


def test_activations_over_the_whole_range():
    """The exponential in their derivatives was once clamped, and times z^2 gave 2.6e12 for 1 at z = 1e13."""
    check_whole_range()


def check_sixteen_bits() -> None:
    """Every number of 16 bits, subnormal ones too, is loaded and stored as it is; others are rounded to them.

    AVX-512's products of bfloat16 pairs take subnormal numbers for zero, the sum that they add to included.
    """
    flushes = native.cpu_library().instruction_set() == INSTRUCTION_SETS.index("avx512_bf16")
    for dtype, d in itertools.product((torch.bfloat16, torch.float16), (64, 3)):
        layout = AdapterLayout(d, 2, False, False)
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()]
        x = x[: len(x) // d * d].view(-1, d)
        with backends.use_backend("cpu"):
            out = ops.adapter(x, torch.zeros(1, layout.numel), layout, "relu")
        if flushes and dtype == torch.bfloat16:
            x = x.where(x.abs() >= torch.finfo(dtype).tiny, 0)
        assert torch.equal(out, x), (dtype, d)  # -0 + 0 is 0, and equal

    # To nearest, ties to even, as torch rounds: the up bias of float32 goes to an output of 16 bits.
    for dtype, middle in ((torch.bfloat16, 1 << 15), (torch.float16, 1 << 12)):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        bits = every[every.isfinite()].view(torch.int32)
        bias = torch.cat([bits + shift for shift in (0, 1, middle - 1, middle, middle + 1)] + [bits[:3]])
        bias = bias.view(torch.float32)
        layout = AdapterLayout(len(bias), 1, False, False)
        packed = torch.zeros(1, layout.numel)
        layout.unpack(packed)["up_bias"][0] = bias
        with backends.use_backend("cpu"):
            out = ops.adapter(torch.zeros(1, layout.d, dtype=dtype), packed, layout, "relu")
        if flushes and dtype == torch.bfloat16:
            bias = bias.where(bias.abs() >= torch.finfo(dtype).tiny, 0)
        assert torch.equal(out[0], bias.to(dtype)), dtype


def check_rounding_is_unbiased():
    """What is rounded within a kernel is rounded to nearest: cut off, an operand would be 0.14 % short in bfloat16 on
    average, which no bound on single errors sees."""
    torch.manual_seed(5)
    layout = AdapterLayout(256, 24)
    packed = random_packed(layout).float()
    x, g = (torch.randn(512, 256).bfloat16() / 8 for _ in range(2))
    exact_x, exact = x.double().requires_grad_(), packed.double().requires_grad_()
    truth = reference.adapter(exact_x, exact, layout, "silu")
    truths = (truth, *torch.autograd.grad(truth, (exact_x, exact), g.double()))
    x.requires_grad_()
    packed.requires_grad_()
    with backends.use_backend("cpu"):
        out = ops.adapter(x, packed, layout, "silu")
        mine = (out, *torch.autograd.grad(out, (x, packed), g))
    for name, k, t, passed in zip(("out", "dx", "dpacked"), mine, truths, (x, g, torch.zeros(1))):
        branch, expected = k.detach().double() - passed.double(), t.detach() - passed.double()
        along = (branch * expected).sum() / expected.square().sum()
        assert abs(along - 1) < 2e-4, f"{name}: {along:.5f} of the truth"


def test_rounding_is_unbiased():
    check_rounding_is_unbiased()


def test_the_up_bias_is_not_rounded():
    """Where bfloat16 products take it, it goes in as two halves. Here it outweighs the rest, with a gradient along it;
    beside the reference's fold, because eager rounds more than the bias."""
    torch.manual_seed(5)
    layout = AdapterLayout(256, 8)
    packed = torch.randn(1, layout.numel) * 0.05
    parts = layout.unpack(packed)
    sign = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)
    parts["post_gamma"].fill_(1)
    parts["up_bias"][0] = (1 + 2**-8 - 2**-12) * sign
    x, g = torch.randn(512, 256).bfloat16(), (sign + 0.1 * torch.randn(512, 256)).bfloat16()
    exact_x, exact = x.double().requires_grad_(), packed.double().requires_grad_()
    truth = torch.autograd.grad(reference.adapter(exact_x, exact, layout, "silu"), (exact_x, exact), g.double())
    mine, folded = (run(x, g, packed, layout, "silu", None, backend) for backend in ("cpu", "reference"))
    for name, k, e, t in zip(("dx", "dpacked"), mine[1:], folded[1:], truth):
        assert_accurate(k, e, t, name)


def test_sixteen_bits():
    check_sixteen_bits()


def test_activations_over_their_whole_range():
    check_activations()


def test_infinities_and_nan_stay_in_their_rows():
    layout = AdapterLayout(40, 5)
    packed = random_packed(layout).float()
    x = torch.randn(70, 40)
    x[3, 7], x[66, 0] = float("nan"), float("inf")
    out, *_ = run(x, torch.randn_like(x), packed, layout, "gelu_new", None, "cpu")
    bad = (~out.isfinite()).any(1).nonzero().flatten().tolist()
    assert bad == [3, 66]


def test_raw_ops_refuse_what_would_crash_them():
    library = native.cpu_library()
    layout = AdapterLayout(8, 2)
    packed = random_packed(layout, 2).float()
    folded = reference.fold(packed, layout, torch.float32)
    x, index = torch.randn(3, 8), torch.tensor([0, 1, -1])
    static = (8, 2, False, True, 0)
    out, *saved = library.adapter_forward(x, *folded, index, *static, True)
    wrong_folded = [(*folded[:i], part[:1] if part.dim() else part, *folded[i + 1 :]) for i, part in enumerate(folded)]
    calls = [
        *[lambda f=f: library.adapter_forward(x, *f, index, *static, True) for f in wrong_folded[1:]],
        lambda: library.adapter_forward(x[:, :7], *folded, index, *static, True),
        lambda: library.adapter_forward(x.double(), *folded, index, *static, True),
        lambda: library.adapter_forward(x, *folded, None, *static, True),
        lambda: library.adapter_forward(x, *folded, torch.tensor([0, 1, 2]), *static, True),
        lambda: library.adapter_forward(x, *folded, index[:2], *static, True),
        lambda: library.adapter_forward(x, *folded, index.float(), *static, True),
        lambda: library.adapter_forward(x, *folded, index, 8, 2, False, True, 4, True),
        lambda: library.adapter_forward(x, *folded, index, 8, 0, False, True, 0, True),
        lambda: library.adapter_backward(out[:2], x, *saved, packed, *folded, index, *static, True, True),
        lambda: library.adapter_backward(out, x, saved[0][:2], *saved[1:], packed, *folded, index, *static, True, True),
        lambda: library.adapter_backward(
            out, x, saved[0], saved[1][:1], *saved[2:], packed, *folded, index, *static, True, True
        ),
        lambda: library.adapter_backward(out, x, *saved, packed[:, :-1], *folded, index, *static, True, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()
