"""The loss of a T5 whose head is frozen, without its logits.

A T5 computes the logits of a whole batch only to make one number of them. Where the head is a plain frozen linear, that
number and its gradient come from ``ops.linear_cross_entropy``, and the head itself is called with no rows. What a
caller finds in place of the logits raises an error that says so, whatever is done with it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.nn.modules.module as every_module
from torch import Tensor, nn

from . import ops
from .fingerprint import is_plain

#: The T5s whose forward is known: what their head reads, and that their loss is the mean over labels other than -100.
_FAMILIES = ("t5", "mt5", "umt5")


class LogitsNotComputed(AttributeError):
    """The logits of a forward were read that computed its loss without them."""


def _refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise LogitsNotComputed(
        "the logits were not computed: in training the loss of a frozen head needs none. Call the model with "
        'output_logits=True, in eval() mode, or without "loss" among the fused pieces'
    )


class NotComputed:
    """Stands where the logits would be, so that a tuple of outputs keeps its order. Every use of it raises
    :class:`LogitsNotComputed`; there is one instance, :data:`NOT_COMPUTED`."""

    def __reduce__(self) -> str:
        return "NOT_COMPUTED"

    def __repr__(self) -> str:
        return "<logits that were not computed>"

    __getattr__ = __getitem__ = __setitem__ = __len__ = __iter__ = __bool__ = __array__ = _refuse
    __float__ = __int__ = __index__ = __neg__ = __abs__ = __contains__ = _refuse
    __torch_function__ = classmethod(_refuse)
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__


NOT_COMPUTED = NotComputed()


class _Local(threading.local):
    def __init__(self) -> None:
        self.captures: tuple[_Capture, ...] = ()


_local = _Local()


class _Capture:
    """While a ``with`` block runs in this thread, what is given to ``head`` is kept, and the head is given no rows."""

    def __init__(self, head: nn.Module):
        self.head = head
        self.hidden: Tensor | None = None

    def __enter__(self) -> _Capture:
        _local.captures = (*_local.captures, self)
        return self

    def __exit__(self, *exception: object) -> None:
        _local.captures = _local.captures[:-1]


class _Hook:
    """Forward pre-hook of a head. An object, not a closure, so that it is pickled and copied with its module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        for capture in _local.captures:
            if capture.head is module:
                (capture.hidden,) = args
                return (args[0].detach()[..., :0, :],)
        return None


def prepare(t5: nn.Module) -> None:
    """Prepare a T5, and the head that it has now, for :func:`with_loss`. Nothing changes for other calls."""
    head = _head(t5)
    if head is not None:
        _take_off(head)
        head.register_forward_pre_hook(_Hook())


def replace_forward(t5: nn.Module) -> None:
    """Prepare a T5, and let its own forward compute the loss without logits in training."""
    prepare(t5)
    base = _base(t5)
    base.forward = LossForward(base)


def restore_forward(t5: nn.Module) -> None:
    """Undo what :func:`replace_forward` does beyond :func:`prepare`."""
    if isinstance(vars(_base(t5)).get("forward"), LossForward):
        del vars(_base(t5))["forward"]


def restore(t5: nn.Module) -> None:
    """Undo :func:`prepare` and :func:`replace_forward`."""
    restore_forward(t5)
    head = _head(t5)
    if head is not None:
        _take_off(head)


def _take_off(head: nn.Module) -> None:
    for key in [key for key, hook in head._forward_pre_hooks.items() if isinstance(hook, _Hook)]:
        del head._forward_pre_hooks[key]


def _head(t5: nn.Module) -> nn.Module | None:
    head = getattr(t5, "lm_head", None)
    return head if isinstance(head, nn.Module) else None


def _is_linear(head: nn.Module) -> bool:
    from .fusion.classes import original_class  # which needs what is here

    return (original_class(type(head)) or type(head)) is nn.Linear


def _base(t5: nn.Module) -> nn.Module:
    """The T5 within PEFT's wrapper of one."""
    base: nn.Module = t5.get_base_model() if hasattr(t5, "get_base_model") else t5  # type: ignore[operator]
    return base


