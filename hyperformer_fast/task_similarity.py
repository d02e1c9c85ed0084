"""How far apart the tasks of a model are: their embeddings, the generators' inputs, and the adapters' weights.

No adapter is generated for that. Generated weights are ``W e + b``, so that ``W^T W``, ``W^T b`` and ``b . b`` give all
inner products of generated weights from those of the inputs e, whatever the number of tasks and sites.

Tasks that share an embedding (``task_to_embeddings``) count once.

Letters: S sites of a stack, T tasks, P packed numbers per adapter, Q generators, k width of their inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .adapter_table import AdapterTable
from .hypernetwork import HyperNetwork
from .initialisation import TASK_SHARE, Initialisation, plain_sizes
from .layout import accumulator_dtype
from .sharding import gathered, whole

if TYPE_CHECKING:
    from .config import HyperFormerConfig
    from .hypernetwork import AdapterSource
    from .model import HyperFormerModel

#: Two tasks have collapsed onto each other where the squared distance of their weights is below this part of the
#: weights' mean square.
COLLAPSED = 5e-3

#: Projections that are so many times as large as a plain layer's are worth a word.
_LARGE = 10.0

#: The parts of an adapter that are not norms or biases.
_PROJECTIONS = ("down_weight", "up_weight")

Matrix = NDArray[np.float64]


class Grams(NamedTuple):
    """Inner products [T, T] of what each task has.

    ``own`` are those of the vectors minus their mean over the tasks.
    """

    whole: Matrix
    own: Matrix

    def cosines(self) -> Matrix:
        """The cosines of all pairs, as a vector."""
        return _of_pairs(_cosines(self.whole))

    def own_cosines(self) -> Matrix:
        """The cosines of all pairs of vectors minus the mean over the tasks, which is -1 where there are two."""
        return _of_pairs(_cosines(self.own))

    def distances(self) -> Matrix:
        """The squared distances [T, T] of all pairs, as parts of the two vectors' mean square."""
        # from what differs, because the common part may be so large that its rounding errors exceed the distances
        squares, own = np.diag(self.whole), np.diag(self.own)
        apart = own[:, None] + own - 2 * self.own
        return apart.clip(min=0.0) / np.maximum((squares[:, None] + squares) / 2, np.finfo(np.float64).tiny)

    def variation(self) -> float:
        """The variance over the tasks as a part of the mean square, from 0 (all the same) to 1."""
        return float(np.trace(self.own) / max(float(np.trace(self.whole)), np.finfo(np.float64).tiny))


@dataclasses.dataclass(frozen=True)
class StackSimilarity:
    """The tasks in one stack.

    Args:
        inputs: of the generators' inputs, of all sites together; None where nothing is generated.
        weights: of the adapters' weights, of all sites together, without norms that all tasks share.
        sizes: the root mean square of each of the two projections, over tasks and sites, as a multiple of a plain
            layer's (``initialisation.plain_sizes``; of ``init_weights="authors"`` their 1e-2), by their names in the
            layout. A projection is left out that starts at zero, or that is not there.
        limit: the distance below which two tasks have collapsed onto each other. Where the adapters are generated norms
            alone it is a part of ``COLLAPSED``, because these start as the same plain norm but for ``TASK_SHARE``.
    """

    inputs: Grams | None
    weights: Grams
    sizes: dict[str, float]
    limit: float = COLLAPSED


@dataclasses.dataclass(frozen=True)
class TaskSimilarity:
    """The tasks of a model.

    Args:
        names: of the tasks; those that share an embedding are one, under the first of their names.
        embeddings: of the task embeddings, None where there are none.
        stacks: the tasks in each stack.
        init_weights: that of the configuration, which the sizes of the projections are measured by.
    """

    names: list[str]
    embeddings: Grams | None
    stacks: dict[str, StackSimilarity]
    init_weights: str

    def figures(self) -> dict[str, float]:
        """Numbers for a log, by name.

        Two tasks have no ``own_weight_cosine``: minus their mean, two vectors are each other's negative, so that it
        would be -1 whatever the tasks are.
        """
        found: dict[str, float] = {}
        several = len(self.names) > 1
        if several and self.embeddings is not None:
            found |= _mean_and_max("task_embedding_cosine", self.embeddings.cosines())
        for name, stack in self.stacks.items():
            if several:
                if stack.inputs is not None:
                    found |= _mean_and_max(f"{name}/input_cosine", stack.inputs.cosines())
                found |= _mean_and_max(f"{name}/weight_cosine", stack.weights.cosines())
                if len(self.names) > 2:
                    found |= _mean_and_max(f"{name}/own_weight_cosine", stack.weights.own_cosines())
                found[f"{name}/weight_variation"] = stack.weights.variation()
            found |= {f"{name}/{part}_ratio": size for part, size in stack.sizes.items()}
        return found

    def collapsed(self, besides: Collection[tuple[str, str]] = ()) -> dict[str, list[tuple[str, str]]]:
        """The pairs of tasks whose adapters have become the same, by stack, without the pairs ``besides``."""
        found = {}
        for name, stack in self.stacks.items():
            near = _near(self.names, stack.weights, stack.limit)
            pairs = [pair for pair in near if pair not in besides]
            if pairs:
                found[name] = pairs
        return found


