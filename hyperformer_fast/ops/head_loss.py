"""The cross-entropy of a frozen head, in chunks: neither the logits nor their gradients of all rows ever exist at once.

A chunk of rows is multiplied by the head, its loss and the gradient of its logits are computed, and that gradient is
multiplied by the head again, so that only the gradient of the hidden states is kept for the backward. This is exact,
because the loss is a sum over rows whose gradient scales with that of the sum. On a CPU rows that do not count are
left out; on a GPU their number would have to be waited for.

Letters: N rows, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import t5_reference as plain
from ..backends import Backend
from ..layout import accumulator_dtype
from . import functorch
from .checks import _floating, _require, _same_device
from .gradients import refuse_second_derivative
from .op import Op
from .pieces_checks import check_label_range
from .pieces_gradients import scaled
from .pieces_registered import piece_backend
from .products import linear
from .public import traced

#: The most bytes that the logits of a chunk take. Smaller chunks were slower, because each reads the whole head twice;
#: larger ones were not faster.
CHUNK_BYTES = 32 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """The label-smoothed cross-entropy of ``hidden @ weight.T``, as ``torch.nn.functional.cross_entropy`` defines it,
    without the logits of the whole batch.

    Args:
        hidden: [..., d] in float32, bfloat16, float16 or float64, already scaled where the T5's head is tied.
        weight: [V, d], the head, in hidden's dtype. It gets no gradient. Under autocast both are cast as for a linear.
        labels: [...] int64 from 0 to V - 1, or ``ignore_index`` for a row that does not count. Another value is an
            error on the CPU; on a GPU, where it is not checked, the loss is NaN or the kernel stops.
        label_smoothing: the share, from 0 to 1, that all V tokens have equally.
        ignore_index: the label of rows that do not count.
        reduction: ``"sum"`` over the rows that count, or their ``"mean"``, which is NaN where none does.
        impl: the name of the backend to use, as in :func:`hyperformer_fast.ops.adapter`.

    Returns:
        The loss, a scalar in float32 (float64 where hidden is).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, a label or ``label_smoothing`` is out of range, or
            ``weight`` requires a gradient.
        BackendError: the backend that is asked for by name cannot serve the call.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight must not require a gradient, because linear_cross_entropy computes none for it: train a head by "
            "torch.nn.functional.cross_entropy of its logits"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
    total = _sum(hidden, weight, labels, float(label_smoothing), ignore_index, impl)
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def _sum(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, ignore: int, impl: str | None) -> Tensor:
    if functorch.in_force():
        if not torch.compiler.is_compiling():
            _check(hidden, weight, labels, smoothing)
            check_label_range(labels, weight.shape[0], ignore)
        functorch.refuse_kernels("cross_entropy_forward", impl)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden, weight).flatten(0, -2)
            return plain.cross_entropy(logits, labels.flatten(), smoothing, ignore).sum()
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    if traced(hidden, weight, labels):
        op = torch.ops.hyperformer_fast.linear_cross_entropy
        total: Tensor = op(hidden, weight, labels, smoothing, ignore, need_grad, impl=impl)[0]
        return total
    _check(hidden, weight, labels, smoothing)
    check_label_range(labels, weight.shape[0], ignore)
    backend = piece_backend("cross_entropy_forward", hidden, impl)
    if not need_grad:
        return _forward(hidden, weight, labels, smoothing, ignore, False, backend)[0]
    return _apply(hidden, weight, labels, smoothing, ignore, backend)


@torch.no_grad()
def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, ignore: int, need_grad: bool, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' losses, and its gradient with respect to ``hidden`` if it is needed."""
    V, d = weight.shape
    x, y, head = hidden.detach().reshape(-1, d), labels.reshape(-1), weight.detach()
    kept = None
    if x.device.type == "cpu":
        counts = y != ignore
        if not bool(counts.all()):
            kept = counts.nonzero().squeeze(1)
            x, y = x[kept], y[kept]
    rows = x.shape[0]
    losses = x.new_empty(rows, dtype=accumulator_dtype(x.dtype))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad else x.new_empty(0)
    most = max(1, CHUNK_BYTES // (V * x.element_size()))
    chunks = -(-rows // most)
    with torch.autocast(x.device.type, enabled=False):
        for i in range(chunks):
            # chunks of nearly one size, because a last one of a few rows would read the head for little
            part = slice(rows * i // chunks, rows * (i + 1) // chunks)
            logits = linear(x[part], head)
            loss, dlogits = backend.cross_entropy_forward(logits, y[part], smoothing, ignore, need_grad)
            losses[part] = loss
            del logits, loss
            if need_grad:
                dx[part] = linear(dlogits, head.t())
            del dlogits
    if need_grad and kept is not None:
        dx = x.new_zeros(hidden.numel() // d, d).index_copy_(0, kept, dx)
    return losses.sum(), dx.reshape(hidden.shape) if need_grad else dx


def _refuse(g: Tensor) -> None:
    refuse_second_derivative(g, "ops.linear_cross_entropy", "torch.nn.functional.cross_entropy")


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> None:
    _floating("hidden", hidden)
    _require(hidden.dim() >= 1, lambda: "hidden must be [..., d], got a scalar")
    _require(weight.dim() == 2, lambda: f"weight must be [V, d], got {list(weight.shape)}")
    _require(
        weight.shape[1] == hidden.shape[-1],
        lambda: f"weight must be [V, {hidden.shape[-1]}] for hidden of that width, got {list(weight.shape)}",
    )
    _require(weight.dtype == hidden.dtype, lambda: f"weight must have hidden's {hidden.dtype}, got {weight.dtype}")
    _require(labels.dtype == torch.int64, lambda: f"labels must be int64, got {labels.dtype}")
    _require(
        labels.shape == hidden.shape[:-1],
        lambda: f"labels must be {list(hidden.shape[:-1])}, one for each row of hidden, got {list(labels.shape)}",
    )
    _same_device(hidden=hidden, weight=weight, labels=labels)
    _require(0 <= smoothing <= 1, lambda: f"label_smoothing must be from 0 to 1, got {smoothing}")


class _LinearCrossEntropy(torch.autograd.Function):
    """The autograd function of ``linear_cross_entropy``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, ignore: int, backend: Backend
    ) -> Tensor:
        total, gradient = _forward(hidden, weight, labels, smoothing, ignore, True, backend)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _refuse(g)
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, g), None, None, None, None, None


_apply: Callable[..., Tensor] = _LinearCrossEntropy.apply

registered = Op(
    "linear_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor labels, float label_smoothing, int ignore_index, bool need_grad",
    "Tensor loss, Tensor gradient",
)


@registered.implement
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, ignore: int, need_grad: bool, impl: str | None
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, labels, smoothing)
    check_label_range(labels, weight.shape[0], ignore)
    return _forward(
        hidden, weight, labels, smoothing, ignore, need_grad, piece_backend("cross_entropy_forward", hidden, impl)
    )


@registered.fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, ignore: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, labels, smoothing)
    gradient = hidden.new_empty(hidden.shape if need_grad else (0,))
    return hidden.new_empty((), dtype=accumulator_dtype(hidden.dtype)), gradient


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    _refuse(g)
    (gradient,) = ctx.saved_tensors
    return (scaled(gradient, g),)


registered.differentiate(_setup, _backward)
