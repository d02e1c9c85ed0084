"""The norm of the next sublayer, made in the pass of the sublayer before it and handed on with its sum.

The next norm takes what was handed on only if it is the norm of that very tensor with that very weight, and neither was
changed since. In every other case it computes its own, so nothing depends on the sublayers' order being what it was
when the T5 was fused.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .classes import BLOCK, is_unchanged, kind_of
from .conditions import any_global_hook, is_weight

_ATTRIBUTE = "_hff_normed"


class _Handed(NamedTuple):
    normed: Tensor
    weight: Tensor
    node: object  #: of the sum in autograd's graph
    state: tuple[int | bool, ...]  #: see ``_state``
    region: object  #: see ``_region``


class Link:
    """What lies between a sublayer and the norm behind it. Modules are held by weak references, and a copy or a pickle
    has none, so that copying a sublayer does not copy its neighbours; the T5's next forward links the copies.

    Args:
        norm: the norm of the next sublayer, or the last norm of the stack.
        after: the modules whose forward hooks see the sum on its way to the norm.
        before: the modules whose forward pre-hooks see it.
        blocks: the blocks that it leaves and enters; none if it stays in one.
    """

    def __init__(
        self,
        norm: nn.Module | None = None,
        after: tuple[nn.Module, ...] = (),
        before: tuple[nn.Module, ...] = (),
        blocks: tuple[nn.Module, ...] = (),
    ):
        self._norm = None if norm is None else weakref.ref(norm)
        self._before = tuple(map(weakref.ref, before))
        self._along = (*map(weakref.ref, after), *self._before)
        self._blocks = tuple(map(weakref.ref, blocks))
        self._classes = tuple(map(type, blocks))

    def __reduce__(self) -> tuple[type[Link], tuple[()]]:
        return Link, ()

    def norm_for(self, hidden: Tensor, y: Tensor) -> nn.Module | None:
        """The norm whose result the sublayer that adds y to ``hidden`` is to make, if it may."""
        norm = None if self._norm is None else self._norm()
        if norm is None or torch.compiler.is_compiling() or y.is_inference() or hidden.is_inference():
            return None  # inference tensors have no versions, by which a change would be noticed
        if hidden.dtype == y.dtype == torch.float16:
            return None  # T5's blocks clamp a sum of this dtype, and what they hand on is another tensor
        if not is_weight(norm._parameters.get("weight"), y) or self._is_watched():
            return None
        return norm

    def _is_watched(self) -> bool:
        """Whether somebody might change the sum in a way that its version does not show, or recomputes it."""
        if any_global_hook():
            return True
        # Loops and not comprehensions: in decoding this takes as long as an op, for each sublayer and token.
        if self._blocks:
            # What is recomputed in the backward must be made within its own block. And a wrapper of a block (FSDP2's
            # class, say) treats the gradients of its weights as complete when the block's backward is.
            for reference, kind in zip(self._blocks, self._classes):
                block = reference()
                if type(block) is not kind:
                    return True
                if block.gradient_checkpointing and block.training:  # type: ignore[union-attr]
                    return True
            if _collector is None and len(self._blocks) > 1 and torch.is_grad_enabled():
                return True  # older transformers record the sums between blocks where nobody can see it
        for reference in self._along:  # a forward hook gets a module's input, too
            if _changes(reference(), "_forward_hooks"):
                return True
        for reference in self._before:
            if _changes(reference(), "_forward_pre_hooks"):
                return True
        return False


#: What says which outputs transformers records now; None where this transformers has another way.
_collector: Any = None
with contextlib.suppress(ImportError):
    from transformers.utils.output_capturing import _active_collector as _collector


def _changes(module: nn.Module | None, hooks: str) -> bool:
    if module is None:
        return True
    attached = module.__dict__[hooks]
    return bool(attached) and any(not _only_records(hook) for hook in attached.values())


def _only_records(hook: Any) -> bool:
    """Whether the hook is transformers' own that records outputs, and nobody can ask for the gradient of a hidden state
    that it records now: the part that flows through a norm that is handed on would be missing in it."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    if not torch.is_grad_enabled():
        return True
    return _collector is not None and "hidden_states" not in (_collector.get() or ())


def _region() -> object:
    """What packs the tensors that autograd saves now, None in an ordinary forward.

    Activation checkpointing packs the tensors of a region, in the forward and in the recomputation, each with functions
    of its own. A norm must be taken in the region that made it, because a recomputation could not take it again.
    """
    if not torch.is_grad_enabled():
        return None
    top = _top_hooks(False)
    return None if top is None else top[0]


#: The only way to ask which hooks are in force; absent, nothing is handed on while gradients are on.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: (object(),))


def _state(hidden: Tensor, weight: Tensor) -> tuple[int | bool, ...]:
    """What of the sum, of the weight and of autograd has to be as it was when the norm was made. A norm that was made
    without gradients, as in a block that somebody checkpoints, would cut them off."""
    return hidden._version, weight._version, hidden.requires_grad, weight.requires_grad, torch.is_grad_enabled()


def hand_on(out: Tensor, normed: Tensor, weight: Tensor) -> None:
    """Attach the norm of ``out`` to it."""
    if not weight.is_inference():
        setattr(out, _ATTRIBUTE, _Handed(normed, weight, out.grad_fn, _state(out, weight), _region()))


def take(hidden: Tensor, weight: Tensor) -> Tensor | None:
    """The norm of ``hidden`` with this weight, if the sublayer before made it. It can be taken once."""
    handed: _Handed | None = hidden.__dict__.pop(_ATTRIBUTE, None)
    if handed is None or handed.weight is not weight or handed.region is not _region():
        return None
    if handed.node is not hidden.grad_fn:
        return None
    return handed.normed if handed.state == _state(hidden, weight) else None


def chain(stack: nn.Module) -> Iterator[tuple[nn.Module, Link]]:
    """Each sublayer of a stack, with its link to the norm behind it."""
    places = [(block, sublayer) for block in stack.block for sublayer in getattr(block, "layer", ())]  # type: ignore[union-attr]
    for (block, sublayer), following in zip(places, [*places[1:], None], strict=True):
        own = is_t5_block(block)
        if following is None:
            norm = getattr(stack, "final_layer_norm", None)
            before: tuple[nn.Module, ...] = ()
            blocks: tuple[nn.Module, ...] = (block,)
        else:
            next_block, next_sublayer = following
            norm = getattr(next_sublayer, "layer_norm", None)
            inside = next_block is block
            own = own and is_t5_block(next_block)
            before = (next_sublayer,) if inside else (next_block, next_sublayer)
            blocks = () if inside else (block, next_block)
        if own and norm is not None:
            yield sublayer, Link(norm, (sublayer, block) if blocks else (sublayer,), (*before, norm), blocks)
        else:
            yield sublayer, Link()


def is_t5_block(module: nn.Module) -> bool:
    """Whether the module is a block of transformers as transformers wrote it."""
    return kind_of(type(module)) == BLOCK and is_unchanged(type(module)) and "forward" not in vars(module)
