"""The hypernetworks: they generate the packed weights of all adapters of a stack from task, layer and position
embeddings."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .config import HyperFormerConfig
from .embedding_mark import EmbeddingReader
from .initialisation import AUTHORS, Initialisation, draw_generator, linear, plain_norms
from .layout import AdapterLayout
from .names import NamedParameters
from .norm_only import NormLayout

#: The sublayers of a block that an adapter follows. A position's index in the tuple is its id, as in the authors' code.
POSITIONS = ("feed_forward", "self_attention")

_EMBEDDING_NORM_EPS = 1e-6
_RMS_EPS = 1e-6


class TaskProjector(nn.Sequential):
    """Two linear layers with a ReLU between them (``TaskHyperNet`` in the authors' code).

    It maps [..., in_dim] to [..., out_dim].
    """

    #: What the variance of each layer's initial weight times its fan-in is, where it is not the authors'.
    GAINS: ClassVar[Mapping[int, float]] = {0: 2.0, 2: 1.0}

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, init: Initialisation = AUTHORS):
        super().__init__(
            linear(in_dim, hidden_dim, init, self.GAINS[0]), nn.ReLU(), linear(hidden_dim, out_dim, init, self.GAINS[2])
        )


class TaskEmbeddings(EmbeddingReader):
    """The task embeddings, which encoder and decoder share (``TaskEmbeddingController`` in the authors' code).

    Every forward uses all embeddings, so that each of them gets a gradient, which is zero for a task that is not in the
    batch: distributed training needs that. A single embedding can still be frozen with ``requires_grad_(False)``.
    """

    def __init__(self, config: HyperFormerConfig):
        super().__init__()
        self.config = config
        # Pass pairs, because ParameterDict sorts the keys of a plain dict: a task that add_task appended would move
        # when the model is loaded again, and an optimizer's state, which is kept by index, would go to other tasks.
        self.task_to_embeddings = NamedParameters(
            [(name, nn.Parameter(torch.randn(config.embedding_dim))) for name in config.embedding_names]
        )
        self.projector = (
            TaskProjector(
                config.task_embedding_dim,
                config.task_hidden_dim,
                config.projected_task_embedding_dim,
                Initialisation.of(config),
            )
            if config.train_task_embeddings
            else None
        )
        self.mark_state_dicts()

    @property
    def out_dim(self) -> int:
        """The width of the embeddings that :meth:`forward` returns."""
        return self.config.projected_task_embedding_dim if self.projector is not None else self.config.embedding_dim

    def forward(self) -> torch.Tensor:
        """Return the embeddings [T, out_dim] of all tasks, in the order of ``config.tasks``.

        Autocast is switched off within, as in :meth:`HyperNetwork.forward`.
        """
        return self.projected(
            torch.stack([self.task_to_embeddings[self.config.embedding_of(task)] for task in self.config.tasks])
        )

    def projected(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`forward` makes of tasks' own embeddings [T, embedding_dim]."""
        if self.projector is None:
            return embeddings
        with torch.autocast(embeddings.device.type, enabled=False):
            projected: torch.Tensor = self.projector(as_read(embeddings, self.config))
        return projected

    @torch.no_grad()
    def add_task(self, name: str, init_from: str | list[str] | None = None) -> None:
        """Append a task with an embedding of its own.

        Args:
            name: the new task.
            init_from: a task whose embedding is copied, a list of tasks whose embeddings are averaged, or None for a
                draw from the standard normal distribution.

        Raises:
            ValueError: the name is taken, or ``init_from`` names an unknown task or is an empty list.
        """
        config = self.config.with_task(name, init_from)
        sources = [init_from] if isinstance(init_from, str) else init_from
        old = next(iter(self.task_to_embeddings.values()))
        if sources is None:
            value = torch.randn_like(old)
        else:
            value = torch.stack([self.task_to_embeddings[self.config.embedding_of(s)] for s in sources]).mean(0)
        self.task_to_embeddings[name] = nn.Parameter(value)
        self.config = config

    def of_tasks(self) -> NamedParameters:
        """The parameters that belong to one task each, by the names of ``config.embedding_of``."""
        return self.task_to_embeddings


class Generator(nn.Module):
    """``count`` independent linear generators of whole adapters, stored as one weight [count, rows, k].

    One batched matrix product generates every adapter of a stack and reads the weight once; the authors' code has four
    to eight ``nn.Linear`` per generator.

    Args:
        count: Q, the number of generators.
        layout: the layout of the adapters to generate.
        k: the width of the embeddings.
        generate_norms: whether the norms' parameters are generated, too. False makes them plain trained vectors, which
            are the same for every task.
        init: how the weights start; by default as the authors' do.
        mean_square: the mean square of the embeddings' numbers, which a start that is not the authors' depends on.
    """

    def __init__(
        self,
        count: int,
        layout: AdapterLayout,
        k: int,
        generate_norms: bool = True,
        init: Initialisation = AUTHORS,
        mean_square: float = 1.0,
    ):
        super().__init__()
        self.layout = layout
        rows = layout.numel if generate_norms else layout.numel - layout.norm_numel
        self.weight = nn.Parameter(torch.empty(count, rows, k))
        self.bias = nn.Parameter(torch.empty(count, rows))
        draw_generator(self.weight, self.bias, layout, init, mean_square)
        plain = not generate_norms and layout.norm_numel > 0
        self.norms = nn.Parameter(plain_norms(layout, init).repeat(count, 1)) if plain else None

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Generate the packed adapters [Q, n, P] from embeddings [Q, n, k]."""
        packed = ops.generate_weights(embeddings, self.weight, self.bias)
        if self.norms is None:
            return packed
        return torch.cat([packed, self.norms.to(packed.dtype).unsqueeze(1).expand(-1, packed.shape[1], -1)], -1)


class AdapterSource(nn.Module):
    """What makes the weights of all adapters of one stack (encoder or decoder): a base class.

    A site is the place of one adapter. Sites are numbered by position first, ``site = position_id * num_layers +
    layer``: in this order the sites of a generator are contiguous, whether a generator serves the whole stack, a
    position or a single site.

    Args:
        config: the configuration.
        d: the width of the stack.
        num_layers: the number of the stack's blocks; each has one adapter per position.
    """

    def __init__(self, config: HyperFormerConfig, d: int, num_layers: int):
        super().__init__()
        self.config, self.num_layers = config, num_layers
        norms = config.add_layer_norm_before_adapter, config.add_layer_norm_after_adapter
        if config.train_adapters_blocks:
            self.layout = AdapterLayout(d, config.bottleneck(d), *norms)
        else:
            self.layout = NormLayout(d, pre_norm=norms[0], post_norm=norms[1])

    @property
    def num_sites(self) -> int:
        """The number of adapters in the stack."""
        return len(POSITIONS) * self.num_layers

    def site(self, layer: int, position: str) -> int:
        """Return the index of the adapter at ``position`` of block ``layer``. ValueError if there is none."""
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}")
        return POSITIONS.index(position) * self.num_layers + layer

    def add_task(self, config: HyperFormerConfig, name: str, init_from: str | list[str] | None = None) -> None:
        """Take over ``config``, which has the new task ``name``. Here a task has no weights beside its embedding."""
        self.config = config

    def of_tasks(self) -> NamedParameters | None:
        """The parameters that belong to one task each, by the names of ``config.embedding_of``; None without any."""
        return None

    def forward_each(self, task_embeddings: torch.Tensor) -> torch.Tensor:
        """The packed weights that the forward returns, where those of a task do not depend on other tasks."""
        packed: torch.Tensor = self(task_embeddings)
        return packed


class HyperNetwork(EmbeddingReader, AdapterSource):
    """All hypernetworks of one stack, in any of the three variants. Arguments are those of :class:`AdapterSource`."""

    def __init__(self, config: HyperFormerConfig, d: int, num_layers: int):
        super().__init__(config, d, num_layers)
        shared, dim = config.shares_generators, config.embedding_dim
        task_dim = config.projected_task_embedding_dim if config.train_task_embeddings else dim
        k = config.projected_task_embedding_dim if shared else task_dim
        init, mean_square = Initialisation.of(config), 1.0
        if shared:
            parts = 3 if config.variant == "hyperformer++" else 2
            self.layer_embeddings = nn.Embedding(num_layers, dim)
            if parts == 3:
                self.position_embeddings = nn.Embedding(len(POSITIONS), dim)
            self.projector = (
                TaskProjector(parts * dim, config.task_hidden_dim, k, init) if config.task_projector else None
            )
            self.embedding_norm = (
                nn.LayerNorm(k, eps=_EMBEDDING_NORM_EPS) if config.unique_hyper_net_layer_norm else None
            )
            if self.projector is None and self.embedding_norm is None:
                mean_square = float(parts)  # of a sum of so many embeddings
        # None is among the keys' types because config.variant may be None before it is validated, never here.
        counts: dict[str | None, int] = {
            "hyperformer++": 1,
            "hyperformer-shared": len(POSITIONS),
            "hyperformer": self.num_sites,
        }
        self.generator = Generator(counts[config.variant], self.layout, k, config.generates_norms, init, mean_square)
        self.mark_state_dicts()

    def embeddings(self, task_embeddings: torch.Tensor) -> torch.Tensor:
        """Combine the task embeddings [T, k_task] with those of layers and positions (paper section 3.3).

        Returns:
            The generators' inputs [sites, T, k]. In the variant ``hyperformer`` these are the task embeddings alone.
        """
        T = task_embeddings.shape[0]
        task = as_read(task_embeddings, self.config).expand(self.num_sites, -1, -1)
        if self.config.variant == "hyperformer":
            return task
        layers = as_read(self.layer_embeddings.weight, self.config)
        parts = [task, self._per_site(layers.repeat(len(POSITIONS), 1), T)]
        if self.config.variant == "hyperformer++":
            positions = as_read(self.position_embeddings.weight, self.config)
            parts.append(self._per_site(positions.repeat_interleave(self.num_layers, 0), T))
        # Without a projector the embeddings have the generators' width, and a sum leaves the generators as they are.
        joint: torch.Tensor = (
            functools.reduce(torch.add, parts) if self.projector is None else self.projector(torch.cat(parts, -1))
        )
        if self.embedding_norm is not None:
            joint = self.embedding_norm(joint)
        return joint

    @staticmethod
    def _per_site(embeddings: torch.Tensor, T: int) -> torch.Tensor:
        return embeddings.unsqueeze(1).expand(-1, T, -1)

    def forward(self, task_embeddings: torch.Tensor) -> torch.Tensor:
        """Generate the packed weights [sites, T, P] of every adapter of the stack from task embeddings [T, k_task].

        Autocast is switched off within, so that generated weights keep the parameters' precision.
        """
        with torch.autocast(task_embeddings.device.type, enabled=False):
            return self._generate(self.embeddings(task_embeddings.to(self.generator.weight.dtype)))

    def forward_each(self, task_embeddings: torch.Tensor) -> torch.Tensor:
        """:meth:`forward`, but a task's weights are the same to the last bit whatever other tasks there are.

        Each task is generated by itself, because products round by the number of their rows: PyTorch's at any size, and
        those of the backend ``cpu`` where a generator makes fewer than four adapters at once. Where each site has a
        generator of its own, all of these are read again for each task.
        """
        with torch.autocast(task_embeddings.device.type, enabled=False):
            tasks = task_embeddings.to(self.generator.weight.dtype)
            packed = tasks.new_empty(self.num_sites, len(tasks), self.layout.numel)
            for task, each in enumerate(tasks.split(1)):
                packed[:, task] = self._generate(self.embeddings(each)).squeeze(1)
        return packed

    def _generate(self, e: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.generator(e.reshape(self.generator.weight.shape[0], -1, e.shape[-1]))
        return packed.view(self.num_sites, -1, self.layout.numel)


def as_read(embeddings: torch.Tensor, config: HyperFormerConfig) -> torch.Tensor:
    """Return embeddings [..., dim] as the network behind them reads them.

    With ``normalize_embeddings`` each has a root mean square of 1, as it is drawn, however long training makes it: so
    the embedding of a layer cannot drown that of the task beside it. One that is zero stays zero.
    """
    if not config.normalize_embeddings:
        return embeddings
    return F.rms_norm(embeddings, embeddings.shape[-1:], eps=_RMS_EPS)
