"""Whether the fused forward of a class computes what the installed transformers computes there.

The fused forwards follow transformers' code of today. A release that changes what a sublayer does must not be answered
with yesterday's arithmetic, so each class is compared once, on a tiny module: without dropout, and with a dropout that
drops everything, which shows where the dropout stands.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from . import classes
from .layers import PLAN, Plan

_WIDTH, _LENGTH, _HEADS = 8, 3, 2


def why_not(base: type[nn.Module], activation: nn.Module | None = None) -> str:
    """Why the fused forward of a class cannot be trusted with the installed transformers; empty where it can.

    Args:
        base: a class of transformers that can be fused.
        activation: of a feed-forward module, which one class can have with several.
    """
    compared: tuple[Any, Any] = (base, None if activation is None else type(activation))
    return _why_not(*compared)


@functools.lru_cache(maxsize=256)
def _why_not(base: Any, activation: Any) -> str:
    for p in (0.0, 1.0):
        try:
            plain, fused = _both(base, activation, p)
        except Exception as error:  # whatever it is, the class is not what the fused forward was written for
            return f"{base.__name__} of this transformers cannot be compared with its fused form ({error})"
        if not torch.allclose(plain, fused, rtol=1e-4, atol=1e-5):
            return f"{base.__name__} of this transformers computes something else than its fused form"
    return ""


def _both(base: type[nn.Module], activation: type[nn.Module] | None, p: float) -> tuple[Tensor, Tensor]:
    """The results of a tiny module's own forward and of its fused one."""
    with _aside():
        module = _make(base, p)
        if activation is not None:
            module.act = activation()
        x = torch.linspace(-2.0, 3.0, 2 * _LENGTH * _WIDTH).sin().view(2, _LENGTH, _WIDTH)
        arguments = _arguments(base, x)
        plain = module(x, **arguments)
        vars(module)[PLAN] = Plan(adds=True)
        module.__class__ = classes.fused_class(base)
        fused = module(x, **arguments)
    first: Tensor = plain[0] if isinstance(plain, tuple) else plain
    second: Tensor = fused[0] if isinstance(fused, tuple) else fused
    return first, second


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Leave no trace in the caller's random numbers, and take no notice of its modes."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        use_backend("reference"),
    ):
        yield


def _make(base: type[nn.Module], p: float) -> nn.Module:
    kind, module = classes.kind_of(base), sys.modules[base.__module__]
    if kind == classes.NORM:
        norm = base(_WIDTH)
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
        return norm.float()
    make_config = getattr(module, base.__name__.removesuffix(kind or "") + "Config")
    config = make_config(vocab_size=8, d_model=_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=_HEADS, dropout_rate=p)
    config._attn_implementation = "eager"
    takes_layer = "layer_idx" in inspect.signature(base.__init__).parameters
    made: nn.Module = base(config, layer_idx=0) if takes_layer else base(config)
    return made.float().train()


def _arguments(base: type[nn.Module], x: Tensor) -> dict[str, Any]:
    """The arguments of an attention sublayer beside its input, under the names that its class has for them."""
    known = inspect.signature(base.forward).parameters
    given = {
        "attention_mask": torch.zeros(2, 1, 1, _LENGTH),
        "position_bias": torch.zeros(1, _HEADS, _LENGTH, _LENGTH),
        "key_value_states": x.cos(),
        "encoder_hidden_states": x.cos(),
        "cache_position": torch.arange(_LENGTH),
    }
    return {name: value for name, value in given.items() if name in known}
