"""The adapters' weights that a model keeps from one forward in evaluation to the next.

A forward that trains generates the weights of its tasks anew. One in evaluation without gradients takes those of the
forward before, as long as nothing that they are made of has changed: parameters (stamp.py), configuration, the choice
of a backend. What is kept is never changed, only replaced, so that a forward in another thread goes on with what it
has.

Letters: S sites, T tasks of the model, P packed numbers per adapter.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode as _current_mode

from .backends import choice
from .config import HyperFormerConfig
from .norm_only import NormStack
from .ops import PreparedStack, functorch, products
from .sharding import is_sharded
from .sites import AnyStack, stack_of
from .stamp import Stamp
from .task_choice import Selection, index_on

if TYPE_CHECKING:
    from .model import HyperFormerModel

#: The most bytes that are kept without having been asked for by ``prepare``.
MOST_BYTES = 1 << 30


class MemoryFootprint(NamedTuple):
    """Bytes of a model's tensors, by what they are for."""

    t5: int  #: the T5's parameters and buffers
    hypernetworks: int  #: the hypernetworks' parameters, or the tables of adapters
    task_embeddings: int  #: the tasks' embeddings and what projects them
    prepared: int  #: generated and folded weights that are kept between forwards
    prepared_tasks: int  #: how many tasks these are for

    @property
    def total(self) -> int:
        """All bytes."""
        return self.t5 + self.hypernetworks + self.task_embeddings + self.prepared

    @property
    def prepared_per_task(self) -> int:
        """Bytes of what is kept for one task; 0 where nothing is kept."""
        return self.prepared // self.prepared_tasks if self.prepared_tasks else 0


def bytes_of(tensor: Tensor) -> int:
    """The bytes that a tensor takes: a quantised one passes for one in floating point, and holds others."""
    if type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(bytes_of(getattr(tensor, name)) for name in names)