@torch.no_grad()
def task_similarity(model: HyperFormerModel) -> TaskSimilarity:
    """Compare the tasks of a model, as it is now. With sharded parameters (FSDP2) every process must call this."""
    config = model.hyperformer_config
    chosen = _distinct(config)
    names = [config.tasks[i] for i in chosen]
    with gathered(model, model.task_embeddings, *model.hypernetworks.values()):
        tasks = model.task_embeddings()
        tasks = tasks[torch.tensor(chosen, device=tasks.device)]
        embeddings = None
        if config.has_hypernetworks:
            table: Any = model.task_embeddings.task_to_embeddings
            embeddings = _grams(torch.stack([table[config.embedding_of(name)] for name in names]).unsqueeze(0))
        stacks = {name: _of_stack(net, tasks) for name, net in model.hypernetworks.items()}
    return TaskSimilarity(names, embeddings, stacks, str(config.init_weights))


@torch.no_grad()
def copied_tasks(model: HyperFormerModel) -> set[tuple[str, str]]:
    """The pairs of tasks whose own embeddings or adapters are the same now, as where ``add_task`` copied one's.

    With sharded parameters every process must call this.
    """
    config = model.hyperformer_config
    names = [config.tasks[i] for i in _distinct(config)]
    nets: list[Any] = list(model.hypernetworks.values())
    tables: list[Any] = [net.adapters for net in nets if isinstance(net, AdapterTable)]
    if config.has_hypernetworks:
        tables = [model.task_embeddings.task_to_embeddings]
    found: set[tuple[str, str]] = set()
    for table in tables:
        own = [whole(table[config.embedding_of(name)]).flatten() for name in names]
        found.update(_near(names, _grams(torch.stack(own).unsqueeze(0))))
    return found


