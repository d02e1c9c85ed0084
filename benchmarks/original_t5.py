"""A T5 with HyperFormer++ as the authors' code computes it: the rival of a whole step.

Their T5 generates the adapters of a block when it reaches the block, again in every forward, and applies each with
torch's linear layers and layer norm. A batch has one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from original import OriginalStack
from torch import Tensor, nn

from hyperformer_fast.activations import activate
from hyperformer_fast.hypernetwork import POSITIONS
from hyperformer_fast.layout import EPS
from hyperformer_fast.sites import STACKS, find_sites

REDUCTION, WIDTH = 32, 64


class OriginalT5(nn.Module):
    """A T5 whose blocks call the authors' hypernetwork.

    Args:
        t5: it gets hooks, and stays what it is otherwise.
        task: the task of every batch.
    """

    def __init__(self, t5: nn.Module, task: str):
        super().__init__()
        sites = find_sites(t5)
        layers = {name: 1 + max(site.layer for site in sites if site.stack == name) for name in STACKS}
        d = t5.config.d_model
        self.name = task
        self.task = nn.Parameter(torch.randn(WIDTH))
        self.stacks = nn.ModuleDict({name: OriginalStack(d, d // REDUCTION, n) for name, n in layers.items()})
        self.t5 = t5
        #: The generated adapters of the block that runs, by position.
        self._block: list[tuple[Tensor, ...]] = []
        for name in STACKS:
            for layer, block in enumerate(getattr(t5, name).block):
                block.register_forward_pre_hook(self._generate(name, layer))
        for site in sites:
            site.module.register_forward_hook(self._apply(POSITIONS.index(site.position)))

    def _generate(self, stack: str, layer: int):
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._block = self.stacks[stack].block(self.task, layer)

        return hook

    def _apply(self, position: int):
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            adapted = apply_adapter(x, self._block[position])
            return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

        return hook

    @torch.no_grad()
    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Take the hypernetworks and the task's embedding from a state dict under the authors' names."""
        self.task.copy_(state[f"task_embedding_controller.task_to_embeddings.{self.name}"])
        for stack, net in self.stacks.items():
            for name, parameter in net.named_parameters():
                parameter.copy_(state[f"{stack}.adapter_layers_hyper_net.{name}"])

    def forward(self, **batch: Any) -> Any:
        return self.t5(**batch)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.t5.generate(*args, **kwargs)


def apply_adapter(x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """x + norm(up(gelu(down(x)))), one torch call after another, with weights cast to x's dtype."""
    down, down_bias, up, up_bias, gamma, beta = (part.to(x.dtype) for part in parts)
    y = F.linear(activate(F.linear(x, down, down_bias), "gelu_new"), up, up_bias)
    return x + F.layer_norm(y, (x.shape[-1],), gamma, beta, EPS)
