"""The mathematics against the authors' code: golden outputs and every gradient, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hyperformer_fast import official
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def relative_error(mine: torch.Tensor, expected: torch.Tensor) -> float:
    return ((mine - expected).abs().max() / expected.abs().max()).item()


def load_case(case: dict) -> tuple[official.OfficialStack, dict[str, torch.Tensor]]:
    tensors = load_file(GOLDEN / case["file"])
    state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    return official.build_stack(case["config"], case["num_layers"], state), tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_outputs_and_gradients(case):
    stack, tensors = load_case(case)
    errors = {}
    for name in [name for name in tensors if name.startswith("x.")]:
        _, task, layer, position = name.split(".")
        site = name[2:]
        x = tensors[name].requires_grad_()
        out = stack(x, task, int(layer), position)
        errors[f"y.{site}"] = relative_error(out.detach(), tensors[f"y.{site}"])
        out.backward(tensors[f"v.{site}"])
        errors[f"dx.{site}"] = relative_error(x.grad, tensors[f"dx.{site}"])
    gradients = official.export_gradients(stack)
    assert set(gradients) == {name.removeprefix("grad.") for name in tensors if name.startswith("grad.")}
    for name, gradient in gradients.items():
        errors[f"grad.{name}"] = relative_error(gradient, tensors[f"grad.{name}"])
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-10, f"{worst}: {errors[worst]:.1e}"
