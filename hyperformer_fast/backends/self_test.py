"""A backend's ops on a small adapter against the float64 truth."""

from __future__ import annotations

import torch

from ..layout import AdapterLayout
from .base import Backend
from .reference import ReferenceBackend

#: The largest error that is allowed, relative to the truth's largest value. Right kernels stay below a quarter of it
#: (float32: below 1e-6).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

LAYOUT = AdapterLayout(96, 12)


def errors(
    backend: Backend,
    dtype: torch.dtype = torch.float32,
    layout: AdapterLayout = LAYOUT,
    activation: str = "gelu_new",
) -> dict[str, float]:
    """The largest error of each op that ``backend`` serves, relative to the truth's largest value."""
    truth = ReferenceBackend()
    mine = _results(backend, backend.device, dtype, layout, activation)
    expected = _results(truth, backend.device, torch.float64, layout, activation)
    return {op: ((mine[op] - expected[op]).abs().max() / expected[op].abs().max()).item() for op in backend.serves}


def faults(backend: Backend) -> list[str]:
    """What ``backend`` computes wrongly, in words; empty where all is right. Every dtype of the kernels is tried."""
    cases = [
        (torch.float32, LAYOUT, "gelu_new"),
        (torch.bfloat16, AdapterLayout(50, 7, pre_norm=True), "silu"),
        (torch.float16, AdapterLayout(64, 8), "gelu"),
    ]
    found = []
    for dtype, layout, activation in cases:
        for op, error in errors(backend, dtype, layout, activation).items():
            if not error <= TOLERANCE[dtype]:
                name = str(dtype).removeprefix("torch.")
                found.append(f"{op} in {name} is off by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
    return found


def _results(
    served: Backend, device: str | None, dtype: torch.dtype, layout: AdapterLayout, activation: str
) -> dict[str, torch.Tensor]:
    truth = ReferenceBackend()
    device = device or "cpu"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    packed = random(2, layout.numel) * 0.1
    # 16-bit inputs are the same numbers for both, so that the error is that of the arithmetic alone.
    x, g = (random(4, 8, layout.d).to(torch.bfloat16).to(device, dtype) for _ in range(2))
    packed = packed.to(torch.bfloat16).to(device, torch.float32 if dtype != torch.float64 else dtype)
    index = torch.tensor([0, 1, -1, 1], device=device)
    folded = getattr(served, "fold", truth.fold)(packed, layout, dtype)
    out, saved = getattr(served, "adapter_forward", truth.adapter_forward)(x, folded, layout, activation, index, True)
    backward = getattr(served, "adapter_backward", truth.adapter_backward)
    dx, dpacked = backward(g, x, saved, packed, folded, layout, activation, index, True, True)
    E, G, g0 = packed[None, :, :5], packed.mT[None, :, :1].repeat(1, 1, 5), packed[:1]
    generated = getattr(served, "generate_weights", truth.generate_weights)(E, G, g0)
    hyper = getattr(served, "hyper_adapter", truth.hyper_adapter)
    at_once = hyper(x, E[0], G[0], g0[0], layout, activation, index, False)[0]
    return {
        "generate_weights": generated,
        "fold": folded.root,
        "adapter_forward": out,
        "adapter_backward": torch.cat([dx.flatten(), dpacked.flatten()]),
        "hyper_adapter": at_once,
    }
