"""Measure one group of the step profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from components import peak_bytes, shares
from memory import saved_bytes
from step_cases import COMPILED, DTYPES, FORWARD, GENERATE, ROWS, TRAINING, Case
from step_models import BARE, ORIGINAL, Step
from timing import relative_error, turns
from torch import Tensor

from hyperformer_fast.parameters import T5_SHAPES

#: The gradient that is compared: every block's derivative is in it.
PROBE = "encoder.block.0.layer.0.layer_norm.weight"
#: Relative errors that are allowed of the loss and of that gradient. A unit of a relu that rounding carries over zero
#: changes the gradient by some 1e-3: one of T5-small's by 6.5e-4, which float64 with the same signs gives to 1e-6. Of
#: fewer units one counts for more: see :func:`allowed`.
OFF = {torch.float32: (1e-5, 5e-3), torch.bfloat16: (1e-2, 0.15)}


def build(case: Case, row: str) -> Step:
    """The row's model, not compiled yet."""
    backend, fuse = ROWS[row.removesuffix(COMPILED)]
    return Step(
        case.size, case.layers, case.B, case.L, backend, dtype=getattr(torch, DTYPES[case.dtype]), fuse=fuse,
        variant=case.variant, dropout=case.dropout, targets=case.targets, vocabulary=case.vocabulary, use_cache=True,
        fused_optimiser=True,
    )  # fmt: skip


def probe(step: Step, case: Case, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The loss and a gradient of two samples of one task, without dropout.

    Args:
        backend: the backend in place of the step's own.
    """
    step.model.train(case.action == TRAINING and case.dropout == 0)
    before, step.backend = step.backend, backend or step.backend
    with step.few(min(2, case.B), task=0):
        loss = step.backward()
    step.backend = before
    gradient = next(p for name, p in step.model.named_parameters() if name.endswith(PROBE)).grad.clone()
    step.optimiser.zero_grad()
    step.model.train(case.action == TRAINING)
    return loss, gradient


def allowed(case: Case) -> tuple[float, float]:
    """The relative errors that are allowed in a case: of the gradient at least that of four units of a relu."""
    loss, gradient = OFF[getattr(torch, DTYPES[case.dtype])]
    units = min(2, case.B) * case.L * T5_SHAPES[case.size]["d_ff"]
    return loss, max(gradient, 4 * units**-0.5)


def wrong(step: Step, case: Case, truth: tuple[Tensor, Tensor]) -> str:
    """What of the row differs from the truth; empty if nothing does."""
    for what, mine, theirs, most in zip(("the loss", "a gradient"), probe(step, case), truth, allowed(case)):
        error = relative_error(mine, theirs)
        if not error <= most:
            return f"{what} is off by {error:.1e}"
    return ""


def prepared(case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    """The rows that can be timed, and what is wrong with the others."""
    rows, errors, truths = {}, {}, {}
    for row in case.all_rows:
        plain = row.removesuffix(COMPILED)
        step = build(case, row)
        adapted = ROWS[plain][0] != BARE
        if adapted not in truths:
            truths[adapted] = _truth(step, case, adapted)
        if why := wrong(step, case, truths[adapted]):
            errors[row] = why
            continue
        if row.endswith(COMPILED):
            step.model.compile()
        rows[row] = step
    return rows, errors


def _truth(step: Step, case: Case, adapted: bool) -> tuple[Tensor, Tensor]:
    if not adapted:
        return probe(step, case)
    # the authors' adapters and fused ones are compared with ours on the reference backend
    plain = step if step.backend == "reference" else build(case, "reference")
    return probe(plain, case, "reference")


def call_of(step: Step, case: Case) -> Callable[[], object]:
    return {TRAINING: step, FORWARD: step.forward, GENERATE: lambda: step.generate(case.targets)}[case.action]


def first_calls(calls: dict[str, Callable[[], object]]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The calls that ran once, and why the others did not. Only what is compiled may fail."""
    ran, absent = {}, {}
    for row, call in calls.items():
        try:
            call()
        except Exception as error:
            if not row.endswith(COMPILED):
                raise
            absent[row] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            ran[row] = call
    return ran, absent


def measure(case: Case, seconds: float | None, rounds: int) -> dict:
    """Time the rows of a case.

    Args:
        seconds: how long all of it may take; None: as long as ``rounds`` take.
        rounds: the least number of turns.
    """
    start = time.perf_counter()
    rows, errors = prepared(case)
    calls, absent = first_calls({row: call_of(step, case) for row, step in rows.items()})
    components, memory = {}, {}
    if case.action == TRAINING and not case.compiled:
        memory = {row: _memory(rows[row]) for row in calls}
        memory = {row: {kind: n / memory[BARE][kind] for kind, n in found.items()} for row, found in memory.items()}
        components = {row: shares(call, warm=0) for row, call in calls.items() if row != ORIGINAL}
    times = turns(calls, rounds, until=None if seconds is None else start + seconds)
    found = {row: ratios(times[row], times[BARE]) for row in calls}
    return {
        "rows": found,
        "rounds": len(times[BARE]),
        "components": {
            row: {part: share * found[row]["ratio"] for part, share in parts.items()}
            for row, parts in components.items()
        },
        "memory": memory,
        "absent": absent,
        **({"wrong": errors} if errors else {}),
    }


def ratios(mine: list[float], bare: list[float]) -> dict[str, float | list[float]]:
    """The median and the quartiles of a row's time over the bare T5's, round by round."""
    each = [a / b for a, b in zip(mine, bare)]
    low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {"ratio": median(each), "quartiles": [low, high]}


def _memory(step: Step) -> dict[str, int]:
    own = [*step.model.parameters(), *step.model.buffers()]
    return {"saved": saved_bytes(step.loss, own), "peak": peak_bytes(step)}
