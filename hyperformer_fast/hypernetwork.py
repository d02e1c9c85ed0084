"""Task, layer and position embeddings -> one packed weight vector per adapter, for a whole stack at once."""

from __future__ import annotations

import torch
from torch import nn

from . import ops
from .config import HyperFormerConfig
from .layout import AdapterLayout
from .names import NamedParameters

#: Positions of an adapter in a block; the index is the authors' type id.
POSITIONS = ("feed_forward", "self_attention")

_INIT_STD = 1e-2  # weight_init_range of the authors' AdapterConfig
_EMBEDDING_NORM_EPS = 1e-6


class TaskProjector(nn.Sequential):
    """Two linear layers with a ReLU between (the authors' ``TaskHyperNet``): [..., in] -> hidden -> [..., out]."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__(_linear(in_dim, hidden_dim), nn.ReLU(), _linear(hidden_dim, out_dim))


class TaskEmbeddings(nn.Module):
    """The one set of task embeddings that encoder and decoder share (the authors' ``TaskEmbeddingController``).

    Every embedding enters every forward, so that each has a gradient, zero if need be: distributed training
    needs that, and a single one can still be frozen with ``requires_grad_(False)``.
    """

    def __init__(self, config: HyperFormerConfig):
        super().__init__()
        self.config = config
        # Pairs, because a ParameterDict sorts a plain dict: a task that add_task appended would move on a reload, and
        # an optimizer's state, kept by index, would land on other tasks.
        self.task_to_embeddings = NamedParameters(
            [(name, nn.Parameter(torch.randn(config.task_embedding_dim))) for name in config.embedding_names]
        )
        self.projector = (
            TaskProjector(config.task_embedding_dim, config.task_hidden_dim, config.projected_task_embedding_dim)
            if config.train_task_embeddings
            else None
        )

    @property
    def out_dim(self) -> int:
        """Width of what :meth:`forward` returns."""
        return (
            self.config.projected_task_embedding_dim if self.projector is not None else self.config.task_embedding_dim
        )

    def forward(self) -> torch.Tensor:
        """The embeddings [T, out_dim] of all tasks of ``config.tasks``, in that order."""
        stacked = torch.stack([self.task_to_embeddings[self.config.embedding_of(task)] for task in self.config.tasks])
        return stacked if self.projector is None else self.projector(stacked)

    @torch.no_grad()
    def add_task(self, name: str, init_from: str | list[str] | None = None) -> None:
        """Append a task with an embedding of its own.

        Args:
            name: the new task.
            init_from: a task whose embedding is copied, a list of tasks whose mean is taken, or None for a standard
                normal draw.

        Raises:
            ValueError: the name is taken, or ``init_from`` names an unknown task or none.
        """
        if name in self.config.tasks or name in self.task_to_embeddings:
            raise ValueError(f"task {name!r} is there already; tasks are {', '.join(self.config.tasks)}")
        sources = [init_from] if isinstance(init_from, str) else init_from
        for source in sources or ():
            self.config.task_id(source)
        if sources is not None and not sources:
            raise ValueError("init_from must name at least one task, got []")
        mapping = self.config.task_to_embeddings
        config = self.config.replace(
            tasks=[*self.config.tasks, name], task_to_embeddings=None if mapping is None else {**mapping, name: name}
        )
        old = next(iter(self.task_to_embeddings.values()))
        if sources is None:
            value = torch.randn_like(old)
        else:
            value = torch.stack([self.task_to_embeddings[self.config.embedding_of(s)] for s in sources]).mean(0)
        self.task_to_embeddings[name] = nn.Parameter(value)
        self.config = config


class Generator(nn.Module):
    """``count`` independent linear generators of whole adapters, stored as one [count, rows, k] tensor.

    One matrix product then generates every adapter of a stack (and reads the weight once), where the authors' code
    holds four to eight ``nn.Linear`` per generator. Initialised as theirs: normal with std 1e-2, bias zero.

    Args:
        count: Q, how many generators.
        layout: of the adapters to generate.
        k: width of the embedding.
        generate_norms: False: the norms' parameters are plain trained vectors (ones and zeros at first), the same
            for every task, and only the rest is generated.
    """

    def __init__(self, count: int, layout: AdapterLayout, k: int, generate_norms: bool = True):
        super().__init__()
        self.layout = layout
        rows = layout.numel if generate_norms else layout.numel - layout.norm_numel
        self.weight = nn.Parameter(torch.empty(count, rows, k).normal_(std=_INIT_STD))
        self.bias = nn.Parameter(torch.zeros(count, rows))
        plain = not generate_norms and layout.norm_numel > 0
        self.norms = nn.Parameter(_plain_norms(layout).repeat(count, 1)) if plain else None

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [Q, n, k] -> packed [Q, n, P]."""
        packed = ops.generate_weights(embeddings, self.weight, self.bias)
        if self.norms is None:
            return packed
        return torch.cat([packed, self.norms.to(packed.dtype).unsqueeze(1).expand(-1, packed.shape[1], -1)], -1)


class HyperNetwork(nn.Module):
    """All hypernetworks of one stack (encoder or decoder), in any of the three variants.

    Sites are position-major, ``site = position_id * num_layers + layer``: that order is contiguous for one generator
    per stack, per position, and per site alike.

    Args:
        config: the HyperFormer.
        d: width of the stack.
        num_layers: number of its blocks, each with two adapters.
    """

    def __init__(self, config: HyperFormerConfig, d: int, num_layers: int):
        super().__init__()
        self.config, self.num_layers = config, num_layers
        self.layout = AdapterLayout(
            d, config.bottleneck(d), config.add_layer_norm_before_adapter, config.add_layer_norm_after_adapter
        )
        shared = config.variant != "hyperformer"
        task_dim = config.projected_task_embedding_dim if config.train_task_embeddings else config.task_embedding_dim
        k = config.projected_task_embedding_dim if shared else task_dim
        if shared:
            parts = 3 if config.variant == "hyperformer++" else 2
            self.layer_embeddings = nn.Embedding(num_layers, config.task_embedding_dim)
            if parts == 3:
                self.position_embeddings = nn.Embedding(len(POSITIONS), config.task_embedding_dim)
            self.projector = TaskProjector(parts * config.task_embedding_dim, config.task_hidden_dim, k)
            self.embedding_norm = (
                nn.LayerNorm(k, eps=_EMBEDDING_NORM_EPS) if config.unique_hyper_net_layer_norm else None
            )
        count = {"hyperformer++": 1, "hyperformer-shared": len(POSITIONS), "hyperformer": self.num_sites}[
            config.variant
        ]
        self.generator = Generator(count, self.layout, k, config.generates_norms)

    @property
    def num_sites(self) -> int:
        """How many adapters the stack has."""
        return len(POSITIONS) * self.num_layers

    def site(self, layer: int, position: str) -> int:
        """Index of the adapter behind ``position`` of block ``layer``. ValueError where there is none."""
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}")
        return POSITIONS.index(position) * self.num_layers + layer

    def embeddings(self, task_embeddings: torch.Tensor) -> torch.Tensor:
        """What the generators read: [T, k_task] -> [sites, T, k] (paper section 3.3; per block, the task embedding
        itself)."""
        T = task_embeddings.shape[0]
        task = task_embeddings.expand(self.num_sites, -1, -1)
        if self.config.variant == "hyperformer":
            return task
        parts = [task, self._per_site(self.layer_embeddings.weight.repeat(len(POSITIONS), 1), T)]
        if self.config.variant == "hyperformer++":
            parts.append(self._per_site(self.position_embeddings.weight.repeat_interleave(self.num_layers, 0), T))
        joint = self.projector(torch.cat(parts, -1))
        return joint if self.embedding_norm is None else self.embedding_norm(joint)

    @staticmethod
    def _per_site(embeddings: torch.Tensor, T: int) -> torch.Tensor:
        return embeddings.unsqueeze(1).expand(-1, T, -1)

    def forward(self, task_embeddings: torch.Tensor) -> torch.Tensor:
        """Task embeddings [T, k_task] -> the packed weights [sites, T, P] of every adapter of the stack.

        Runs with autocast off: generated weights keep the parameters' precision.
        """
        with torch.autocast(task_embeddings.device.type, enabled=False):
            e = self.embeddings(task_embeddings.to(self.generator.weight.dtype))
            packed = self.generator(e.reshape(self.generator.weight.shape[0], -1, e.shape[-1]))
        return packed.view(self.num_sites, -1, self.layout.numel)


def _linear(in_dim: int, out_dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim)
    nn.init.normal_(linear.weight, std=_INIT_STD)
    nn.init.zeros_(linear.bias)
    return linear


def _plain_norms(layout: AdapterLayout) -> torch.Tensor:
    one_norm = torch.cat([torch.ones(layout.d), torch.zeros(layout.d)])
    return one_norm.repeat(layout.norm_numel // (2 * layout.d))
