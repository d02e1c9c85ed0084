"""The mathematics against the authors' code: golden outputs and every gradient, in float64."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hyperformer_fast import official

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


# The authors' modules, stated again one linear layer at a time, for the combinations that the golden files do not hold.

D, B, K, PROJECTED, HIDDEN, LAYERS = 12, 3, 6, 5, 7, 2
TASKS = ["cola", "mnli"]
ACTIVATIONS = {
    "gelu_new": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "gelu": F.gelu,
    "swish": lambda z: z * torch.sigmoid(z),
    "relu": torch.relu,
}


def official_config(variant: str, **fields) -> dict:
    return {
        "input_dim": D,
        "reduction_factor": D // B,
        "task_embedding_dim": K,
        "projected_task_embedding_dim": PROJECTED,
        "task_hidden_dim": HIDDEN,
        "unique_hyper_net": variant == "shared",
        "efficient_unique_hyper_net": variant == "plus_plus",
        "tasks": TASKS,
        **fields,
    }


class Recorder(dict):
    """A state dict that draws each tensor when it is first asked for, so that the statement below also says what
    exists."""

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self:
            self[name] = torch.randn(shape, dtype=torch.float64).mul(0.3).requires_grad_()
        return self[name]

    def linear(self, name: str, x: torch.Tensor, out: int) -> torch.Tensor:
        return F.linear(x, self(f"{name}.weight", out, x.shape[-1]), self(f"{name}.bias", out))


def naive_site(p: Recorder, config: dict, x: torch.Tensor, task: str, layer: int, position: str) -> torch.Tensor:
    """The output of one adapter as the authors' modules compute it."""
    e = p(f"task_embedding_controller.task_to_embeddings.{task}", K)
    net, per_block = (
        "adapter_layers_hyper_net.",
        not (config["unique_hyper_net"] or config["efficient_unique_hyper_net"]),
    )
    if per_block:
        prefix, down, up = f"{net}{layer}_{position}.", "meta_down_sampler", "meta_up_sampler"
    else:
        prefix = net if config["efficient_unique_hyper_net"] else f"{net}{position}_"
        down, up = "down_sampler_hyper_net", "up_sampler_hyper_net"
        parts = [e, p(f"{net}layer_id_embeddings.weight", LAYERS, K)[layer]]
        if config["efficient_unique_hyper_net"]:
            parts.append(
                p(f"{net}adapters_block_type.weight", 2, K)[["feed_forward", "self_attention"].index(position)]
            )
        hidden = torch.relu(p.linear(f"{net}task_hypernet.task_embeding_generator.0", torch.cat(parts), HIDDEN))
        e = p.linear(f"{net}task_hypernet.task_embeding_generator.2", hidden, PROJECTED)
        if config["unique_hyper_net_layer_norm"]:
            e = F.layer_norm(
                e, (PROJECTED,), p(f"{net}LayerNorm.weight", PROJECTED), p(f"{net}LayerNorm.bias", PROJECTED), 1e-6
            )

    def norm(which: str, y: torch.Tensor) -> torch.Tensor:
        if per_block and not config["conditional_layer_norm"]:
            return F.layer_norm(
                y, (D,), p(f"{prefix}{which}_layer_norm.weight", D), p(f"{prefix}{which}_layer_norm.bias", D)
            )
        generated = (
            p.linear(f"{prefix}{which}_layernorm_hypernet.{kind}_generator", e, D) for kind in ("weight", "bias")
        )
        return F.layer_norm(y, (D,), *generated)

    def project(module: str, y: torch.Tensor, out: int) -> torch.Tensor:
        weight = p.linear(f"{prefix}{module}.weight_generator.0", e, out * y.shape[-1]).view(out, y.shape[-1])
        return F.linear(y, weight, p.linear(f"{prefix}{module}.bias_generator.0", e, out))

    y = norm("pre", x) if config["add_layer_norm_before_adapter"] else x
    y = project(up, ACTIVATIONS[config["non_linearity"]](project(down, y, B)), D)
    return x + (norm("post", y) if config["add_layer_norm_after_adapter"] else y)


COMBINATIONS = [
    (
        variant,
        dict(
            zip(
                (
                    "add_layer_norm_before_adapter",
                    "add_layer_norm_after_adapter",
                    "conditional_layer_norm",
                    "unique_hyper_net_layer_norm",
                ),
                flags,
            )
        ),
    )
    for variant, flags in itertools.product(
        ("plus_plus", "shared", "per_block"), itertools.product([False, True], repeat=4)
    )
]


@pytest.mark.parametrize(
    ("variant", "flags"),
    COMBINATIONS,
    ids=lambda v: v if isinstance(v, str) else "".join(str(int(f)) for f in v.values()),
)
def test_every_combination_of_fields(variant, flags):
    activation = sorted(ACTIVATIONS)[COMBINATIONS.index((variant, flags)) % 4]
    config = official_config(variant, non_linearity=activation, **flags)
    p = Recorder()
    sites = list(itertools.product(TASKS, range(LAYERS), ("self_attention", "feed_forward")))
    inputs = [torch.randn(2, 3, D, dtype=torch.float64) for _ in sites]
    expected = [naive_site(p, config, x, *site) for x, site in zip(inputs, sites)]
    weights = [torch.randn_like(x) for x in inputs]
    sum((y * w).sum() for y, w in zip(expected, weights)).backward()

    stack = official.build_stack(config, LAYERS, {name: t.detach() for name, t in p.items()})
    outputs = [stack(x, *site) for x, site in zip(inputs, sites)]
    sum((y * w).sum() for y, w in zip(outputs, weights)).backward()
    for mine, theirs in zip(outputs, expected):
        assert relative_error(mine, theirs) <= 1e-11
    gradients = official.export_gradients(stack)
    assert set(gradients) == set(p)
    for name, gradient in gradients.items():
        scale = max(p[name].grad.abs().max(), torch.tensor(1e-3))
        assert (gradient - p[name].grad).abs().max() <= 1e-9 * scale, name


def test_broken_state_dicts_are_named():
    case = CASES[0]
    _, tensors = load_case(case)
    state = {name.removeprefix("param."): t for name, t in tensors.items() if name.startswith("param.")}
    build = lambda state, **config: official.build_stack({**case["config"], **config}, case["num_layers"], state)  # noqa: E731
    name = "adapter_layers_hyper_net.LayerNorm.weight"
    with pytest.raises(ValueError, match=f"lacks 1 .* {name}"):
        build({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=rf"{name} is \[3\].*\[10\]"):
        build({**state, name: torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match="1 tensors unknown .* extra"):
        build({**state, "extra": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match="one dtype"):
        build({**state, name: state[name].float()})
    with pytest.raises(ValueError, match="non_linearity.*'tanh'"):
        build(state, non_linearity="tanh")
    with pytest.raises(ValueError, match="unknown task 'rte'"):
        build(state)(torch.zeros(1, 48, dtype=torch.float64), "rte", 0, "feed_forward")
