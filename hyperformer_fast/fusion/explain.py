"""What of a T5 is fused, what could be, and why the rest is not."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import frozen_head
from ..ops import products
from . import attention, classes, selftest
from .before import BeforeForward, stacks_of
from .conditions import DTYPES, drops, is_hooked, is_matrix
from .layers import activation_of, plan_of
from .pieces import PIECES

_FOREIGN = "is not a class of transformers' T5, mT5 or UMT5"
_NOT_TORCH = "is not torch's dropout"

#: What keeps a module from being fused at all, and what only keeps its fused forward from running now.
Reasons = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """Whether one piece is fused in one module."""

    name: str  #: the module's name in the T5, empty for the T5 itself
    type: str  #: the name of its class
    piece: str
    fused: bool
    reason: str  #: why it is not fused; empty where it is

    def __str__(self) -> str:
        said = "fused" if self.fused else f"not fused, because {self.reason}"
        return f"{self.name or 'the T5'} ({self.type}), {self.piece}: {said}"


class FusionReport(tuple[ModuleReport, ...]):
    """One :class:`ModuleReport` for each module and piece. As text: one line for each piece, and the reasons."""

    def __str__(self) -> str:
        lines = []
        for piece in PIECES:
            of_piece = [report for report in self if report.piece == piece]
            if of_piece:
                lines.append(f"{piece}: fused in {sum(r.fused for r in of_piece)} of {len(of_piece)} modules")
            reasons: dict[str, list[str]] = {}
            for report in of_piece:
                if not report.fused:
                    reasons.setdefault(report.reason, []).append(report.name or "the T5")
            for reason, names in reasons.items():
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                lines.append(f"  not in {names[0]}{more}: {reason}")
        return "\n".join(lines)


def explain_fusion(t5: nn.Module) -> FusionReport:
    """Tell for each module of a T5 which pieces are fused in it, and why the others are not.

    Args:
        t5: a T5, fused or not.

    Raises:
        TypeError: it has no stack of T5 blocks.
    """
    asked = pieces_of(t5)
    reports = []
    for name, module, piece, (never, now) in examine(t5):
        wanted = piece in asked
        fused = wanted and not (never or now) and _is_fused(t5, module, piece)
        reason = "" if fused else never or now or ("it was changed since" if wanted else "it was not asked for")
        reports.append(ModuleReport(name, type(module).__name__, piece, fused, reason))
    return FusionReport(reports)


def pieces_of(t5: nn.Module) -> frozenset[str]:
    """The pieces that were asked for; none where the T5 was not fused."""
    hook = hook_of(t5)
    return frozenset() if hook is None else hook[1].pieces


def hook_of(t5: nn.Module) -> tuple[int, BeforeForward] | None:
    """The pre-hook of a fused T5, with its key."""
    found = [(key, hook) for key, hook in t5._forward_pre_hooks.items() if isinstance(hook, BeforeForward)]
    return found[0] if found else None


def _is_fused(t5: nn.Module, module: nn.Module, piece: str) -> bool:
    if piece == "attention":
        return attention.is_on(module)
    if piece in ("cache", "loss"):
        return True
    plan = plan_of(module)
    return plan is not None and (piece != "dropout" or plan.adds)


def examine(t5: nn.Module) -> Iterator[tuple[str, nn.Module, str, Reasons]]:
    """Each module and piece: the module's name, and what keeps the piece from being fused in it."""
    stacks = stacks_of(t5)
    if not stacks:
        raise TypeError(f"only a T5 with an encoder or decoder of T5 blocks can be fused; {type(t5).__name__} has none")
    names = {module: name for name, module in t5.named_modules()}
    for stack in stacks.values():
        yield names[stack], stack, "attention", (attention.why_not(stack) or "", "")
        for block in stack.block:  # type: ignore[union-attr]
            for sublayer in getattr(block, "layer", None) or ():
                norm, dense = getattr(sublayer, "layer_norm", None), getattr(sublayer, "DenseReluDense", None)
                yield names[sublayer], sublayer, "dropout", _sublayer(sublayer)
                if norm is not None:
                    yield names[norm], norm, "norm", _of_class(norm, classes.NORM)
                if dense is not None:
                    yield names[dense], dense, "feed_forward", _dense(dense)
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    yield names[module], module, "products", _product(module)
        dropout, norm = getattr(stack, "dropout", None), getattr(stack, "final_layer_norm", None)
        if dropout is not None:
            known = classes.kind_of(type(stack)) == classes.STACK
            never = _of_class(dropout, classes.DROPOUT) if known else (f"{type(stack).__name__} {_FOREIGN}", "")
            yield names[dropout], dropout, "dropout", never
        if norm is not None:
            yield names[norm], norm, "norm", _of_class(norm, classes.NORM)
    head = getattr(t5, "lm_head", None)
    if isinstance(head, nn.Linear):
        yield names[head], head, "products", _product(head)
    yield "", t5, "cache", (_cache(t5), "")
    yield "", t5, "loss", _loss(t5)


