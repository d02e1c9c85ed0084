"""Adapters that are learned for each task and site, without a hypernetwork: the paper's baseline ``"adapters"``.

The table of a stack takes the place of its ``HyperNetwork``: it returns packed weights in the same form, so that the
same fused kernels run them. In place of task embeddings it reads the tasks' numbers, from :class:`TaskNumbers`.

Letters: S sites of a stack, T tasks, P packed numbers per adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import HyperFormerConfig
from .hypernetwork import AdapterSource
from .initialisation import Initialisation, draw_projections, plain_norms
from .names import NamedParameters


class TaskNumbers(nn.Module):
    """The tasks' numbers 0 .. T - 1, in place of :class:`~hyperformer_fast.hypernetwork.TaskEmbeddings` where nothing
    is generated from embeddings."""

    where: Tensor

    def __init__(self, config: HyperFormerConfig):
        super().__init__()
        self.config = config
        # Only says on which device the model is. It holds no number, because a module that is made on the meta device
        # loses the values of buffers that no checkpoint has.
        self.register_buffer("where", torch.empty(0), persistent=False)

    def forward(self) -> Tensor:
        """Return the numbers [T] of all tasks, in the order of ``config.tasks``."""
        return torch.arange(len(self.config.tasks), device=self.where.device)

    def each(self, tasks: Sequence[int]) -> Tensor:
        """Return the numbers of these tasks, which :meth:`AdapterTable.forward` takes."""
        return torch.tensor(tasks, dtype=torch.long, device=self.where.device)

    def add_task(self, name: str, init_from: str | list[str] | None = None) -> None:
        """Append a task. The arguments and errors are those of ``TaskEmbeddings.add_task``."""
        self.config = self.config.with_task(name, init_from)

    def of_tasks(self) -> None:
        """The parameters that belong to one task each: none here."""


class AdapterTable(AdapterSource):
    """The learned adapters of one stack: projections for each task and site, layer norms for each site.

    All tasks share the layer norms. ``initialisation.py`` says how both start: in the authors' code the norms are ones
    and zeros, the projections normally distributed with standard deviation 1e-2, and biases zero. Every forward uses
    all adapters, so that each gets a gradient, which is zero for a task that is not in the batch: distributed training
    needs that.

    Args: as for ``HyperNetwork``.
    """

    def __init__(self, config: HyperFormerConfig, d: int, num_layers: int):
        super().__init__(config, d, num_layers)
        # Pairs, because ParameterDict sorts the keys of a plain dict.
        self.adapters = NamedParameters([(name, self._drawn()) for name in config.embedding_names])
        norms = plain_norms(self.layout, Initialisation.of(config))
        self.norms = nn.Parameter(norms.repeat(self.num_sites, 1)) if norms.numel() else None

    def _drawn(self) -> nn.Parameter:
        """New projections [S, P without the norms] of one task."""
        rows = self.layout.numel - self.layout.norm_numel
        drawn = torch.empty(self.num_sites, rows)
        return nn.Parameter(draw_projections(drawn, self.layout, Initialisation.of(self.config)))

    @torch.no_grad()
    def add_task(self, config: HyperFormerConfig, name: str, init_from: str | list[str] | None = None) -> None:
        """Take over ``config``, which has the new task ``name``, and append that task's adapters.

        ``init_from`` is a task whose adapters are copied, a list of tasks whose adapters are averaged, or None for a
        draw as at the start.
        """
        old = next(iter(self.adapters.values()))
        sources = [init_from] if isinstance(init_from, str) else init_from
        if sources is None:
            value = self._drawn().to(old.device, old.dtype)
        else:
            value = torch.stack([self.adapters[self.config.embedding_of(source)] for source in sources]).mean(0)
        self.adapters[name] = nn.Parameter(value)
        self.config = config

    def of_tasks(self) -> NamedParameters:
        """The parameters that belong to one task each, by the names of ``config.embedding_of``."""
        return self.adapters

    def forward(self, task_numbers: Tensor) -> Tensor:
        """Return the packed weights [S, R, P] of the tasks whose numbers are ``task_numbers`` [R]."""
        of_tasks = [self.adapters[self.config.embedding_of(task)] for task in self.config.tasks]
        packed = torch.stack(of_tasks, 1).index_select(1, task_numbers)
        if self.norms is None:
            return packed
        return torch.cat([packed, self.norms.unsqueeze(1).expand(-1, packed.shape[1], -1)], -1)
