"""The self-test of a backend: its ops on a small adapter are compared with the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import AdapterLayout, AdapterSpec, accumulator_dtype
from .base import Backend
from .reference import ReferenceBackend

#: The largest error that is allowed, relative to the largest absolute value of the float64 result. The errors of
#: correct kernels are below a quarter of it, and in float32 below 1e-6.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

SPEC = AdapterSpec(AdapterLayout(96, 12), "gelu_new")
_TASKS = (0, 1, -1, 1)


def errors(backend: Backend, dtype: torch.dtype = torch.float32, spec: AdapterSpec = SPEC) -> dict[str, float]:
    """Compute the error of each op that ``backend`` serves.

    Args:
        backend: the backend, which need be neither registered nor available.
        dtype: the dtype of x.
        spec: the adapter.

    Returns:
        For each op, the largest absolute error divided by the largest absolute value of the float64 result.
    """
    device = backend.device or "cpu"
    mine, truth = _results(backend, device, dtype, spec), _results(ReferenceBackend(), device, torch.float64, spec)
    return {op: ((mine[op] - truth[op]).abs().max() / truth[op].abs().max()).item() for op in backend.serves}


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


def _results(backend: Backend, device: str, dtype: torch.dtype, spec: AdapterSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout, weights = spec.layout, accumulator_dtype(dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    # The float64 reference gets inputs that are rounded to bfloat16, too, so that only the arithmetic causes errors.
    packed = (random(2, layout.numel) * 0.1).to(torch.bfloat16).to(device, weights)
    x, g = (random(4, 8, layout.d).to(torch.bfloat16).to(device, dtype) for _ in range(2))
    E, G, g0 = packed[:, :5], packed.mT[:, :1].repeat(1, 5), packed[0]
    index = torch.tensor(_TASKS, device=device)
    folded = backend.fold(packed, layout, dtype)
    out, saved = backend.adapter_forward(x, folded, spec, index, True)
    gradients = backend.adapter_backward(g, x, saved, packed, folded, spec, index, True, True)
    return {
        "generate_weights": backend.generate_weights(E[None], G[None], g0[None]),
        "fold": folded.root,
        "adapter_forward": out,
        "adapter_backward": torch.cat([t.flatten() for t in gradients]),
        "hyper_adapter": backend.hyper_adapter(x, E, G, g0, spec, index, False)[0],
    }
