"""The training step of a T5-base: without adapters, with adapters in eager PyTorch, and with ours.

Each is called eagerly, with the host's time, and recorded as one CUDA graph. The loss of the first step and the
gradient of the largest trained weight are compared with those of the eager adapters: only in bfloat16, so the
comparison finds what is grossly wrong; the other parts look closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from small import ours
from step import BARE, Step
from timing import interleaved, relative_error, seconds
from torch import Tensor

from hyperformer_fast import graph_timing

EAGER = "reference"
#: Relative errors that are allowed of the loss and of the gradient, between two orders of rounding in bfloat16.
LOSS_OFF, GRADIENT_OFF = 1e-2, 0.15


def first(step: Step) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the largest trained weight, before anything was trained."""
    loss = step.backward()
    gradient = max(step.trained, key=Tensor.numel).grad.clone()
    step.optimiser.zero_grad()
    return loss, gradient


def entries(options: SimpleNamespace) -> Iterator[dict]:
    """Three steps at least: one line each for the eager calls and for the graph."""
    device, dry = options.device, options.dry_run
    size, layers, B, L = ("T5-small", 1, 8, 8) if dry else ("T5-base", 12, 32, 128)
    dtype, rounds = (torch.float32, 1) if dry else (torch.bfloat16, 9)
    steps, expected, wrong = {}, None, {}
    for name in (EAGER, BARE, *ours(device)):
        steps[name] = Step(size, layers, B, L, name, device, dtype)
        if name == BARE:
            continue
        loss, gradient = first(steps[name])
        if name == EAGER:
            expected = loss, gradient
            continue
        for what, mine, theirs, allowed in zip(
            ("the loss", "a gradient"), (loss, gradient), expected, (LOSS_OFF, GRADIENT_OFF)
        ):
            error = relative_error(mine, theirs)
            if not error <= allowed:
                wrong[name] = f"{what} of the first step is off by {error:.1e} relative to the eager adapters'"
    for name in wrong:
        del steps[name]
    where = f"{size}, {layers}+{layers} layers, B={B}, L={L}, {str(dtype).removeprefix('torch.')}"
    yield told(f"{where}, called", interleaved(steps, rounds), wrong)
    if not device.startswith("cuda"):
        return
    for name, step in steps.items():
        try:
            recorded = graph_timing.record([step], device, least=1)
            recorded.replay()
            times = {name: sorted(seconds(recorded, 1) for _ in range(rounds))[rounds // 2]}
        except RuntimeError as error:
            yield {
                "line": f"{where}, as one graph: {name} cannot be recorded",
                "absent": {f"graph of {name}": str(error)},
            }
        else:
            yield told(f"{where}, as one graph", times, {})


def told(label: str, times: dict[str, float], wrong: dict[str, str]) -> dict:
    times = {"eager adapters" if name == EAGER else name: t for name, t in times.items()}
    shown = ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in times.items())
    entry = {"line": f"{label}: {shown}", "label": label, "seconds": times}
    return {**entry, "wrong": wrong} if wrong else entry
