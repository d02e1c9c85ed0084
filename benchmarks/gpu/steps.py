"""The training step of a T5-base: without adapters, with adapters in eager PyTorch, and with ours, fused and not.

Each is called eagerly, with the host's time, and recorded as one CUDA graph; its launches are counted. Without dropout
the loss of the first step and the gradient of the largest trained weight are compared with those of eager PyTorch: only
in bfloat16, so the comparison finds what is grossly wrong; the other parts look closely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from small import ours
from step import BARE, Step
from timing import interleaved, relative_error, seconds
from torch import Tensor

from hyperformer_fast import graph_timing

EAGER = "reference"
DROPOUT = 0.1
#: Relative errors that are allowed of the loss and of the gradient, between two orders of rounding in bfloat16.
LOSS_OFF, GRADIENT_OFF = 1e-2, 0.15


def first(step: Step) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the largest trained weight, before anything was trained."""
    loss = step.backward()
    gradient = max(step.trained, key=Tensor.numel).grad.clone()
    step.optimiser.zero_grad()
    return loss, gradient


def rows(device: str) -> dict[str, tuple[str, object]]:
    """Backend and fusion of each step: bare, with eager adapters and with ours, and with everything else fused, too."""
    names = (BARE, *ours(device))
    return {EAGER: (EAGER, False)} | {n: (n, False) for n in names} | {f"{n}, fused": (n, "auto") for n in names}


def check(make: Callable[..., Step], chosen: dict[str, tuple[str, object]]) -> dict[str, str]:
    """Which steps are wrong, and how: all without dropout, whose masks differ."""
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    wrong = {}
    for name, (backend, fuse) in chosen.items():
        found = first(make(backend, fuse, 0.0))
        truth = expected.setdefault(BARE if backend == BARE else EAGER, found)
        for what, mine, theirs, allowed in zip(("the loss", "a gradient"), found, truth, (LOSS_OFF, GRADIENT_OFF)):
            error = relative_error(mine, theirs)
            if not error <= allowed:
                wrong[name] = f"{what} of the first step is off by {error:.1e} relative to eager PyTorch's"
    return wrong


def launches(step: Step) -> int:
    """How many kernels and copies a step launches on the GPU."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.self_device_time_total)


def entries(options: SimpleNamespace) -> Iterator[dict]:
    """All steps with dropout: one line each for the eager calls, for the graphs and for the launches."""
    device, dry = options.device, options.dry_run
    size, layers, B, L = ("T5-small", 1, 8, 8) if dry else ("T5-base", 12, 32, 128)
    dtype, rounds = (torch.float32, 1) if dry else (torch.bfloat16, 9)

    def make(backend: str, fuse: object, dropout: float) -> Step:
        return Step(size, layers, B, L, backend, device, dtype, fuse=fuse, dropout=dropout)

    chosen = rows(device)
    wrong = check(make, chosen)
    steps = {name: make(*chosen[name], DROPOUT) for name in chosen if name not in wrong}
    where = f"{size}, {layers}+{layers} layers, B={B}, L={L}, {str(dtype).removeprefix('torch.')}, dropout {DROPOUT}"
    yield told(f"{where}, called", interleaved(steps, rounds), wrong)
    if not device.startswith("cuda"):
        return
    try:
        counts = {name: launches(step) for name, step in steps.items()}
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield {"line": f"{where}, launches per step: {shown}", "launches": counts}
    except (RuntimeError, AssertionError) as error:  # without CUPTI the times are still there
        yield {"line": f"{where}: launches cannot be counted", "absent": {"profiler": str(error)}}
    times = {}
    for name, step in steps.items():
        try:
            recorded = graph_timing.record([step], device, least=1)
            recorded.replay()
            times[name] = sorted(seconds(recorded, 1) for _ in range(rounds))[rounds // 2]
        except RuntimeError as error:
            yield {
                "line": f"{where}, as one graph: {name} cannot be recorded",
                "absent": {f"graph of {name}": str(error)},
            }
    if times:
        yield told(f"{where}, as one graph", times, {})


def told(label: str, times: dict[str, float], wrong: dict[str, str]) -> dict:
    """An entry: the times, and their ratios to the bare step's."""
    ratios = {name: t / times[BARE] for name, t in times.items()} if BARE in times else {}
    names = {EAGER: "eager adapters"}
    shown = ", ".join(
        f"{names.get(name, name)} {1e3 * t:.2f} ms" + (f" ({ratios[name]:.3f}x bare)" if ratios else "")
        for name, t in times.items()
    )
    entry = {
        "line": f"{label}: {shown}", "label": label,
        "seconds": {names.get(name, name): t for name, t in times.items()},
        "over_bare": {names.get(name, name): ratio for name, ratio in ratios.items()},
    }  # fmt: skip
    return {**entry, "wrong": wrong} if wrong else entry
