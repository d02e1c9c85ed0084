"""Whether the parameters of some modules are what they were: what keeps a cache that is made of them from being stale.

Autograd counts the changes of a tensor in its version, but does not count what is written through ``parameter.data``,
nor what an optimizer with ``fused=True`` writes. A stamp therefore looks at the tensors themselves, at their memory and
their versions, and on a CPU also at a few of their numbers; and every step of an optimizer that has one of them, or
another tensor in its memory, voids it. It keeps the memory alive, so that no other tensor can come to lie at the same
address.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
import weakref
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .adapter_table import AdapterTable, TaskNumbers
from .embedding_mark import EmbeddingMark
from .hypernetwork import Generator, HyperNetwork, TaskEmbeddings, TaskProjector
from .names import NamedParameters

#: The classes whose forward depends on nothing but their parameters and arguments. A subclass may do anything.
_KNOWN = frozenset(
    (
        AdapterTable,
        EmbeddingMark,
        Generator,
        HyperNetwork,
        NamedParameters,
        TaskEmbeddings,
        TaskNumbers,
        TaskProjector,
        nn.Embedding,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleDict,
        nn.ReLU,
    )
)

#: How many numbers of a parameter are compared, at least, spread over it evenly; all of a parameter that has no more.
PROBES = 64


class _Tensor:
    """One parameter or buffer, as it was."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version = tensor._version
        self.memory = tensor.detach()  # the same memory, which cannot be freed as long as this lives
        self.probe: Tensor | None = None
        self.found: Tensor | None = None
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            flat = self.memory.view(-1)
            self.probe = flat[:: _stride(flat.numel())]
            self.found = self.probe.clone()

    def holds(self) -> bool:
        """Whether it is what it was."""
        tensor = self.tensor
        return (
            tensor._version == self.version
            and tensor.is_set_to(self.memory)
            # A NaN differs from itself: what is made of it is then made at every forward.
            and (self.probe is None or self.found is None or torch.equal(self.probe, self.found))
        )


def _stride(numel: int) -> int:
    """How far the numbers lie apart that are compared. It has no divisor in common with the sizes of a parameter: one
    that is a multiple of a row's length would look at a single column."""
    stride = max(1, numel // PROBES)
    while math.gcd(stride, numel) > 1:
        stride -= 1
    return stride


class _Module:
    """One module, as it was."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.of: list[dict[str, Any]] = [module._modules, module._parameters, module._buffers]
        self.were = [tuple(each.values()) for each in self.of]

    def holds(self) -> bool:
        """Whether it has the same submodules, parameters and buffers, and still nothing that interferes."""
        return _interference(self.module) is None and all(
            len(now) == len(before) and all(map(operator.is_, now.values(), before))
            for now, before in zip(self.of, self.were)
        )


class Stamp:
    """Modules as they are now.

    Args:
        modules: they and all within them.

    Raises:
        ValueError: saying why changes of these modules could go unnoticed.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        found = list(dict.fromkeys(part for module in modules for part in module.modules()))
        reason = next(filter(None, map(_interference, found)), None)
        if reason is not None:
            raise ValueError(reason)
        each = (t for module in found for t in (*module._parameters.values(), *module._buffers.values()))
        tensors = [t for t in each if t is not None]
        reason = next(filter(None, map(_untraceable, tensors)), None)
        if reason is not None:
            raise ValueError(reason)
        self._modules = [_Module(module) for module in found]
        self._void = False
        self._held: frozenset[tuple[str, int]] = frozenset().union(*map(_held, tensors))
        _watch(self)  # before their numbers are read, because another thread may train
        with torch.inference_mode(False), torch.no_grad():
            self._tensors = [_Tensor(tensor) for tensor in tensors]

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        return (
            not self._void
            and all(part.holds() for part in self._modules)
            and all(part.holds() for part in self._tensors)
        )

    def void(self, changed: Set[tuple[str, int]]) -> None:
        """Hold no longer if one of the tensors, or its memory, is among what was changed."""
        self._void = self._void or not self._held.isdisjoint(changed)

    @property
    def requires_grad(self) -> bool:
        """Whether any of the parameters is trained."""
        return any(part.tensor.requires_grad for part in self._tensors)


#: The stamps that an optimizer's step may void.
_watched: weakref.WeakSet[Stamp] = weakref.WeakSet()
_lock = threading.Lock()


def _watch(stamp: Stamp) -> None:
    _hook_into_optimizers()
    with _lock:
        _watched.add(stamp)


@functools.cache
def _hook_into_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


@torch._disable_dynamo  # torch.compiler.disable would import the compiler now, and every optimizer imports it
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Void the stamps of what ``optimizer`` has."""
    with _lock:
        stamps = list(_watched)
    if stamps:
        changed = {each for group in optimizer.param_groups for tensor in group["params"] for each in _held(tensor)}
        for stamp in stamps:
            stamp.void(changed)


def _held(tensor: Tensor) -> frozenset[tuple[str, int]]:
    """A tensor and its memory: an optimizer may have one flat tensor, of which the parameters are parts."""
    found = {("tensor", id(tensor))}
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        address = 0
    return frozenset(found | {("memory", address)} if address else found)


def _interference(module: nn.Module) -> str | None:
    """What could make the module return other values for the same parameters."""
    if type(module) not in _KNOWN:
        return (
            f"{type(module).__name__} is not a class of hypernetworks, or was changed (sharded, parametrised, wrapped)"
        )
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return f"somebody's hook, or another forward, is in {type(module).__name__}"
    return None


def _untraceable(tensor: Tensor) -> str | None:
    """Why changes of the tensor could go unnoticed."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return f"a parameter is a {type(tensor).__name__}"
    if tensor.is_inference():
        return "the parameters were made in inference mode, where PyTorch does not count their changes"
    return None
