"""Parameters that are spread over several processes (FSDP2): read as a whole, written as a whole, and tied ones found
in one module.

Every process must call these functions, for the same tensors in the same order: they communicate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only its part of ``tensor``."""
    # A DTensor cannot exist unless its module was imported; importing it takes a second.
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def is_fsdp2(module: nn.Module) -> bool:
    """Return whether ``torch.distributed.fsdp.fully_shard`` was applied to ``module`` itself."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return the values of ``tensor`` from all processes, as a plain tensor."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


@contextlib.contextmanager
def gathered(module: nn.Module, *parts: nn.Module) -> Iterator[None]:
    """Give ``parts`` of a module whole parameters within a ``with`` block, whether FSDP2 shards them by themselves or
    as the rest of ``module``."""
    of_parts = (each for part in parts for each in part.modules())
    found: list[Any] = [each for each in dict.fromkeys((module, *of_parts)) if is_fsdp2(each)]
    for each in found:
        each.unshard()
    try:
        yield
    finally:
        for each in found:
            each.reshard()


@torch.no_grad()
def spread(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value``, which every process has as a whole, spread over the processes as ``like`` is."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    value = value.to(sharded.device_mesh.device_type)
    # None: nothing is sent, because every process cuts its part from its own copy.
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this process holds."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def whole_state(module: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """Return the ``state_dict`` of a sharded module as a whole, on the CPU.

    Args:
        module: the module.
        everywhere: return it on every process. False: the others than the first get an empty one.
    """
    kept = everywhere or torch.distributed.get_rank() == 0
    gathered: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            value = whole(tensor.detach()) if is_sharded(tensor) else tensor.detach()
            gathered[id(tensor)] = value.cpu() if kept else value.new_empty(0)
        if kept:
            found[name] = gathered[id(tensor)]
    return found


def whole_optimizer_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` with all its tensors as a whole and on the CPU, as one process saves it."""

    def gathered(value: Any) -> Any:
        return whole(value).cpu() if isinstance(value, Tensor) and is_sharded(value) else value

    moments = {index: {name: gathered(v) for name, v in each.items()} for index, each in state["state"].items()}
    return {**state, "state": moments}


def spread_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a whole ``state_dict`` of an optimizer, spread over the processes as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: spread(value, parameters[index]) if _is_moment(value, parameters[index]) else value
            for name, value in each.items()
        }
        for index, each in state["state"].items()
    }
    return {**state, "state": moments}


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def share_embeddings(t5: nn.Module) -> dict[str, nn.Module]:
    """Make the embeddings of a T5's stacks the very module ``shared`` where they have its weight.

    transformers 5 gives each stack a module of its own, with the same parameter in it. FSDP2 cannot shard a parameter
    that it finds in two units, and accelerate makes a unit of ``shared`` and the head alone.

    Returns:
        The modules that were replaced, by the names of their stacks, for :func:`separate_embeddings`.
    """
    shared, replaced = getattr(t5, "shared", None), {}
    for name in ("encoder", "decoder"):
        stack: Any = getattr(t5, name, None)
        own = getattr(stack, "embed_tokens", None)
        if own is not None and own is not shared and _is_twin(own, shared):
            replaced[name] = own
            stack.embed_tokens = shared
    return replaced


def separate_embeddings(t5: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Undo :func:`share_embeddings`, except where the embeddings were replaced since (resized, say)."""
    shared: Any = getattr(t5, "shared", None)
    for name, own in replaced.items():
        stack: Any = getattr(t5, name)
        if stack.embed_tokens is shared and shared.weight.shape == own.weight.shape:
            own.weight = shared.weight
            stack.embed_tokens = own


def _is_twin(own: Any, shared: Any) -> bool:
    """Whether the two compute the same, now and later, so that one can take the other's place unseen."""
    if type(own) is not nn.Embedding or type(shared) is not nn.Embedding or own.weight is not shared.weight:
        return False
    settings = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    hooked = any(each._forward_hooks or each._forward_pre_hooks or hasattr(each, "_hf_hook") for each in (own, shared))
    return not hooked and all(getattr(own, name) == getattr(shared, name) for name in settings)