@torch.compiler.assume_constant_result  # a compiler has other names of functions
def _has_its_own_forward(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is the one that its module defines, and not somebody's patch."""
    return (kind.forward.__module__, kind.forward.__qualname__) == (kind.__module__, f"{kind.__name__}.forward")


def why_not(t5: nn.Module, prepared: bool = True, forward: bool = True) -> str | None:
    """Why the loss of this T5 needs its logits now, as the end of a sentence; None where it does not.

    Args:
        t5: a T5.
        prepared: whether it must be prepared.
        forward: whether its forward must be that of its class. (Who is called by what replaced it need not ask.)
    """
    base = _base(t5)
    head, kind = _head(t5), type(base)
    if head is None:
        return f"{kind.__name__} has no lm_head"
    family = kind.__module__.removeprefix("transformers.models.").partition(".")[0]
    if family not in _FAMILIES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not T5ForConditionalGeneration, and may compute another loss"
    if not _has_its_own_forward(kind):
        return f"the forward of {kind.__name__} was replaced"
    if t5 is not base and getattr(getattr(t5, "active_peft_config", None), "is_prompt_learning", False):
        return "PEFT's prompts are put before what the T5 reads, and may change its labels"
    if not _is_linear(head) or head.bias is not None:
        return f"the head is not a plain linear without bias, but {head}"
    if "forward" in vars(head) or (forward and not isinstance(vars(base).get("forward", _OWN), LossForward)):
        return "the forward of the T5 or of its head was replaced"
    others = [hook for hook in head._forward_pre_hooks.values() if not isinstance(hook, _Hook)]
    if prepared and len(others) == len(head._forward_pre_hooks):
        return "the head was put in, or resized, after the T5 was prepared"
    if others or head._forward_hooks or head._backward_hooks or head._backward_pre_hooks:
        return "the head has hooks, which may read or change the logits"
    if t5._forward_hooks or base._forward_hooks or every_module._global_forward_hooks:
        return "the T5 has forward hooks, which may read the logits"
    if type(head.weight) not in (nn.Parameter, Tensor) or not is_plain(head.weight):
        return "the head is quantised or spread over processes"
    if head.weight.requires_grad:
        return "the head is trained"
    return None


class LossForward:
    """The forward of a T5 that computes its loss without logits, in training and where nothing needs them.

    An object in the T5's ``__dict__``, so that it is pickled and copied with its T5.
    """

    def __init__(self, t5: nn.Module):
        self.t5 = t5
        self._names = tuple(self.__signature__.parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the T5's class: transformers looks up the names of arguments."""
        return inspect.signature(type(self.t5).forward.__get__(self.t5))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        t5 = self.t5
        plain = type(t5).forward.__get__(t5)
        given = {**dict(zip(self._names, args)), **kwargs}
        if given.get("labels") is None or not (t5.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        if why_not(t5, forward=False) is not None:
            return plain(*args, **kwargs)
        return with_loss(t5, plain, given, 0.0, None)


#: Stands for the forward of a T5 that has none of its own.
_OWN = LossForward.__new__(LossForward)


def with_loss(t5: nn.Module, call: Callable[..., Any], given: Mapping[str, Any], smoothing: float, items: Any) -> Any:
    """The output of ``call(**given)``, the forward of ``t5``, with its loss, but without logits.

    Args:
        t5: a T5 that is prepared and that :func:`why_not` has nothing against.
        call: the T5, or the forward of its class.
        given: the arguments of a forward, with labels.
        smoothing: of the labels, as in ``torch.nn.functional.cross_entropy``.
        items: what the sum over labels is divided by; None for their number.
    """
    arguments: dict[str, Any] = dict(given)
    labels = arguments.pop("labels")
    if all(arguments.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        shift: Any = t5.prepare_decoder_input_ids_from_labels
        arguments["decoder_input_ids"] = shift(labels)
    head = _head(t5)
    assert head is not None
    with _Capture(head) as capture:
        out = call(**arguments)
    hidden = capture.hidden
    assert hidden is not None
    labels = labels.to(hidden.device)
    weight: Any = head.weight
    if items is None:
        loss = ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)
    else:
        loss = ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, reduction="sum")
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    if isinstance(out, tuple):
        return (loss, NOT_COMPUTED, *out[1:])
    # made anew, because the order of its fields is that in which they were set
    return type(out)(**{**out, "loss": loss, "logits": NOT_COMPUTED})
