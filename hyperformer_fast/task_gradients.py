"""Each task's own gradient of the adapters, read from one backward of a mixed batch, and changed where asked.

A sample reads only the packed weights of its own task. So where dpacked [S, T, P] is the gradient of a stack's packed
weights, ``dpacked[:, t]`` is the gradient of task t's part of the loss. The tasks meet in the generators,
``packed[s, t] = W e[s, t] + b``, where the gradient of task t is

    dW_t = sum over s of dpacked[s, t] (x) e[s, t]        db_t = sum over s of dpacked[s, t]

None of these is made. Their inner products are those of dpacked times those of e:

    <t, u> = sum over s, s' of one generator of (dpacked[s, t] . dpacked[s', u]) (e[s, t] . e[s', u] + 1)

This Gram matrix, over all generators of all stacks, has the norms and cosines of the tasks' gradients. Clipping each
task's gradient, and PCGrad (Yu et al. 2020, arXiv 2001.06782), multiply each task's gradient by one number, which the
matrix gives. So one function in the backward, where dpacked arrives, is all there is: no further forward or backward.
A parameter that is frozen is no part of a gradient: without W the e's drop out of this product, without b the 1.

Adapters that are learned (``AdapterTable``) are their own gradient: ``<t, u>`` is ``dpacked[s, t] . dpacked[s, u]``,
summed over the sites, where both tasks have the same adapters, and else that of the norms alone.

Letters: S sites of a stack, T tasks, P packed numbers per adapter, Q generators, k width of their inputs, n sites of a
generator times tasks, R generated numbers per adapter.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .adapter_table import AdapterTable
from .hypernetwork import HyperNetwork
from .layout import accumulator_dtype
from .task_choice import index_on
from .task_statistics import TaskStatistics

if TYPE_CHECKING:
    from .hypernetwork import AdapterSource
    from .model import HyperFormerModel

#: Makes the inner products [T, T] of the tasks' gradients from dpacked of a stack.
_Gram = Callable[[Tensor], Tensor]

#: What ``surgery`` of :class:`TaskGradients` may be.
SURGERIES = ("none", "pcgrad")


def gram_matrix(
    dpacked: Tensor, inputs: Tensor, generated: int, trained: Collection[str] = ("weight", "bias", "norms")
) -> Tensor:
    """The inner products [T, T] of the tasks' gradients with respect to a stack's generators.

    Args:
        dpacked: [S, T, P], the gradient of the stack's packed weights.
        inputs: [Q, n, k], the generators' inputs, sites first.
        generated: R. The last P - R numbers are the norms of a generator, trained vectors that all tasks share.
        trained: the generators' parameters that are trained.
    """
    S, T, _ = dpacked.shape
    dpacked = dpacked.to(accumulator_dtype(dpacked.dtype))
    Q, inputs = inputs.shape[0], inputs.to(dpacked.dtype)
    own = dpacked[..., :generated].reshape(Q, -1, generated)
    pairs = (own @ own.mT) * ((inputs @ inputs.mT) * ("weight" in trained) + ("bias" in trained))
    norms = dpacked[..., generated:].reshape(Q, S // Q, T, -1).sum(1)
    return pairs.view(Q, S // Q, T, S // Q, T).sum((0, 1, 3)) + _gram_of_sites(norms) * ("norms" in trained)


def gram_of_table(dpacked: Tensor, same: Tensor, generated: int, norms_train: bool = True) -> Tensor:
    """The inner products [T, T] of the tasks' gradients with respect to a stack's table of adapters.

    Args:
        dpacked: [S, T, P], the gradient of the stack's packed weights.
        same: [T, T] booleans, whether two tasks train the same adapters. Others meet in the norms alone.
        generated: R. The last P - R numbers are the norms of a site, trained vectors that all tasks share.
        norms_train: whether the norms are trained.
    """
    dpacked = dpacked.to(accumulator_dtype(dpacked.dtype))
    own = torch.where(same, _gram_of_sites(dpacked[..., :generated]), dpacked.new_zeros(()))
    return own + _gram_of_sites(dpacked[..., generated:]) * norms_train


def _gram_of_sites(vectors: Tensor) -> Tensor:
    """The inner products [T, T] of vectors [S, T, n], which may be empty, summed over S."""
    return (vectors @ vectors.mT).sum(0)


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """What each task's gradient is multiplied by, so that none is longer than ``max_norm``. NaN where a norm is not
    finite, so that a gradient whose norm overflows does not pass for zero."""
    factors = (max_norm / norms).clamp_max(1.0)
    return torch.where(norms.isfinite(), factors, norms.new_full((), math.nan))


def pcgrad_order(T: int, draw: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each of T tasks the other ones in random order, [T, T - 1]. Equal numbers ``draw`` give equal orders."""
    order = np.tile(np.arange(T - 1), (T, 1))
    np.random.default_rng(list(draw)).permuted(order, axis=1, out=order)
    return order + (order >= np.arange(T)[:, None])


