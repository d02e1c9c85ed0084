"""The classes of T5's modules that can be fused, and the fused class of each.

A module is fused by giving the instance the fused class, a subclass of its own class with another ``forward``. Its
attributes, parameters and hooks stay as they are, ``isinstance`` holds, and copying, pickling and compiling treat it as
any other module. Nothing is bound to one instance, so a copy can never run the module that it was copied from.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

#: The name of a class's prefix -> the module of transformers that defines the classes.
_FAMILIES = {
    prefix: f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}" for prefix in ("T5", "MT5", "UMT5")
}

#: The kinds of modules, by the end of the class's name.
NORM, DENSE, GATED = "LayerNorm", "DenseActDense", "DenseGatedActDense"
FEED_FORWARD, SELF_ATTENTION, CROSS_ATTENTION = "LayerFF", "LayerSelfAttention", "LayerCrossAttention"
ATTENTION, BLOCK, STACK = "Attention", "Block", "Stack"
KINDS = (NORM, DENSE, GATED, FEED_FORWARD, SELF_ATTENTION, CROSS_ATTENTION, ATTENTION, BLOCK, STACK)
#: torch's own dropout, of which a stack has one, and its linear.
DROPOUT, LINEAR = "Dropout", "Linear"
_OF_TORCH: dict[type, str] = {nn.Dropout: DROPOUT, nn.Linear: LINEAR}

#: The kinds that get another forward, and what makes it from the original class; filled by layers.py.
FORWARDS: dict[str, Callable[[type[nn.Module]], Callable[..., Any]]] = {}

_PREFIX = "Fused"
_classes: dict[str, type[nn.Module]] = {}


def kind_of(cls: type) -> str | None:
    """The kind of an original class of transformers, or of a module of torch; None for any other class."""
    if cls in _OF_TORCH:
        return _OF_TORCH[cls]
    family = next((prefix for prefix, module in _FAMILIES.items() if module == cls.__module__), None)
    if family is None or getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls:
        return None
    kind = cls.__name__.removeprefix(family)
    return kind if kind in KINDS else None


def is_unchanged(cls: type[nn.Module]) -> bool:
    """Whether the forward of an original class is the one that transformers defines, and not somebody's patch of it."""
    forward = cls.__dict__.get("forward")
    if cls in _OF_TORCH:
        return True
    written = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
    return written == (cls.__module__, f"{cls.__name__}.forward")


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The fused class of an original one, always the same."""
    name = _PREFIX + base.__name__
    if name not in _classes:
        body = {
            "__doc__": f"{base.__name__}, fused; see ``fuse_t5``.",
            "__module__": __name__,
            "forward": FORWARDS[_kind(base)](base),
        }
        if base is nn.Linear:
            body["qconfig"] = property(fset=_refuse_to_be_quantised)
        _classes.setdefault(name, type(name, (base,), body))
    return _classes[name]


def _refuse_to_be_quantised(module: nn.Module, value: object) -> None:
    # torch.ao.quantization marks modules like this, and then passes over all that are not of nn.Linear's very class.
    raise RuntimeError(
        "torch.ao.quantization does not find the linears of a fused T5: call unfuse_t5(t5) before it, "
        "and fuse_t5(t5) after it"
    )


def _kind(base: type[nn.Module]) -> str:
    kind = kind_of(base)
    assert kind is not None
    return kind


def original_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The original of a fused class, None for any other class."""
    if _classes.get(cls.__name__) is not cls:
        return None
    base: type[nn.Module] = cls.__bases__[0]
    return base


@functools.cache
def _family_of(name: str) -> Any:
    if name in _OF_TORCH.values():
        return nn
    for prefix, module in _FAMILIES.items():
        if name.startswith(prefix) and name.removeprefix(prefix) in FORWARDS:
            return import_module(module)
    return None


def __getattr__(name: str) -> Any:
    # How pickle finds the class of a fused module in another process.
    base = getattr(_family_of(name.removeprefix(_PREFIX)), name.removeprefix(_PREFIX), None)
    if not name.startswith(_PREFIX) or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return fused_class(base)