def collapse_explained(
    similarity: TaskSimilarity,
    learning_rate: float,
    recipe: str,
    collapsed: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> str:
    """Say which tasks have collapsed onto each other, where on their way from embedding to adapter, and what to do.

    Args:
        similarity: the tasks.
        learning_rate, recipe: those of the training.
        collapsed: the pairs to speak of, by stack; None for all that have collapsed.
    """
    said = []
    for stack, pairs in (similarity.collapsed() if collapsed is None else collapsed).items():
        of_stack = similarity.stacks[stack]
        every = len(similarity.names) * (len(similarity.names) - 1) // 2
        first, second = pairs[0]
        i, j = similarity.names.index(first), similarity.names.index(second)
        apart = math.sqrt(of_stack.weights.distances()[i, j])
        who = f"{first!r} and {second!r}" + (f" and {len(pairs) - 1} more of {every} pairs" if len(pairs) > 1 else "")
        if similarity.embeddings is None or of_stack.inputs is None:
            why = "they were trained to be"
        elif similarity.embeddings.distances()[i, j] < COLLAPSED:
            why = "their task embeddings are the same"
        elif of_stack.inputs.distances()[i, j] < COLLAPSED:
            why = "the hypernetwork's projector makes the same of their different embeddings"
        else:
            why = "the part that the generator makes for every task has outgrown the part that it makes of the task"
        said.append(f"in the {stack} the adapters of {who} differ by {100 * apart:.2g} % only, because {why}")
        size = max(of_stack.sizes.values(), default=0.0)
        if size > _LARGE:
            authors = similarity.init_weights == "authors"
            plain = "the standard deviation 1e-2 of the authors' plain layers" if authors else "a plain layer's"
            said[-1] += f", and the size of its projections is {size:.0f} times {plain}"
    cure = f"Lower learning_rate (now {learning_rate:g})"
    if recipe != "default":
        cure += ', or train with recipe "default", which takes smaller steps in weights that tasks share'
    return f"tasks have collapsed onto each other: {'; '.join(said)}. {cure}"


def _distinct(config: HyperFormerConfig) -> list[int]:
    """The numbers of the tasks, without those that share the embedding of an earlier one."""
    first = {config.embedding_of(task): i for i, task in reversed(list(enumerate(config.tasks)))}
    return sorted(first.values())


def _near(names: Sequence[str], grams: Grams, limit: float = COLLAPSED) -> list[tuple[str, str]]:
    """The pairs of tasks whose distance is below the limit."""
    return [(names[t], names[u]) for t, u in np.argwhere(np.triu(grams.distances() < limit, 1))]


def _of_stack(net: nn.Module, tasks: Tensor) -> StackSimilarity:
    with torch.autocast(tasks.device.type, enabled=False):
        return (
            _of_table(net, tasks) if isinstance(net, AdapterTable) else _of_generators(cast(HyperNetwork, net), tasks)
        )


def _of_table(table: AdapterTable, numbers: Tensor) -> StackSimilarity:
    packed = table(numbers)[..., : table.layout.numel - table.layout.norm_numel]
    means = {name: float(packed[..., table.layout.slices[name]].square().mean()) for name in _plain_sizes(table)}
    return StackSimilarity(None, _grams(packed), _sizes(table, means))


def _plain_sizes(net: AdapterSource) -> dict[str, float]:
    return plain_sizes(net.layout, Initialisation.of(net.config))


def _sizes(net: AdapterSource, means: Mapping[str, float]) -> dict[str, float]:
    """The mean squares of the projections as :class:`StackSimilarity` has them."""
    return {name: math.sqrt(max(means[name], 0.0)) / std for name, std in _plain_sizes(net).items()}


def _of_generators(net: HyperNetwork, task_embeddings: Tensor) -> StackSimilarity:
    dtype = accumulator_dtype(net.generator.weight.dtype)
    weight, bias = net.generator.weight.to(dtype), net.generator.bias.to(dtype)
    inputs = net.embeddings(task_embeddings.to(net.generator.weight.dtype)).to(dtype)
    e = inputs.reshape(weight.shape[0], -1, *inputs.shape[1:])  # [Q, S / Q, T, k]
    own, T = e - e.mean(2, keepdim=True), e.shape[2]
    whole, apart, means = e.new_zeros(T, T), e.new_zeros(T, T), {}
    for name, part in net.layout.slices.items():
        if part.stop > weight.shape[1]:
            continue  # a norm that all tasks share
        W, b = weight[:, part], bias[:, part]
        squares = W.mT @ W
        mixed = torch.einsum("qstk,qrk,qr->t", e, W, b)
        of_part = _inner(e, squares) + mixed.unsqueeze(1) + mixed + b.square().sum() * e.shape[1]
        whole += of_part
        apart += _inner(own, squares)
        means[name] = float(of_part.trace()) / (net.num_sites * T * W.shape[1])
    limit = COLLAPSED if any(name in net.layout.slices for name in _PROJECTIONS) else COLLAPSED * TASK_SHARE**2
    return StackSimilarity(_grams(inputs), Grams(_numpy(whole), _numpy(apart)), _sizes(net, means), limit)


def _inner(e: Tensor, squares: Tensor) -> Tensor:
    """The inner products [T, T] of W e [Q, S / Q, T, k], given W^T W [Q, k, k]."""
    return torch.einsum("qstk,qkl,qsul->tu", e, squares, e)


def _grams(vectors: Tensor) -> Grams:
    """The inner products of vectors [S, T, n], over the first and the last dimension."""
    vectors = vectors.to(accumulator_dtype(vectors.dtype))
    own = vectors - vectors.mean(1, keepdim=True)
    return Grams(*(_numpy((each @ each.mT).sum(0)) for each in (vectors, own)))


def _numpy(tensor: Tensor) -> Matrix:
    return tensor.cpu().double().numpy()


def _cosines(gram: Matrix) -> Matrix:
    norms = np.sqrt(np.diag(gram).clip(min=0.0))
    lengths = norms[:, None] * norms
    return np.divide(gram, lengths, out=np.zeros_like(gram), where=lengths > 0)


def _of_pairs(matrix: Matrix) -> Matrix:
    return matrix[np.triu_indices(len(matrix), 1)]


def _mean_and_max(name: str, values: Matrix) -> dict[str, float]:
    return {f"{name}_mean": float(values.mean()), f"{name}_max": float(values.max())}
