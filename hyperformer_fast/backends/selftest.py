"""The self-test of a backend: its ops on a small adapter, and on small pieces of a T5, are compared with the reference
in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layout import NO_DROPOUT, AdapterLayout, AdapterSpec, Dropout, Folded, accumulator_dtype
from .base import Backend
from .reference import ReferenceBackend

#: The largest error that is allowed, relative to the largest absolute value of the float64 result. The errors of
#: correct kernels are below half of it, and in float32 below 1e-6.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

SPEC = AdapterSpec(AdapterLayout(96, 12), "gelu_new")
_TASKS = (0, 1, -1, 1)

_EPS = 1e-6

_Random = Callable[..., Tensor]


def errors(backend: Backend, dtype: torch.dtype = torch.float32, spec: AdapterSpec = SPEC) -> dict[str, float]:
    """Compute the error of each op that ``backend`` serves.

    Args:
        backend: the backend, which need be neither registered nor available.
        dtype: the dtype of x.
        spec: the adapter.

    Returns:
        For each op, the largest absolute error divided by the largest absolute value of the float64 result.
    """
    device, served = backend.device or "cpu", backend.serves
    mine = _results(backend, device, dtype, spec, served)
    truth = _results(ReferenceBackend(), device, torch.float64, spec, served)
    return {op: max(map(_error, mine[op], truth[op])) for op in served}


def _error(mine: Tensor, truth: Tensor) -> float:
    if mine.shape != truth.shape:
        return float("inf")
    return ((mine - truth).abs().max() / truth.abs().max()).item() if truth.numel() else 0.0


def faults(backend: Backend) -> list[str]:
    """Test ``backend`` in every dtype of the kernels. Returns a sentence for each op whose results are wrong."""
    cases = [
        (torch.float32, SPEC),
        (torch.bfloat16, AdapterSpec(AdapterLayout(50, 7, pre_norm=True), "silu")),
        (torch.float16, AdapterSpec(AdapterLayout(64, 8), "gelu")),
    ]
    found = []
    for dtype, spec in cases:
        for op, error in errors(backend, dtype, spec).items():
            if not error <= TOLERANCE[dtype]:
                name = str(dtype).removeprefix("torch.")
                found.append(f"{op} in {name} is off by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
    return found


def _results(
    backend: Backend, device: str, dtype: torch.dtype, spec: AdapterSpec, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    """The results of each op that is served."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # The float64 reference gets inputs that are rounded to bfloat16, too, so that only the arithmetic causes
        # errors.
        values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(torch.bfloat16).to(device, dtype)

    results = _adapter_results(backend, random, spec, served)
    pieces = (
        _residual_results,
        _act_dropout_results,
        _attention_results,
        _cross_entropy_results,
    )
    if any(op not in results for op in served):
        dropout = Dropout(0.25, torch.tensor([0x123456789ABCDEF], device=device), 1)
        for piece in pieces:
            results |= piece(backend, random, dropout, served)
    return results


def _adapter_results(
    backend: Backend, random: _Random, spec: AdapterSpec, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    layout = spec.layout
    x, g = random(4, 8, layout.d), random(4, 8, layout.d)
    weights = accumulator_dtype(x.dtype)
    packed = (random(2, layout.numel) * 0.1).to(torch.bfloat16).to(weights)
    E, G, g0 = packed[:, :5], packed.mT[:, :1].repeat(1, 5), packed[0]
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
    return results


def _adapter_residual_results(
    backend: Backend, random: _Random, x: Tensor, folded: Folded, spec: AdapterSpec, index: Tensor
) -> Sequence[Tensor]:
    # A wide weight, so that the normed sum is not rounded: residual_forward's test has one that is not wide.
    hidden, weight = random(4, 8, spec.layout.d), random(spec.layout.d).to(accumulator_dtype(x.dtype))
    dropout = Dropout(0.25, torch.tensor([-7], device=x.device), 0)
    out, _, normed, rstd = backend.adapter_residual_forward(hidden, x, folded, spec, index, dropout, weight, _EPS, True)
    return out, normed, rstd


def _residual_results(
    backend: Backend, random: _Random, dropout: Dropout, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    n = 44
    hidden, y, g_out, weight = random(3, 5, n), random(3, 5, n), random(3, 5, n), random(n)
    wide = weight.to(accumulator_dtype(weight.dtype))
    g_normed = random(3, 5, n)
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
    a, c, g = random(3, 5, 44), random(3, 5, 44), random(3, 5, 44)
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
    q, k, v, g = random(2, 3, 6, 8) * 0.25, random(2, 3, 9, 8), random(2, 3, 9, 8), random(2, 3, 6, 8)
    bias, mask = random(1, 3, 6, 9), torch.ones(2, 1, 1, 9, dtype=torch.bool, device=q.device)
    mask[1, ..., 5:] = False
    results: dict[str, Sequence[Tensor]] = {}
    scores, g_scores = random(2, 3, 6, 9), random(2, 3, 6, 9)
    _, probabilities = ReferenceBackend().softmax_dropout_forward(scores, bias, mask, dropout, True)
    if "softmax_dropout_forward" in served:
        results["softmax_dropout_forward"] = backend.softmax_dropout_forward(scores, bias, mask, dropout, True)
    if "softmax_dropout_backward" in served:
        results["softmax_dropout_backward"] = (backend.softmax_dropout_backward(g_scores, probabilities, dropout),)
    if "attention_forward" in served:
        results["attention_forward"] = backend.attention_forward(q, k, v, bias, mask, 1.0, dropout, True)
    if "attention_backward" in served:
        gradients = backend.attention_backward(g, q, k, v, probabilities, 1.0, dropout, bias.shape)
        results["attention_backward"] = gradients
    return results


def _cross_entropy_results(
    backend: Backend, random: _Random, dropout: Dropout, served: Sequence[str]
) -> dict[str, Sequence[Tensor]]:
    if "cross_entropy_forward" not in served:
        return {}
    logits = random(5, 37)
    labels = torch.tensor([0, 36, -100, 7, 7], device=logits.device)
    return {"cross_entropy_forward": backend.cross_entropy_forward(logits, labels, 0.125, -100, True)}