class Kept(NamedTuple):
    """What a forward takes of the kept weights."""

    stacks: Mapping[str, AnyStack]
    task_index: Tensor | None  #: [B] each sample's place in the stacks' tasks, None: their only one


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Weights of some tasks, and what they were made of."""

    stamp: Stamp
    circumstances: tuple[Any, ...]
    config: HyperFormerConfig
    device: torch.device
    stacks: dict[str, PreparedStack | NormStack]
    tasks: tuple[int, ...]
    places: dict[int, int]  #: task -> place in ``tasks``
    asked: bool  #: by ``prepare``

    def holds(self, model: HyperFormerModel) -> bool:
        """Whether the model would generate the same weights now."""
        return (
            self.circumstances == _circumstances()
            and all(config == self.config for config in _configs(model))
            and self.stamp.holds()
        )

    @property
    def complete(self) -> bool:
        """Whether it has all tasks of the model, in their order."""
        return self.tasks == tuple(range(len(self.config.tasks)))

    def kept(self, selection: Selection) -> Kept | None:
        """What a forward for these tasks takes; None where a task is missing."""
        tasks = selection.tasks
        if tasks is None:
            return Kept(self.stacks, selection.task_index) if self.complete else None
        if not all(task in self.places for task in tasks):
            return None
        if selection.places is None:
            if len(self.tasks) == 1:
                return Kept(self.stacks, None)
            place = self.places[tasks[0]]
            return Kept({name: stack.of_task(place) for name, stack in self.stacks.items()}, None)
        places = [self.places[tasks[place]] for place in selection.places]
        return Kept(self.stacks, index_on(self.device, places))


class PreparedWeights:
    """The weights that one model keeps. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entry: _Entry | None = None

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        return PreparedWeights, ()

    def clear(self) -> None:
        """Let go of everything that is kept. Forwards that run now go on with it."""
        self._entry = None

    def find(self, model: HyperFormerModel, selection: Selection, device: torch.device) -> Kept | None:
        """The weights of the selected tasks: those that are kept, or new ones, which are kept from now on.

        None where the forward must generate them itself, because it trains, or because a change of what they are made
        of could go unnoticed.
        """
        if not _is_plain(device):
            return None
        entry = self._entry
        if entry is not None and not entry.holds(model):
            self.clear()
            entry = None
        if entry is not None and torch.is_grad_enabled() and entry.stamp.requires_grad:
            return None
        kept = entry.kept(selection) if entry is not None else None
        if kept is not None or not _may_keep(device) or torch.is_grad_enabled() and _trains(model):
            return kept
        tasks = self._extent(model, entry, selection)
        if tasks is None:
            return None
        with self._lock:
            if self._entry is not entry:  # another thread was here first
                entry = self._entry
                kept = entry.kept(selection) if entry is not None and entry.holds(model) else None
                if kept is not None:
                    return kept
            try:
                stamp = Stamp((model.task_embeddings, model.hypernetworks))
            except ValueError:
                return None
            asked = entry is not None and entry.asked
            entry = self._entry = _generate(model, tasks, stamp, device, asked)
        return entry.kept(selection)

    def prepare(self, model: HyperFormerModel, tasks: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Generate and fold the weights of these tasks, for inputs of ``dtype``, however many bytes they are.

        Raises:
            RuntimeError: the model is in training mode, or a change of what they are made of could go unnoticed.
        """
        if model.training:
            raise RuntimeError("prepare() is for inference, and this model is in training mode: call eval() first")
        if not _is_plain(device):
            raise RuntimeError(
                "prepare() needs a model whose parameters are whole, on a device and outside of torch.func transforms, "
                "of a dispatch mode and of the capture of a CUDA graph"
            )
        with self._lock:
            try:
                stamp = Stamp((model.task_embeddings, model.hypernetworks))
            except ValueError as error:
                raise RuntimeError(f"prepare() cannot keep the weights of this model up to date: {error}") from None
            entry = _generate(model, tuple(tasks), stamp, device, asked=True)
            for stack in entry.stacks.values():
                stack.make_ready(dtype)
            self._entry = entry
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will read these weights

    def footprint(self) -> tuple[int, int]:
        """The bytes that are kept, and for how many tasks."""
        entry = self._entry
        if entry is None:
            return 0, 0
        return sum(stack.nbytes for stack in entry.stacks.values()), len(entry.tasks)

    @staticmethod
    def _extent(model: HyperFormerModel, entry: _Entry | None, selection: Selection) -> tuple[int, ...] | None:
        """The tasks to generate weights for. None: they would take too much memory.

        Tasks that come one after another are added to those that are there, and as many again, so that the generation
        of all of them takes no more than twice the work of generating them at once.
        """
        every = range(len(model.hyperformer_config.tasks))
        most = MOST_BYTES // max(_bytes_per_task(model), 1)
        asked = tuple(every) if selection.tasks is None else tuple(dict.fromkeys(selection.tasks))
        if len(asked) > most:
            return None
        if entry is None or len(asked) == len(every):
            return asked
        tasks = tuple(dict.fromkeys((*entry.tasks, *asked)))
        goal = min(max(len(tasks), 2 * len(entry.tasks)), len(every))
        if goal > most:
            return None if entry.asked else asked
        if goal == len(every):
            return tuple(every)
        others = (task for task in every if task not in entry.places and task not in asked)
        return (*tasks, *(task for task, _ in zip(others, range(goal - len(tasks)))))


def _configs(model: HyperFormerModel) -> list[HyperFormerConfig]:
    """Every configuration that the generation reads; as a rule they are one object."""
    nets: Any = model.hypernetworks.values()
    found = [model.hyperformer_config, model.task_embeddings.config, *(net.config for net in nets)]
    return list({id(config): config for config in found}.values())


def _circumstances() -> tuple[Any, ...]:
    """What the generated numbers depend on beside the model."""
    return choice.chosen(), choice.epoch, products.precision()


def may_be_prepared(model: HyperFormerModel) -> bool:
    """Whether a forward may look for kept weights. A compiled graph must not contain them, and the replicas of
    nn.DataParallel have no parameters of their own."""
    return not (torch.compiler.is_compiling() or model.training or getattr(model, "_is_replica", False))


def _is_plain(device: torch.device) -> bool:
    """Whether tensors are plain tensors that hold numbers now."""
    return not (
        device.type == "meta"
        or functorch.in_force()
        or _current_mode() is not None
        # a replay would read these weights forever
        or device.type == "cuda"
        and torch.cuda.is_current_stream_capturing()
    )


def _may_keep(device: torch.device) -> bool:
    """Whether weights may be kept without ``prepare``.

    Only a CPU can look at the numbers of a parameter, which change behind autograd's back through ``.data``, without
    waiting for a device; and FSDP fills the same parameters with new numbers in every forward.
    """
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return device.type == "cpu" and (alone or torch.distributed.get_world_size() == 1)


def _trains(model: HyperFormerModel) -> bool:
    return any(p.requires_grad for part in (model.task_embeddings, model.hypernetworks) for p in part.parameters())


def _bytes_per_task(model: HyperFormerModel) -> int:
    """Of packed and of folded weights, in the dtype of the hypernetworks. The factors beside the two projections are
    small."""
    nets: Any = model.hypernetworks.values()
    return sum(2 * 4 * net.num_sites * net.layout.numel for net in nets)


def _generate(
    model: HyperFormerModel, tasks: tuple[int, ...], stamp: Stamp, device: torch.device, asked: bool
) -> _Entry:
    config = model.hyperformer_config.replace()
    nets: Any = model.hypernetworks
    # What is made in inference mode could not be saved for a backward to a trained input.
    with torch.inference_mode(False), torch.no_grad():
        of_tasks: Any = model.task_embeddings
        embeddings = of_tasks.each(tasks)
        packed = {name: net.forward_each(embeddings) for name, net in nets.items()}
        stacks: dict[str, Any] = {
            name: stack_of(packed[name], net.layout, config.non_linearity, kept=True) for name, net in nets.items()
        }
    places = {task: place for place, task in enumerate(tasks)}
    return _Entry(stamp, _circumstances(), config, device, stacks, tasks, places, asked)
