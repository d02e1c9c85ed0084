"""Our kernels' own times, and the whole passes of an adapter and of a stack beside a copy.

A kernel's time is from the profiler, over calls with buffers that take turns. A pass' time is from a CUDA graph. What a
replay of the graph wrote is compared with float64, and a pass that is wrong has no time.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from timing import relative_error, tolerance
from torch import Tensor

from hyperformer_fast import backends, graph_timing, ops, reference
from hyperformer_fast.layout import AdapterLayout

LAYOUT, ACTIVATION = AdapterLayout(768, 24), "gelu_new"
TASKS, SITES, EMBEDDING, LENGTH = 8, 24, 64, 128
#: Our kernels in the names that the profiler reports, of either backend; another kernel keeps the start of its name.
KERNEL, START = re.compile(r"\b([a-z_]+)_kernel\b"), 60


class Work(NamedTuple):
    """An adapter and its rows: of ``one`` task, or of eight in shares that :func:`task_index` names."""

    N: int
    dtype: torch.dtype
    tasks: str = "one"

    def __str__(self) -> str:
        return f"N={self.N}, {str(self.dtype).removeprefix('torch.')}, tasks: {self.tasks}"


WORKS = (
    Work(4096, torch.bfloat16),
    Work(4096, torch.bfloat16, "even"),
    Work(4096, torch.bfloat16, "uneven"),
    Work(4096, torch.bfloat16, "one of eight"),
    Work(4096, torch.float32),
    Work(1024, torch.bfloat16),
    Work(16384, torch.bfloat16),
    Work(65536, torch.bfloat16),
    Work(16384, torch.float32),
)


def task_index(tasks: str, B: int, device: str) -> Tensor | None:
    """The task of each of B samples; ``uneven`` gives all tasks but one a single sample."""
    index = {
        "one": None,
        "even": torch.arange(B) % TASKS,
        "uneven": (torch.arange(B) - (B - TASKS)).clamp(min=0),
        "one of eight": torch.full((B,), 3),
    }[tasks]
    return None if index is None else index.to(device)


class Adapter:
    """The calls of one ``Work`` with the backend that is chosen, each on buffers of its own.

    Args:
        work: the rows.
        device: where they are.
        buffers: how many calls; None for as many as take turns beyond the L2 cache.
    """

    def __init__(self, work: Work, device: str, buffers: int | None = None):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        B = max(1, work.N // LENGTH)
        T = 1 if work.tasks == "one" else TASKS
        self.x, self.g = (draw(B, work.N // B, LAYOUT.d).to(work.dtype).to(device) for _ in range(2))
        self.packed = (draw(T, LAYOUT.numel) * 0.05).to(device)
        LAYOUT.unpack(self.packed)["post_gamma"].add_(1)
        self.index = task_index(work.tasks, B, device)
        self.size = self.x.numel() * self.x.element_size()
        folded = ops.fold(self.packed, LAYOUT, work.dtype)
        packed = self.packed.clone().requires_grad_()

        def on_buffers(x: Tensor, g: Tensor) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [ops.adapter(x, packed, LAYOUT, ACTIVATION, folded, self.index)]

            def both() -> list[Tensor]:
                out = ops.adapter(x, packed, LAYOUT, ACTIVATION, folded, self.index)
                return [out.detach(), *torch.autograd.grad(out, (x, packed), g)]

            return forward, both

        count = buffers or graph_timing.buffers(self.size, device)
        pairs = [on_buffers(self.x.clone().requires_grad_(), self.g.clone()) for _ in range(count)]
        self.calls = {"forward": [pair[0] for pair in pairs], "both": [pair[1] for pair in pairs]}

    def truth(self) -> list[Tensor]:
        """out, dx and dpacked in float64."""
        x, packed = self.x.double().requires_grad_(), self.packed.double().requires_grad_()
        out = reference.adapter(x, packed, LAYOUT, ACTIVATION, self.index)
        return [out.detach(), *torch.autograd.grad(out, (x, packed), self.g.double())]

    def copies(self) -> list[Callable[[], Tensor]]:
        """Copies of x into fresh memory: the rate that a pass is compared with."""
        count = graph_timing.buffers(self.size, self.x.device)
        return [lambda x=x: torch.empty_like(x).copy_(x) for x in [self.x.clone() for _ in range(count)]]


class Stack:
    """The calls that generate and fold the adapters of a whole stack."""

    def __init__(self, tasks: int, device: str, sites: int = SITES):
        generator = torch.Generator().manual_seed(0)
        self.E, self.G, self.g0 = (
            torch.randn(shape, generator=generator).to(device) * scale
            for shape, scale in (
                ((1, sites * tasks, EMBEDDING), 1.0),
                ((1, LAYOUT.numel, EMBEDDING), 0.01),
                ((1, LAYOUT.numel), 0.05),
            )
        )
        self.packed = ops.generate_weights(self.E, self.G, self.g0)[0].view(sites, tasks, -1)
        self.calls = {
            "generate": [lambda: [ops.generate_weights(self.E, self.G, self.g0)]],
            "fold": [lambda: list(ops.fold(self.packed, LAYOUT, torch.bfloat16))],
        }

    def truth(self, what: str) -> list[Tensor]:
        if what == "generate":
            return [reference.generate_weights(self.E.double(), self.G.double(), self.g0.double())]
        return list(reference.fold(self.packed.double(), LAYOUT, torch.float64))


def entries(options: SimpleNamespace) -> Iterator[dict]:
    """The times of each ``Work`` and of a stack, by ``options.backend``."""
    device, rounds = options.device, 1 if options.dry_run else 9
    backend = "cpu" if options.dry_run else options.backend
    support = backends.registry.get(backend).availability()
    if not support:
        yield {"line": f"{backend} is not available: {support.reason}", "absent": {backend: support.reason}}
        return
    works = [Work(130, torch.float32), Work(256, torch.bfloat16, "even")] if options.dry_run else WORKS
    with backends.use_backend(backend):
        for work in works:
            yield {"backend": backend, **timed_adapter(work, device, rounds)}
        for tasks in (1, TASKS):
            yield {"backend": backend, **timed_stack(tasks, device, rounds, 2 if options.dry_run else SITES)}


def timed_adapter(work: Work, device: str, rounds: int) -> dict:
    adapter = Adapter(work, device)
    truth, names = adapter.truth(), ("out", "dx", "dpacked")
    times, wrong = {}, {}
    for what, calls in adapter.calls.items():
        recorded = graph_timing.record(calls, device)
        times[what] = graph_timing.median_seconds(recorded, rounds)
        wrong |= compare(what, names, recorded.results[-1], truth, tolerance(work.dtype))
    copy = graph_timing.median_seconds(graph_timing.record(adapter.copies(), device), rounds)
    entry = {
        "kind": "adapter", "N": work.N, "dtype": str(work.dtype).removeprefix("torch."), "tasks": work.tasks,
        "copy_seconds": copy,
    }  # fmt: skip
    if wrong:
        return {"line": f"{work}: wrong", **entry, "wrong": wrong}
    # a forward reads x and writes out, as a copy does; a backward reads g and x and writes dx besides
    shares = {"forward": copy / times["forward"], "both": 2.5 * copy / times["both"]}
    parts = kernel_times(adapter.calls["both"], device)
    shown = {what: f"{1e6 * t:.1f} us, {100 * shares[what]:.0f} % of a copy" for what, t in times.items()}
    return {
        "line": f"{work}: forward {shown['forward']}; with the backward {shown['both']}; {in_words(parts)}",
        **entry,
        "seconds": times,
        **{f"{what}_of_copy_bandwidth": share for what, share in shares.items()},
        **parts,
    }


def timed_stack(tasks: int, device: str, rounds: int, sites: int) -> dict:
    stack = Stack(tasks, device, sites)
    times, wrong = {}, {}
    for what, calls in stack.calls.items():
        recorded = graph_timing.record(calls, device)
        times[what] = graph_timing.median_seconds(recorded, rounds)
        names = (what,) if what == "generate" else ("wd", "wg", "vectors", "scale", "root", "mean")
        wrong |= compare(what, names, recorded.results[-1], stack.truth(what), tolerance(torch.bfloat16))
    entry = {"kind": "stack", "sites": sites, "tasks": tasks}
    label = f"{sites} sites x {tasks} tasks"
    if wrong:
        return {"line": f"{label}: wrong", **entry, "wrong": wrong}
    parts = kernel_times([call for calls in stack.calls.values() for call in calls], device)
    shown = ", ".join(f"{what} {1e6 * t:.1f} us" for what, t in times.items())
    return {"line": f"{label}: {shown}; {in_words(parts)}", **entry, "seconds": times, **parts}


def compare(what: str, names: tuple, mine: list[Tensor], truth: list[Tensor], allowed: float) -> dict[str, str]:
    """What is off by more than ``allowed`` relative to float64, in words."""
    errors = {name: relative_error(a, b) for name, a, b in zip(names, mine, truth) if b.numel()}
    return {
        f"{what}: {name}": f"off by {error:.1e} relative to float64"
        for name, error in errors.items()
        if not error <= allowed
    }


def kernel_times(calls: list[Callable[[], object]], device: str) -> dict:
    """``kernel_us``: mean microseconds of each kernel per call; or why the profiler says nothing."""
    if not device.startswith("cuda"):
        return {"kernel_us": {}}
    turns = -(-graph_timing.LAUNCHES // len(calls))
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in itertools.chain.from_iterable([calls] * turns):
                call()
            torch.cuda.synchronize()
        times: dict[str, float] = defaultdict(float)
        for event in profile.key_averages():
            if event.self_device_time_total:
                name = KERNEL.search(event.key)
                times[name[1] if name else event.key[:START]] += event.self_device_time_total / (turns * len(calls))
    except (RuntimeError, AssertionError) as error:  # without CUPTI the times of the passes are still there
        return {"kernel_us": {}, "absent": {"profiler": str(error)}}
    return {"kernel_us": dict(times)}


def in_words(parts: dict) -> str:
    return ", ".join(f"{name} {us:.1f}" for name, us in parts["kernel_us"].items()) or "no kernels' times"
