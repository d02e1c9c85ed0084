"""The authors' numbers through a backend that computes in float32."""

from __future__ import annotations

import torch
from test_official import load_case, relative_error

from hyperformer_fast import backends


def assert_golden(case: dict, backend: str) -> None:
    """Outputs and gradients no further off than the reference backend's in float32, but for rounding."""

    def errors(backend: str) -> dict[str, float]:
        stack, tensors = load_case(case)
        stack.float()
        found = {}
        with backends.use_backend(backend):
            for name in [name for name in tensors if name.startswith("x.")]:
                _, task, layer, position = name.split(".")
                x = tensors[name].float().requires_grad_()
                out = stack(x, task, int(layer), position)
                found[f"y.{name[2:]}"] = relative_error(out.detach(), tensors[f"y.{name[2:]}"])
                out.backward(tensors[f"v.{name[2:]}"].float())
                found[f"dx.{name[2:]}"] = relative_error(x.grad, tensors[f"dx.{name[2:]}"])
        return found

    mine, plain = errors(backend), errors("reference")
    for name, error in mine.items():
        assert error <= 4 * plain[name] + 8 * torch.finfo(torch.float32).eps, name