def _of_class(module: Any, *kinds: str) -> Reasons:
    cls = type(module)
    base = classes.original_class(cls) or cls
    if classes.kind_of(base) not in kinds:
        return f"{cls.__name__} {_NOT_TORCH if kinds == (classes.DROPOUT,) else _FOREIGN}", ""
    if not classes.is_unchanged(base):
        return f"the forward of {base.__name__} was replaced", ""
    if "forward" in vars(module):
        return "its forward was replaced (by accelerate, say)", ""
    known_act = hasattr(module, "act") and activation_of(module.act) is not None
    if kinds == (classes.DROPOUT,):
        return "", ""
    if reason := selftest.why_not(base, module.act if known_act else None):
        return reason, ""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    if dtype is not None and dtype not in DTYPES:
        return "", f"transformers computes {str(dtype).removeprefix('torch.')}"
    return "", ""


def _product(module: nn.Linear) -> Reasons:
    cls = type(module)
    if (classes.original_class(cls) or cls) is not nn.Linear:
        return f"{cls.__name__} is not torch's linear", ""
    if "forward" in vars(module):
        return "its forward was replaced (by accelerate, say)", ""
    if reason := products.why_not():
        return reason, ""
    if module.bias is not None:
        return "it has a bias", ""
    if not is_matrix(module.weight) or module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return "", "its weight is not an ordinary float32 matrix on a CPU"
    return (
        "",
        "its weight is trained, so that only forwards without gradients take it" if module.weight.requires_grad else "",
    )


def _sublayer(module: nn.Module) -> Reasons:
    never, now = _of_class(module, classes.FEED_FORWARD, classes.SELF_ATTENTION, classes.CROSS_ATTENTION)
    return never, now or _dropout(module)


def _dense(module: Any) -> Reasons:
    never, now = _of_class(module, classes.DENSE, classes.GATED)
    if not never and activation_of(module.act) is None:
        now = f"no fused op has its activation, {type(module.act).__name__}"
    elif not never and is_hooked(module.act):
        now = "its activation has hooks or another forward"
    return never, now or (_dropout(module) if not never else "")


def _dropout(module: Any) -> str:
    return "" if drops(getattr(module, "dropout", None)) else "its dropout is not torch's, or has hooks"


def _loss(t5: nn.Module) -> Reasons:
    if getattr(t5, "lm_head", None) is None:
        return f"{type(t5).__name__} has no lm_head", ""
    return "", frozen_head.why_not(t5, prepared="loss" in pieces_of(t5)) or ""


def _cache(t5: nn.Module) -> str:
    # A wrapper (PEFT's, say) hands its arguments on to the T5 that it wraps.
    unwrap: Any = getattr(t5, "get_base_model", lambda: t5)
    inner = unwrap()
    if {"labels", "use_cache"} <= inspect.signature(inner.forward).parameters.keys():
        return ""
    return f"{type(inner).__name__} makes no cache where it computes a loss"