def pcgrad_factors(gram: Tensor, order: Tensor) -> Tensor:
    """What each task's gradient is multiplied by [T], so that their sum becomes that of PCGrad.

    PCGrad takes from each task's gradient its projection on every other one that it conflicts with, one after another
    in random order. What it makes of a gradient is a combination of all, so its row in ``mix`` is enough.

    Args:
        gram: [T, T], the inner products of the tasks' gradients.
        order: [T, T - 1], the other tasks of each task, in the order in which they are projected on.
    """
    T = gram.shape[0]
    mix, squares = torch.eye(T, dtype=gram.dtype, device=gram.device), gram.diagonal()
    own = torch.arange(T, device=gram.device)
    for other in order.unbind(1):
        dots = (mix * gram[other]).sum(1)
        mix[own, other] -= torch.where(dots < 0, dots / squares[other], gram.new_zeros(()))
    return mix.sum(0)


class TaskGradients:
    """Reads each task's own gradient of the adapters in a model's backward passes, and changes it where asked.

        watch = TaskGradients(model, max_norm=1.0, surgery="pcgrad")
        with watch.attached():
            model(**batch, task=names).loss.backward()
        watch.statistics.mean("cosines")

    Norms and cosines are those of the gradients of what is trained of the generators' weights and biases, of all
    stacks together. What is changed is all that lies behind the adapters' weights: the generators, the embeddings of
    tasks, layers and positions, and their projectors and norms. Parameters of the T5 that are trained (norms, a head)
    get the plain sum.

    It acts on each backward pass by itself: on every micro-batch of an optimizer step, and in distributed training on
    the gradient of each process before these are averaged. A forward in a graph of torch.compile is not seen; ``seen``
    counts those that were. Nothing is seen where tasks have no gradients of their own (:func:`why_no_gradients`).

    A loss that is scaled makes every gradient longer or shorter, and ``max_norm`` means gradients that are not. Set
    ``scale`` before each backward to what the loss was multiplied by: ``scaler.get_scale()`` of a ``GradScaler``, or
    1 / n where a loss is divided by n batches that are accumulated.

    Args:
        model: the model.
        max_norm: each task's gradient is scaled down to this norm, where it is longer. None: not.
        surgery: ``"pcgrad"``: where the gradients of two tasks point against each other, each loses its projection on
            the other. ``"none"``: nothing.
        seed: of the random order of PCGrad.

    Raises:
        ValueError: an argument is out of its range, or what is asked for makes no sense for this model.
    """

    def __init__(
        self,
        model: HyperFormerModel,
        max_norm: float | None = None,
        surgery: str = "none",
        seed: int | Sequence[int] = 0,
    ):
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm must be above 0 and finite, or None for no clipping, got {max_norm!r}")
        if surgery not in SURGERIES:
            raise ValueError(f"surgery must be one of {', '.join(SURGERIES)}, got {surgery!r}")
        why = why_no_gradients(model)
        if why is not None and max_norm is not None:
            raise ValueError(f"clipping the gradient of each task is impossible here: {why}")
        why = why or why_no_conflicts(model)
        if why is not None and surgery != "none":
            raise ValueError(f"surgery {surgery!r} is impossible here: {why}")
        self.model, self.max_norm, self.surgery = model, max_norm, surgery
        self.seed = [seed] if isinstance(seed, int) else list(seed)
        #: What the loss, and so every gradient, is multiplied by.
        self.scale = 1.0
        #: Whether backward passes are added to ``statistics``.
        self.records = True
        self.statistics = TaskStatistics(len(model.hyperformer_config.tasks))
        #: Backward passes that were seen so far.
        self.seen = 0
        #: Numbers that the order of PCGrad is drawn from, beside the seed, in place of ``seen``.
        self.draw: Sequence[int] = ()

    @contextlib.contextmanager
    def attached(self) -> Iterator[TaskGradients]:
        """Watch the forwards of the model in training mode within a ``with`` block, and their backward passes."""
        before, self.model._task_gradients = self.model._task_gradients, self
        try:
            yield self
        finally:
            self.model._task_gradients = before

    def generate(
        self, nets: Mapping[str, nn.Module], embeddings: Tensor, tasks: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """The packed weights [S, T, P] of each stack, whose gradients will be seen.

        Args:
            nets: the hypernetworks, by stack.
            embeddings: of the tasks.
            tasks: their numbers; None for all tasks of the model.
        """
        if not nets:
            return {}
        if why_no_gradients(self.model) is not None:  # parameters may have been frozen since this was made
            return {name: net(embeddings) for name, net in nets.items()}
        packed: dict[str, Tensor] = {}
        grams: dict[str, _Gram] = {}
        for name, net in nets.items():
            with _inputs_of(net) as found:
                packed[name] = net(embeddings)
            if packed[name].requires_grad:
                grams[name] = _gram_of(cast("AdapterSource", net), found, tasks, embeddings.device)

        def act(*dpacked: Tensor | None) -> tuple[Tensor | None, ...]:
            # a backward that is called within autocast must not round the inner products
            with torch.autocast(embeddings.device.type, enabled=False):
                return self._act(dpacked, list(grams.values()), tasks)

        watched = _tap(act, *(packed[name] for name in grams))
        return {**packed, **dict(zip(grams, watched, strict=True))}

    def _act(
        self,
        dpacked: Sequence[Tensor | None],
        grams: Sequence[_Gram],
        tasks: Sequence[int] | None,
    ) -> tuple[Tensor | None, ...]:
        """Record the gradients of one pass, and return what takes their place."""
        of_stacks = [gram_of(d) for gram_of, d in zip(grams, dpacked, strict=True) if d is not None]
        if not of_stacks:
            return tuple(dpacked)
        gram = torch.stack(of_stacks).sum(0)
        factors = clipped = None
        if self.max_norm is not None:
            factors = clip_factors(gram.diagonal().clamp_min(0).sqrt(), self.max_norm * self.scale)
            clipped = factors < 1
        if self.records:
            self.statistics.add(gram / self.scale**2, tasks, clipped)
        if self.surgery == "pcgrad" and gram.shape[0] > 1:
            if factors is not None:
                gram = gram * factors.unsqueeze(1) * factors
            order = torch.from_numpy(pcgrad_order(gram.shape[0], [*self.seed, *(self.draw or [self.seen])]))
            projected = pcgrad_factors(gram, order.to(gram.device))
            factors = projected if factors is None else factors * projected
        self.seen += 1
        if factors is None:
            return tuple(dpacked)
        by_task = factors.view(1, -1, 1)
        return tuple(None if d is None else d * by_task.to(d.dtype) for d in dpacked)


def why_no_gradients(model: HyperFormerModel) -> str | None:
    """Why the tasks of this model have no gradients that could be told apart; None where they have."""
    nets = list(model.hypernetworks.values())
    if not nets:
        return f'variant "{model.hyperformer_config.variant}" has no adapters, and all tasks train the same weights'
    if not any(_trained_parts(net) for net in nets):
        if all(isinstance(net, AdapterTable) for net in nets):
            return "all adapters are frozen"
        return "the generators are frozen, and each task trains its embedding alone"
    return None


def why_no_conflicts(model: HyperFormerModel) -> str | None:
    """Why no two tasks of this model can want different things of a weight; None where they can."""
    config = model.hyperformer_config
    if len(config.tasks) == 1:
        return "the model has one task only"
    tables = any(isinstance(net, AdapterTable) for net in model.hypernetworks.values())
    if tables and len(config.embedding_names) == len(config.tasks):
        return (
            f'in variant "{config.variant}" each task has adapters of its own here, and tasks share no more of them '
            "than layer norms (task_to_embeddings lets tasks share all)"
        )
    return None


def _trained_parts(net: nn.Module) -> set[str]:
    """The names of the parameters that are trained of a stack's generators or of its table."""
    part = net.generator if isinstance(net, HyperNetwork) else net
    return {name for name, parameter in part.named_parameters() if parameter.requires_grad}


def _gram_of(net: AdapterSource, inputs: Sequence[Tensor], tasks: Sequence[int] | None, device: torch.device) -> _Gram:
    """What makes the inner products of these tasks' gradients of what a stack trains.

    Args:
        net: the stack's hypernetwork or table.
        inputs: what its generators have read; nothing of a table.
        tasks: the tasks' numbers; None for all.
        device: where the gradients will be.
    """
    trained, shared = _trained_parts(net), (net.generator if isinstance(net, HyperNetwork) else net).norms
    # how many of a site's packed numbers are not norms that all tasks share
    generated = net.layout.numel - (0 if shared is None else net.layout.norm_numel)
    if isinstance(net, AdapterTable):
        same = _same_adapters(net, tasks, device)
        return functools.partial(gram_of_table, same=same, generated=generated, norms_train="norms" in trained)
    return functools.partial(gram_matrix, inputs=inputs[0], generated=generated, trained=trained)


def _same_adapters(table: AdapterTable, tasks: Sequence[int] | None, device: torch.device) -> Tensor:
    """Whether two of these tasks (None: of all) train the same adapters, [T, T]."""
    config = table.config
    names = config.tasks if tasks is None else [config.tasks[task] for task in tasks]
    entries = [config.embedding_of(name) for name in names]
    index = index_on(device, [config.embedding_names.index(entry) for entry in entries])
    trains = index_on(device, [int(table.adapters[entry].requires_grad) for entry in entries]).bool()
    return (index.unsqueeze(1) == index) & trains


@contextlib.contextmanager
def _inputs_of(net: nn.Module) -> Iterator[list[Tensor]]:
    """A list that the generators' inputs [Q, n, k] of the forward within the ``with`` block are put into."""
    found: list[Tensor] = []
    if not isinstance(net, HyperNetwork):
        yield found
        return

    def keep(generator: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].detach())

    handle = net.generator.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


_Act = Callable[..., "tuple[Tensor | None, ...]"]


class _Tap(torch.autograd.Function):
    """The identity of several tensors. Its backward runs once all their gradients are there, and replaces them."""

    @staticmethod
    def forward(ctx: Any, act: _Act, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.act = act
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.act(*gradients)


_tap: Callable[..., tuple[Tensor, ...]] = _Tap.apply
