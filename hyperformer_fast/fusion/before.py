"""What runs before each forward of a fused T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .handover import chain
from .layers import plan_of


class BeforeForward:
    """Forward pre-hook of a fused T5. An object, so that a copy or a pickle of the T5 has one of its own.

    Args:
        pieces: what was asked for.
        makes_cache: whether the T5's forward makes a cache where it computes a loss, and can be told not to.
    """

    def __init__(self, pieces: frozenset[str], makes_cache: bool):
        self.pieces, self._makes_cache = pieces, makes_cache
        self._linked = False

    def __reduce__(self) -> tuple[type[BeforeForward], tuple[frozenset[str], bool]]:
        return BeforeForward, (self.pieces, self._makes_cache)  # a copy has to link its own modules

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Link the sublayers once, and leave the cache away where nobody reads it."""
        if not self._linked and not torch.compiler.is_compiling():
            link(module)
            self._linked = True
        if self._makes_cache and "cache" in self.pieces and reads_no_cache(module, args, kwargs):
            return args, {**kwargs, "use_cache": False}
        return None


def reads_no_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this forward computes a loss, and its caller has said nothing about key/value caches."""
    if kwargs.get("labels") is None or len(args) > 4:  # the fifth argument and those behind it may be about a cache
        return False
    if kwargs.get("use_cache") is not None or kwargs.get("past_key_values") is not None:
        return False
    # In a tuple, what stands behind the cache would move.
    return_dict = kwargs.get("return_dict")
    if return_dict is None:
        config: Any = getattr(module, "config", None)
        return_dict = getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)
    return bool(return_dict)


def stacks_of(t5: nn.Module) -> dict[str, nn.Module]:
    """The encoder and the decoder of a T5, whatever its head is; the stack itself where ``t5`` is one."""
    if isinstance(getattr(t5, "block", None), nn.ModuleList):
        return {"": t5}
    found: dict[str, nn.Module] = {}
    for name in ("encoder", "decoder"):
        stack: Any = getattr(t5, name, None)
        if stack is None:  # T5ForSequenceClassification and T5ForTokenClassification keep theirs one level down
            stack = getattr(getattr(t5, "transformer", None), name, None)
        if isinstance(getattr(stack, "block", None), nn.ModuleList):
            found[name] = stack
    return found


def link(t5: nn.Module) -> None:
    """Tell each fused sublayer which norm follows."""
    for stack in stacks_of(t5).values():
        for sublayer, found in chain(stack):
            plan = plan_of(sublayer)
            if plan is not None:
                plan.link = found
