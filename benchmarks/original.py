"""The authors' generation of one stack's adapters, restated: the rival of stack.py.

This is HyperFormer++ (their ``efficient_unique_hyper_net``) as in github.com/rabeehk/hyperformer. For each of the two
adapters of each block it does two embedding look-ups by a fresh index tensor, the projector and its norm on one vector,
and six generators (down, up and post-norm, a weight and a bias each) on that vector. Parameters have the authors'
names, so that ``hyperformer_fast.official`` loads them into ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Generator(nn.Module):
    """Generates a weight and a bias from one embedding."""

    def __init__(self, k: int, shape: tuple[int, ...], wrapped: bool = True):
        super().__init__()
        self.shape = shape
        numel = torch.Size(shape).numel()
        linears = nn.Linear(k, numel), nn.Linear(k, shape[0])
        # the authors wrap all but the norms' generators in a Sequential
        self.weight_generator, self.bias_generator = map(nn.Sequential, linears) if wrapped else linears

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight_generator(e).view(self.shape), self.bias_generator(e).view(-1)


class OriginalStack(nn.Module):
    """One stack's hypernetwork.

    Args:
        d: width.
        b: bottleneck.
        layers: blocks.
        k: width of the embeddings.
        hidden: width of the projector.
    """

    def __init__(self, d: int, b: int, layers: int, k: int = 64, hidden: int = 128):
        super().__init__()
        self.layers = layers
        self.layer_id_embeddings = nn.Embedding(layers, k)
        self.adapters_block_type = nn.Embedding(2, k)
        projector = nn.Sequential(nn.Linear(3 * k, hidden), nn.ReLU(), nn.Linear(hidden, k))
        self.task_hypernet = nn.ModuleDict({"task_embeding_generator": projector})
        self.LayerNorm = nn.LayerNorm(k, eps=1e-6)
        self.up_sampler_hyper_net = _Generator(k, (d, b))
        self.down_sampler_hyper_net = _Generator(k, (b, d))
        self.post_layernorm_hypernet = _Generator(k, (d,), wrapped=False)

    def embedding(self, task: Tensor, layer: int, block_type: int) -> Tensor:
        """The projected embedding of one adapter: [k]."""
        layer_embedding = self.layer_id_embeddings(torch.tensor([layer])).view(-1)
        type_embedding = self.adapters_block_type(torch.tensor([block_type])).view(-1)
        joint = torch.cat([task.view(1, -1), layer_embedding.view(1, -1), type_embedding.view(1, -1)])
        return self.LayerNorm(self.task_hypernet["task_embeding_generator"](joint.view(-1)))

    def block(self, task: Tensor, layer: int) -> list[tuple[Tensor, ...]]:
        """The two adapters of a block, feed-forward first, each in the order of ``AdapterLayout``'s parts."""
        embeddings = [self.embedding(task, layer, block_type) for block_type in range(2)]
        return [
            (*self.down_sampler_hyper_net(e), *self.up_sampler_hyper_net(e), *self.post_layernorm_hypernet(e))
            for e in embeddings
        ]

    def forward(self, task: Tensor) -> list[list[tuple[Tensor, ...]]]:
        """A task embedding [k] -> the parts of both adapters of each block."""
        return [self.block(task, layer) for layer in range(self.layers)]
