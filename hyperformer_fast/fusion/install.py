"""Fusing a T5, and undoing it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .. import frozen_head
from . import attention, classes
from .before import BeforeForward, link, stacks_of
from .explain import examine, hook_of
from .layers import PLAN, Plan
from .pieces import Fuse, resolve

_Module = TypeVar("_Module", bound=nn.Module)


def fuse_t5(t5: _Module, pieces: Fuse = "auto") -> _Module:
    """Fuse what stands between the matrix products of a T5. The function and its gradients stay the same.

    Only dropout's random numbers are others: they come from a counter-based generator that torch's own generator seeds,
    so ``torch.manual_seed`` and checkpointing work as before. Modules keep their parameters, names and hooks; what is
    not supported keeps its own forward, and :func:`explain_fusion` says why. A T5 that is fused can be fused again with
    other pieces.

    Args:
        t5: a T5, with any head or none (T5, T5 v1.1, flan-T5, ByT5, mT5, UMT5). It is changed in place.
        pieces: ``"auto"``, True (the same, but what is not supported is an error), or names from ``PIECES``.

    Returns:
        ``t5``.

    Raises:
        ValueError: an unknown piece, or ``pieces`` is True and something is not supported. Nothing has changed then.
        TypeError: ``t5`` has no stack of T5 blocks.
    """
    asked = resolve(pieces, "pieces")
    found = [entry for entry in examine(t5) if entry[2] in asked]
    if pieces is True:
        for name, module, piece, reasons in found:
            if piece not in ("cache", "products") and any(reasons):
                where = f"{name} ({type(module).__name__})"
                raise ValueError(f"piece {piece!r} cannot be fused in {where}, because {''.join(reasons)}")
    unfuse_t5(t5)
    if not asked:
        return t5
    for _, module, piece, (never, _) in found:
        if never or piece == "cache":
            continue
        if piece == "attention":
            attention.switch_on(module)
        elif piece == "loss":
            frozen_head.replace_forward(module)
        else:
            vars(module)[PLAN] = Plan(adds=piece == "dropout")
            module.__class__ = classes.fused_class(type(module))
    hook = BeforeForward(asked, any(piece == "cache" and not never for _, _, piece, (never, _) in found))
    t5.register_forward_pre_hook(hook, with_kwargs=True)
    link(t5)
    return t5


def unfuse_t5(t5: _Module) -> _Module:
    """Undo :func:`fuse_t5`. A T5 that is not fused stays as it is.

    Returns:
        ``t5``.
    """
    for module in t5.modules():
        # The class is left alone where others have made one of their own from it (FSDP2 does). Without a plan it runs
        # the original forward, as does a forward that others have kept (accelerate does).
        vars(module).pop(PLAN, None)
        base = classes.original_class(type(module))
        if base is not None:
            module.__class__ = base
    for stack in stacks_of(t5).values():
        attention.switch_off(stack)
    frozen_head.restore(t5)
    hook = hook_of(t5)
    if hook is not None:
        del t5._forward_pre_hooks[hook[0]]
        t5._forward_pre_hooks_with_kwargs.pop(hook[0], None)
    return t5
