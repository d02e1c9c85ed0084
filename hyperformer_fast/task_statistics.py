"""Norms, cosines and conflicts of the tasks' gradients, as means over the backward passes that were watched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .task_choice import index_on

#: How many pairs of tasks are logged by name: those whose gradients point most against each other.
_PAIRS = 10


def cosines(gram: Tensor) -> Tensor:
    """The cosines [T, T] of vectors whose Gram matrix this is; 0 with a vector that is zero."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    lengths = norms.unsqueeze(1) * norms
    return torch.where(lengths > 0, gram / lengths, gram.new_zeros(()))


@dataclasses.dataclass
class TaskStatistics:
    """Sums over the backward passes that were recorded, from which the figures are means.

    Args:
        tasks: T, the tasks of the model.
        sums: by name, tensors [T] or [T, T] on the device of the gradients.
    """

    tasks: int
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def add(self, gram: Tensor, tasks: Sequence[int] | None, clipped: Tensor | None) -> None:
        """Add a backward pass.

        Args:
            gram: the inner products of the gradients of ``tasks``. A task whose gradient is zero was not in the batch,
                and one whose gradient is not finite is left out.
            tasks: numbers of the tasks; None for all.
            clipped: which of them were clipped.
        """
        if tasks is not None:
            index, of_batch = index_on(gram.device, tasks), gram
            gram = of_batch.new_zeros(self.tasks, self.tasks)
            gram[index.unsqueeze(1), index] = of_batch
            if clipped is not None:
                clipped = clipped.new_zeros(self.tasks).index_copy(0, index, clipped)
        norms, similar = gram.diagonal().clamp_min(0).sqrt(), cosines(gram)
        # Overflows of a scaled loss are no part of the training.
        there = (norms > 0) & norms.isfinite()
        both = (there.unsqueeze(1) & there).fill_diagonal_(False)
        zero = gram.new_zeros(())
        found = {
            "passes": there,
            "norms": torch.where(there, norms, zero),
            "pairs": both,
            "cosines": torch.where(both, similar, zero),
            "conflicts": (similar < 0) & both,
        }
        if clipped is not None:
            found["clipped"] = clipped & there
        for name, value in found.items():
            value, before = value.to(gram.dtype), self.sums.get(name)
            self.sums[name] = value if before is None else before.to(value) + value

    def mean(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The mean of a sum over the passes in which the task, or the pair of tasks, occurred; NaN where none did."""
        count = self.sums["pairs" if self.sums[name].dim() == 2 else "passes"]
        return (self.sums[name] / count).double().cpu().numpy()

    def figures(self, names: Sequence[str], meet: bool) -> dict[str, float]:
        """Numbers for a log, by name; NaN where a task did not occur.

        Args:
            names: of the tasks.
            meet: whether tasks train weights together, so that their gradients can conflict.
        """
        if not self.sums:
            return {}
        norms = self.mean("norms")
        total = max(float(np.nansum(norms)), np.finfo(np.float64).tiny)
        found = {f"gradient_norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
        found |= {f"gradient_share/{name}": float(norm) / total for name, norm in zip(names, norms, strict=True)}
        if "clipped" in self.sums:
            found |= {f"clipped/{name}": float(v) for name, v in zip(names, self.mean("clipped"), strict=True)}
        similar, conflicts = self.mean("cosines"), self.mean("conflicts")
        pairs = sorted((similar[i, j], i, j) for i, j in np.argwhere(np.triu(~np.isnan(similar), 1)))
        if pairs and meet:
            found["gradient_cosine_mean"] = float(np.mean([cosine for cosine, _, _ in pairs]))
            found["gradient_cosine_min"] = float(pairs[0][0])
            found["gradient_conflicts"] = float(np.mean([conflicts[i, j] for _, i, j in pairs]))
            found |= {f"gradient_cosine/{names[i]}/{names[j]}": float(c) for c, i, j in pairs[:_PAIRS]}
        return found

    def state(self) -> dict[str, Any]:
        """The sums as plain JSON types."""
        return {name: value.tolist() for name, value in self.sums.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
