"""Time what an adapter costs the host: the thread's CPU time of a call, on a machine without a GPU.

    python benchmarks/host.py [--rounds 15] [--quick] [--output DIR]

The Triton kernels are compiled for sm_90 and never launched (stub_gpu.py), so what is left is Python, PyTorch and
Triton's run time. "site" is one call of ``ops.adapter``, "stack" one of 24 sites as the model runs them: what is done
once per stack, as the fold, counts by its 24th part. "eager" is a plain module adapter with weights of its own, on
tensors so small that only overhead is left; so is the C++ library's path. With another Triton: PYTHONPATH=DIR of
``pip install --no-deps --target DIR triton==3.6.0``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from providers import ACTIVATION
from stub_gpu import stub_gpu
from timing import arguments, machine, show, write
from torch import Tensor

from hyperformer_fast import backends, ops
from hyperformer_fast.backends import registry
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.sites import StackWeights

#: Narrow, because on a CPU filling memory takes the thread's time, and on a GPU it does not.
LAYOUT = AdapterLayout(64, 16)
SITES, TASKS, SAMPLES = 24, 8, 8


def microseconds(call: Callable[[], object], rounds: int, repeats: int = 200) -> float:
    """The median over ``rounds`` of the thread's CPU time of ``call``, in microseconds."""
    for _ in range(20):
        call()
    times = []
    gc.collect()
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        times.append((time.thread_time() - start) / repeats * 1e6)
    return median(times)


class Module(torch.nn.Module):
    """The rival: an adapter with weights of its own, in PyTorch's operators."""

    def __init__(self, d: int, b: int):
        super().__init__()
        self.down, self.up, self.norm = torch.nn.Linear(d, b), torch.nn.Linear(b, d), torch.nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.up(F.gelu(self.down(x), approximate="tanh")))


def eager_calls() -> dict[str, Callable[[], object]]:
    """The rival's calls by name."""
    module = Module(8, 2).bfloat16()
    x = torch.randn(1, 8).bfloat16().requires_grad_()
    g = torch.randn_like(x)
    wanted = [x, *module.parameters()]
    return {
        "site, forward": lambda: module(x),
        "site, forward and backward": lambda: torch.autograd.grad(module(x), wanted, g),
    }


def our_calls(layout: AdapterLayout, tasks: int, mixed: bool, N: int) -> dict[str, Callable[[], object]]:
    """Our calls by name, with the backend that is in force.

    Args:
        layout: of the adapters.
        tasks: T.
        mixed: whether every sample has a task of its own.
        N: rows of a sample.
    """
    whole = (torch.randn(SITES, tasks, layout.numel) * 0.05).requires_grad_()
    packed = whole.detach()[0].clone().requires_grad_()
    x = torch.randn(SAMPLES, N, layout.d).bfloat16().requires_grad_()
    g = torch.randn_like(x)
    index = torch.arange(SAMPLES) % tasks if mixed else None
    folded = ops.fold(packed, layout, x.dtype)
    net = SimpleNamespace(layout=layout, num_layers=SITES // 2)

    def site() -> Tensor:
        return ops.adapter(x, packed, layout, ACTIVATION, folded, index)

    def stack() -> Tensor:
        weights, h = StackWeights(net, whole, ACTIVATION), x
        for number in range(SITES):
            h = weights.adapt(h, number, index)
        return h

    return {
        "site, forward": site,
        "site, forward and backward": lambda: torch.autograd.grad(site(), (x, packed), g),
        "stack, forward": stack,
        "stack, forward and backward": lambda: torch.autograd.grad(stack(), (x, whole), g),
    }


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds per site of each call."""
    return {
        name: microseconds(call, rounds, 10) / SITES if name.startswith("stack") else microseconds(call, rounds)
        for name, call in calls.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds per site, by what computes and by call."""
    with one_thread():
        found = {"eager": timed(eager_calls(), rounds)}
        with stub_gpu(), backends.use_backend("triton"):
            found["triton, one task"] = timed(our_calls(LAYOUT, 1, False, 4), rounds)
            found["triton, mixed tasks"] = timed(our_calls(LAYOUT, TASKS, True, 4), rounds)
        if backends.explain("adapter_forward", impl="cpu").chosen:
            small = AdapterLayout(8, 2)
            with backends.use_backend("cpu"):
                found["C++, one task"] = timed(our_calls(small, 1, False, 1), rounds)
                found["C++, mixed tasks"] = timed(our_calls(small, TASKS, True, 1), rounds)
                with mock.patch.dict(registry.get("cpu").__dict__, nodes=None):
                    found["C++, autograd in Python"] = timed(our_calls(small, 1, False, 1), rounds)
    return found


def main() -> None:
    options = arguments(__doc__, quick="two rounds").parse_args()
    rounds = 2 if options.quick else options.rounds
    where = machine() | {"triton": triton.__version__}
    found = measure(rounds)
    eager = found["eager"]["site, forward and backward"]
    names = list(found["triton, one task"])
    rows = [(name, *(round(times[n], 1) if n in times else "-" for n in names)) for name, times in found.items()]
    rows = [(*(str(cell) for cell in row), eager and found[row[0]].get(names[-1], eager) / eager) for row in rows]
    title = f"Host time, us per site, Triton {triton.__version__}"
    show(title, where, ("by", *names, "the last over eager"), rows)
    write(f"host-triton{triton.__version__}", where, found, options.output)


if __name__ == "__main__":
    main()
