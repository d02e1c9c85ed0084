"""The self-test of a backend: its ops on an adapter, and on pieces of a T5, are compared with the reference in float64.

The shapes are as small as they can be while every loop of the kernels takes more than one turn: a row is longer than a
vector, a tile and what one call of the dropout draws; there are more rows than a block or a thread's part has; in every
dtype some row ends within a vector, of whatever length; and bias and mask differ between samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..layout import NO_DROPOUT, AdapterLayout, AdapterSpec, Dropout, Folded, accumulator_dtype
from .base import Backend
from .pieces import PIECE_OPS
from .reference import ReferenceBackend

#: The largest error that is allowed, relative to the largest absolute value of the float64 result. The errors of
#: correct kernels are below half of it, and in float32 below 1e-6.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

#: In each dtype of the kernels, adapters. Rows of the first one in float32 and float16 start at multiples of 16 bytes;
#: those of the others do not, and end within a vector even of the shortest kind.
SPEC = AdapterSpec(AdapterLayout(296, 12), "gelu_new")
_SPECS = {
    torch.float32: (SPEC, AdapterSpec(AdapterLayout(275, 5, pre_norm=True), "silu")),
    torch.bfloat16: (AdapterSpec(AdapterLayout(278, 7, pre_norm=True), "silu"),),
    torch.float16: (AdapterSpec(AdapterLayout(264, 8), "gelu"), AdapterSpec(AdapterLayout(275, 5), "gelu_new")),
}
#: Task 1 has more rows than a block of the CPU's kernels.
_TASKS, _ROWS = (0, 1, -1, 1), 40

_EPS = 1e-6

_Random = Callable[..., Tensor]
_Results = Mapping[str, Sequence[Tensor]]


def errors(backend: Backend, dtype: torch.dtype = torch.float32, spec: AdapterSpec = SPEC) -> dict[str, float]:
    """Compute the error of each op that ``backend`` serves.

    Args:
        backend: the backend, which need be neither registered nor available.
        dtype: the dtype of x.
        spec: the adapter.

    Returns:
        For each op, the largest absolute error divided by the largest absolute value of the float64 result.
    """
    mine, truth = (
        {**_adapter_results(each, kind, spec, backend), **_piece_results(each, kind, backend)}
        for each, kind in ((backend, dtype), (ReferenceBackend(), torch.float64))
    )
    return _errors(mine, truth)


def faults(backend: Backend) -> list[str]:
    """Test ``backend`` in every dtype of the kernels. Returns a sentence for each op whose results are wrong."""
    found = []
    of_pieces = _piece_results(ReferenceBackend(), torch.float64, backend)  # the same for all dtypes
    for dtype, specs in _SPECS.items():
        compared = [(_piece_results(backend, dtype, backend), of_pieces)]
        compared += [
            (
                _adapter_results(backend, dtype, spec, backend),
                _adapter_results(ReferenceBackend(), torch.float64, spec, backend),
            )
            for spec in specs
        ]
        wrong: dict[str, float] = {}
        for mine, truth in compared:
            for op, error in _errors(mine, truth).items():
                wrong[op] = max(error, wrong.get(op, 0.0))
        name = str(dtype).removeprefix("torch.")
        found += [
            f"{op} in {name} is off by {error:.1e}, more than {TOLERANCE[dtype]:.0e}"
            for op, error in wrong.items()
            if error > TOLERANCE[dtype]
        ]
    return found


def _errors(mine: _Results, truth: _Results) -> dict[str, float]:
    return {op: max(map(_error, mine[op], truth[op])) for op in truth}


def _error(mine: Tensor, truth: Tensor) -> float:
    if mine.shape != truth.shape:
        return math.inf
    error = ((mine - truth).abs().max() / truth.abs().max()).item() if truth.numel() else 0.0
    return math.inf if math.isnan(error) else error  # max() of Python takes a NaN only where it comes first


def _inputs(tested: Backend, dtype: torch.dtype) -> _Random:
    """A function that draws tensors of a shape, which are the same for every dtype."""
    generator, device = torch.Generator().manual_seed(0), tested.device or "cpu"

    def random(*shape: int) -> Tensor:
        # The float64 reference gets inputs that are rounded to bfloat16, too, so that only the arithmetic causes
        # errors.
        values = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
        return values.to(torch.bfloat16).to(device, dtype)

    return random


def _adapter_results(backend: Backend, dtype: torch.dtype, spec: AdapterSpec, tested: Backend) -> _Results:
    """What ``backend`` returns for those of the adapter's ops that ``tested`` serves."""
    served, random, layout = tested.serves, _inputs(tested, dtype), spec.layout
    x, g = random(len(_TASKS), _ROWS, layout.d), random(len(_TASKS), _ROWS, layout.d)
    weights = accumulator_dtype(x.dtype)
    packed = (random(2, layout.numel) * 0.1).to(torch.bfloat16).to(weights)
    E, G, g0 = packed[:, :5], random(layout.numel, 5).to(weights), packed[0]
    index = torch.tensor(_TASKS, device=x.device)
    folded = backend.fold(packed, layout, x.dtype)
    out, saved = backend.adapter_forward(x, folded, spec, index, True)
    prepared, few = backend.prepare([folded], spec), out[:, :2]
    if prepared is not None:
        few = backend.site_call(prepared[0], -1).adapter(x[:, :2], index)
    results: dict[str, Sequence[Tensor]] = {
        "generate_weights": (backend.generate_weights(E[None], G[None], g0[None]),),
        "fold": (folded.root,),
        "adapter_forward": (out, few),
        "adapter_backward": backend.adapter_backward(g, x, saved, packed, folded, spec, index, True, True),
        "hyper_adapter": (backend.hyper_adapter(x, E, G, g0, spec, index, False)[0],),
    }
    if "adapter_residual_forward" in served:
        results["adapter_residual_forward"] = _adapter_residual_results(backend, random, x, folded, spec, index)
    return {op: results[op] for op in served if op in results}


