"""When a fused forward may run: in every other case the module's own forward runs instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..ops import functorch

#: The dtypes that the kernels serve. float64 is left to transformers, whose layer norm takes its statistics in float32
#: whatever the dtype is.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_hooked(module: nn.Module) -> bool:
    """Whether anything else runs when this module is called: hooks of its own, or a forward of the instance."""
    own = module.__dict__
    return "forward" in own or bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def any_global_hook() -> bool:
    """Whether hooks run at every module of the process."""
    return bool(
        torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def is_plain(x: object) -> bool:
    """Whether x is a tensor that the fused ops compute with as transformers would: an ordinary one of a served dtype,
    outside of functorch transforms, forward-mode AD and torch.jit.trace."""
    return (
        type(x) is Tensor
        and x.dtype in DTYPES
        and not functorch.in_force()
        and (torch.compiler.is_compiling() or not torch.jit.is_tracing())
    )


def is_weight(weight: object, x: Tensor) -> bool:
    """Whether ``weight`` is an ordinary vector that fits x, on its device. A sharded, quantised or offloaded one is
    not."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.shape == x.shape[-1:]  # type: ignore[attr-defined]  # a tensor by the line before
        and weight.dtype in DTYPES  # type: ignore[attr-defined]
        and weight.device == x.device  # type: ignore[attr-defined]
    )


def is_matrix(weight: object) -> bool:
    """Whether ``weight`` is an ordinary matrix. A sharded or quantised one is not."""
    return type(weight) in (nn.Parameter, Tensor) and weight.dim() == 2  # type: ignore[attr-defined]


def drops(dropout: object) -> bool:
    """Whether ``dropout`` is torch's own module with nothing attached to it."""
    return type(dropout) is nn.Dropout and not is_hooked(dropout)
