"""The folded weights of all tasks as buffers, and adapters that pick each sample's by its task: plain PyTorch.

Letters: B samples, M rows of a sample, T tasks, P packed numbers per adapter, d width, b bottleneck.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import activate
from ..layout import EPS, AdapterLayout
from ..norm_only import NormLayout
from ..reference import fold


def rows_of(task_index: Tensor, tasks: int) -> Tensor:
    """The rows [B] of a :class:`TaskAdapter`'s weights for samples of these tasks [B]: the task itself, ``tasks`` for
    -1 (no adapter), ``tasks + 1`` for a task that does not exist."""
    exists = (task_index >= 0) & (task_index < tasks)
    return torch.where(exists, task_index, torch.where(task_index == -1, tasks, tasks + 1))


class TaskAdapter(nn.Module):
    """The adapters of one site, for samples of any tasks.

    Beside those of the tasks there are two more rows of weights: zeros, with which x stays as it is, and NaN. So a
    sample without a task, and one whose task does not exist, need no operations of their own.

    Args:
        packed: [T, P], the packed weights.
        layout: their layout.
        activation: of the adapters.
        dtype: that of the x to come, float32 or float64.
    """

    def __init__(self, packed: Tensor, layout: AdapterLayout, activation: str, dtype: torch.dtype):
        super().__init__()
        self.layout, self.activation = layout, activation
        if isinstance(layout, NormLayout):
            parts = {name: part.to(dtype) for name, part in layout.unpack(packed).items()}
        else:
            folded = fold(packed, layout, dtype)
            # In these dtypes no product with a column's scale leaves the range.
            wg = folded.wg * folded.scale.unsqueeze(-1) if layout.post_norm else folded.wg
            parts = {"wd": folded.wd, "wg": wg, "vectors": folded.vectors}
            if layout.post_norm:
                parts["root"] = folded.root
        for name, part in parts.items():
            none = torch.zeros_like(part[:1])
            self.register_buffer(name, torch.cat([part, none, torch.full_like(none, torch.nan)]))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Apply each sample's adapter to x [B, M, d]; ``rows`` [B] are those of :func:`rows_of`."""
        weights = {name: buffer.index_select(0, rows).unsqueeze(1) for name, buffer in self.named_buffers()}
        if isinstance(self.layout, NormLayout):
            return x + self._norms(x, weights)
        d, b = self.layout.d, self.layout.b
        y = F.layer_norm(x, (d,), eps=EPS) if self.layout.pre_norm else x
        vectors = weights["vectors"]
        h = activate(y @ weights["wd"].squeeze(1).mT + vectors[..., :b], self.activation)
        y = h @ weights["wg"].squeeze(1) + vectors[..., b : b + d]
        if not self.layout.post_norm:
            return x + y
        # The reciprocal deviation of the up-projection's output, from the bottleneck (docs/design.md).
        root = weights["root"].squeeze(1)
        q = h @ root[..., :b].mT + root[..., b].unsqueeze(1)
        r = (q.square().sum(-1, keepdim=True) + EPS).rsqrt()
        return x + (y * r + vectors[..., b + d :])

    def _norms(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        y = x
        for norm, on in (("pre", self.layout.pre_norm), ("post", self.layout.post_norm)):
            if on:
                y = F.layer_norm(y, (self.layout.d,), eps=EPS) * weights[f"{norm}_gamma"] + weights[f"{norm}_beta"]
        return y