def _adapter_residual_results(
    backend: Backend, random: _Random, x: Tensor, folded: Folded, spec: AdapterSpec, index: Tensor
) -> Sequence[Tensor]:
    # A wide weight, so that the normed sum is not rounded: residual_forward's test has one that is not wide.
    hidden, weight = random(*x.shape), random(spec.layout.d).to(accumulator_dtype(x.dtype))
    dropout = Dropout(0.25, torch.tensor([-7], device=x.device), 0)
    out, _, normed, rstd = backend.adapter_residual_forward(hidden, x, folded, spec, index, dropout, weight, _EPS, True)
    return out, normed, rstd


def _piece_results(backend: Backend, dtype: torch.dtype, tested: Backend) -> _Results:
    """What ``backend`` returns for those of the pieces' ops that ``tested`` serves."""
    random, served = _inputs(tested, dtype), [op for op in tested.serves if op in PIECE_OPS]
    results: dict[str, Sequence[Tensor]] = {}
    if served:
        dropout = Dropout(0.25, torch.tensor([0x123456789ABCDEF], device=tested.device or "cpu"), 1)
        for piece in (_residual_results, _act_dropout_results, _attention_results, _cross_entropy_results):
            results |= piece(backend, random, dropout, served)
    return results


def _residual_results(
    backend: Backend, random: _Random, dropout: Dropout, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    shape, n = (3, 30, 203), 203
    hidden, y, g_out, g_normed, weight = random(*shape), random(*shape), random(*shape), random(*shape), random(n)
    wide = weight.to(accumulator_dtype(weight.dtype))
    results: dict[str, Sequence[Tensor]] = {}
    if "residual_forward" in served:
        summed = backend.residual_forward(hidden, y, dropout, weight, _EPS, True)
        normed = backend.residual_forward(None, y, NO_DROPOUT, wide, _EPS, True)
        results["residual_forward"] = (
            *summed,
            *normed[1:],
            backend.residual_forward(hidden, y, dropout, None, 0, True)[0],
        )
    if "residual_backward" in served:
        # The forward's results come from the reference, so that each op is tested by itself.
        out, _, rstd = ReferenceBackend().residual_forward(hidden, y, dropout, weight, _EPS, True)
        first = backend.residual_backward(g_out, g_normed, out, weight, rstd, dropout, True, True)
        g_wide = g_normed.to(wide.dtype)
        second = backend.residual_backward(None, g_wide, out, wide, rstd, NO_DROPOUT, True, True)
        results["residual_backward"] = (*first, second[0], second[2])
    return results


def _act_dropout_results(
    backend: Backend, random: _Random, dropout: Dropout, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    shape = (3, 5, 1101)
    a, c, g = random(*shape), random(*shape), random(*shape)
    results: dict[str, Sequence[Tensor]] = {}
    cases: Sequence[tuple[Tensor | None, str]] = ((None, "relu"), (c, "gelu_new"))
    if "act_dropout_forward" in served:
        results["act_dropout_forward"] = [backend.act_dropout_forward(a, c, act, dropout) for c, act in cases]
    if "act_dropout_backward" in served:
        results["act_dropout_backward"] = [
            gradient for c, act in cases for gradient in backend.act_dropout_backward(g, a, c, act, dropout)
        ]
    return results


def _attention_results(
    backend: Backend, random: _Random, dropout: Dropout, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    B, H, queries, keys, width = 2, 2, 260, 71, 8
    q, k, v = random(B, H, queries, width) * 0.25, random(B, H, keys, width), random(B, H, keys, width)
    g, scores, g_scores = random(B, H, queries, width), random(B, H, queries, keys), random(B, H, queries, keys)
    attended = torch.ones(B, 1, 1, keys, dtype=torch.bool, device=q.device)
    attended[1, ..., 45:] = False
    # A bias for all samples with a mask of booleans, and one for each sample with a mask to add.
    bias, bias_of_samples = random(1, H, queries, keys), random(B, H, queries, keys)
    added = torch.where(attended, 0.0, -1e4).to(q.dtype)
    results: dict[str, Sequence[Tensor]] = {}
    _, probabilities = ReferenceBackend().softmax_dropout_forward(scores, bias, attended, dropout, True)
    if "softmax_dropout_forward" in served:
        results["softmax_dropout_forward"] = (
            *backend.softmax_dropout_forward(scores, bias, attended, dropout, True),
            *backend.softmax_dropout_forward(scores, bias_of_samples, added, dropout, True),
        )
    if "softmax_dropout_backward" in served:
        results["softmax_dropout_backward"] = (backend.softmax_dropout_backward(g_scores, probabilities, dropout),)
    if "attention_forward" in served:
        results["attention_forward"] = (
            *backend.attention_forward(q, k, v, bias, attended, 1.0, dropout, True),
            *backend.attention_forward(q, k, v, bias_of_samples, added, 0.5, dropout, True),
        )
    if "attention_backward" in served:
        results["attention_backward"] = (
            *backend.attention_backward(g, q, k, v, probabilities, 1.0, dropout, bias.shape),
            backend.attention_backward(g, q, k, v, probabilities, 0.5, dropout, bias_of_samples.shape)[3],
        )
    return results


def _cross_entropy_results(
    backend: Backend, random: _Random, dropout: Dropout, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    if "cross_entropy_forward" not in served:
        return {}
    logits = random(5, 5003)
    labels = torch.tensor([0, 5002, -100, 7, 4097], device=logits.device)
    return {"cross_entropy_forward": backend.cross_entropy_forward(logits, labels, 0.125, -100, True)}
