"""Where the adapters sit in a T5, and how each finds the weights of the forward that it runs in.

Forward hooks on ``SelfAttention`` and ``DenseReluDense`` of every block of a stack put an adapter behind them, before
T5's own dropout and residual add (paper section 2); the decoder's cross-attention has none. The T5's modules, and so
its ``state_dict`` keys, stay what they are. All weights of one forward lie in one :class:`ForwardContext`, active in
the calling thread while that forward runs, and again while gradient checkpointing recomputes a block of that very
forward. The context counts the sites that ran, so that a forward whose hooks are gone cannot pass for one with
adapters.

Letters: B samples, S sites of a stack, T tasks, P packed numbers per adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import ops
from .gradient_flow import CANNOT_TRAIN
from .hypernetwork import POSITIONS
from .norm_only import NormLayout, NormStack

if TYPE_CHECKING:
    from .hypernetwork import AdapterSource
    from .layout import AdapterLayout

STACKS = ("encoder", "decoder")
_FLOAT16_MAX = torch.finfo(torch.float16).max


class _Local(threading.local):
    """Per thread: one process may serve several requests at once, and CUDA's autograd recomputes checkpoints on threads
    of its own."""

    def __init__(self) -> None:
        # Set from the start, because a compiled forward guards on whether the attribute exists.
        self.contexts: tuple[ForwardContext, ...] = ()


_local = _Local()


class Site(NamedTuple):
    """A place for an adapter: the output of ``module``, behind ``position`` of block ``layer``."""

    stack: str
    layer: int
    position: str
    module: nn.Module


def find_sites(t5: nn.Module) -> list[Site]:
    """Every adapter site of a T5 (T5, T5 v1.1, mT5; with or without decoder or head).

    Raises:
        TypeError: naming the class, where it is not built like a T5.
        ValueError: it holds adapters of a :class:`HyperFormerModel` already, or one block stands in two places.
    """
    sites = []
    for stack in STACKS:
        module = getattr(t5, stack, None)
        if module is None:  # T5ForSequenceClassification and T5ForTokenClassification keep theirs one level down
            module = getattr(getattr(t5, "transformer", None), stack, None)
        if module is None:
            continue
        for layer, block in enumerate(getattr(module, "block", ())):
            sublayers = getattr(block, "layer", None) or (None,)
            attention = getattr(sublayers[0], "SelfAttention", None)
            feed_forward = getattr(sublayers[-1], "DenseReluDense", None)
            if attention is None or feed_forward is None:
                raise TypeError(
                    f"{type(t5).__name__}: block {layer} of its {stack} is not a T5 block, but {type(block).__name__}"
                )
            sites += [Site(stack, layer, "self_attention", attention), Site(stack, layer, "feed_forward", feed_forward)]
    if not any(site.stack == "encoder" for site in sites):
        raise TypeError(
            "HyperFormer adapters go into a T5 (T5ForConditionalGeneration, MT5ForConditionalGeneration, T5Model, "
            f"T5EncoderModel), whose encoder and decoder have T5 blocks; {type(t5).__name__} has none"
        )
    if len({id(site.module) for site in sites}) < len(sites):
        raise ValueError(
            f"a block of this {type(t5).__name__} stands in two places, but each place has an adapter of its own: "
            "give every layer a block of its own"
        )
    for site in sites:
        if any(isinstance(hook, _Hook) for hook in site.module._forward_hooks.values()):
            raise ValueError(
                f"this {type(t5).__name__} has HyperFormer adapters already: unload() the model that put them there"
            )
    return sites


class Owner:
    """Identity of one set of installed adapters; a context serves the hooks of its own owner only."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self, sites: list[Site], hypernetworks: nn.ModuleDict) -> None:
        """Hook every site; the hypernetworks number them."""
        self.sites = sites
        for site in sites:
            index = cast("AdapterSource", hypernetworks[site.stack]).site(site.layer, site.position)
            self.handles.append(site.module.register_forward_hook(_Hook(self, site, index)))

    def missing(self, t5: nn.Module) -> Site | None:
        """The first site whose module is no longer part of ``t5``."""
        modules = set(t5.modules())
        return next((site for site in self.sites if site.module not in modules), None)

    def remove(self) -> None:
        """Take all hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


#: What runs the adapters of a stack.
AnyStack = ops.Stack | NormStack


def stack_of(packed: Tensor, layout: AdapterLayout, activation: str, kept: bool = False) -> AnyStack:
    """The adapters whose packed weights [S, T, P] these are; ``kept`` for many forwards, and not trained."""
    if isinstance(layout, NormLayout):
        return NormStack(packed, layout, activation)
    return (ops.PreparedStack if kept else ops.Stack)(packed, layout, activation)


class StackWeights:
    """The weights of one stack in one forward.

    Args:
        net: the stack's hypernetwork, or its table of adapters.
        packed: [S, T, P], what it returned; or the stack of weights that are kept between forwards.
        activation: of the adapters.
    """

    def __init__(self, net: AdapterSource, packed: Tensor | AnyStack, activation: str):
        self.num_layers = net.num_layers
        self._ran = 0
        self._stack = stack_of(packed, net.layout, activation) if isinstance(packed, Tensor) else packed
        self._device = self._stack.packed.device
        #: The same weights, and task indices, on other devices, where a T5 is spread over several.
        self._elsewhere: dict[torch.device, AnyStack] = {}
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def trains(self) -> bool:
        """Whether a backward is to reach these weights."""
        return self._stack.trains

    def first_not_run(self) -> int | None:
        """The first site whose adapter was not called in this forward; None where all were."""
        sites = len(self._stack)
        if self._ran == (1 << sites) - 1:
            return None
        return next(site for site in range(sites) if not self._ran >> site & 1)

    def _on(self, device: torch.device) -> AnyStack:
        """The stack on another device: weights copied there once per forward, and their gradient copied back."""
        if device not in self._elsewhere:
            packed = self._stack.packed.to(device)
            self._elsewhere[device] = stack_of(packed, self._stack.layout, self._stack.activation)
        return self._elsewhere[device]

    def _index_on(self, device: torch.device, task_index: Tensor) -> Tensor:
        """``task_index`` [B] on another device, copied once per forward."""
        source, moved = self._moved.get(device, (None, None))
        if source is not task_index or moved is None:
            moved = task_index.to(device)
            self._moved[device] = task_index, moved
        return moved

    @classmethod
    def kept(cls, net: AdapterSource, stack: AnyStack) -> StackWeights:
        """The weights of a stack that are kept between forwards."""
        return (_KeptWeights if isinstance(stack, ops.PreparedStack) else cls)(net, stack, stack.activation)

    def adapt(self, x: Tensor, site: int, task_index: Tensor | None) -> Tensor:
        """The adapter of ``site`` applied to x [B, ..., d]."""
        stack, x, task_index = self._ready(x, site, task_index)
        return stack.adapter(x, site, task_index)

    def adapt_and_add(
        self,
        y: Tensor,
        hidden: Tensor,
        site: int,
        task_index: Tensor | None,
        dropout: ops.Dropout,
        weight: Tensor | None,
        eps: float,
    ) -> Any:
        """``ops.residual`` of ``hidden`` and of the adapter of ``site`` applied to y [B, ..., d]."""
        stack, y, task_index = self._ready(y, site, task_index)
        return stack.adapter_residual(y, hidden, site, task_index, dropout, weight, eps)

    def _ready(self, x: Tensor, site: int, task_index: Tensor | None) -> tuple[AnyStack, Tensor, Tensor | None]:
        """The stack on x's device, and its arguments there."""
        self._ran |= 1 << site
        device = x.device
        stack = self._stack if device == self._device else self._on(device)
        if task_index is not None and task_index.device != device:
            task_index = self._index_on(device, task_index)
        if x.dtype == torch.float16:
            # T5's blocks clamp what overflowed, but only behind the adapter, which would make NaN of an infinity.
            # Numbers that are finite stay what they are.
            x = x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
        return stack, x, task_index


class _KeptWeights(StackWeights):
    """Weights that are kept between forwards. In decoding the way to a site's op takes longer than the op, so it is
    short."""

    _stack: ops.PreparedStack

    @property
    def trains(self) -> bool:
        return False

    def adapt(self, x: Tensor, site: int, task_index: Tensor | None) -> Tensor:
        calls = self._stack.calls_for(x)
        if calls is None or x.dtype is torch.float16 or not x.is_cpu:
            return super().adapt(x, site, task_index)
        self._ran |= 1 << site
        try:
            return calls[site].adapter(x, task_index)
        except RuntimeError:
            self._stack.explain(x, site, task_index)
            raise

    def adapt_and_add(
        self,
        y: Tensor,
        hidden: Tensor,
        site: int,
        task_index: Tensor | None,
        dropout: ops.Dropout,
        weight: Tensor | None,
        eps: float,
    ) -> Any:
        calls = self._stack.residual_calls_for(y, hidden, dropout, weight)
        if calls is None or y.dtype is torch.float16 or not y.is_cpu:
            return super().adapt_and_add(y, hidden, site, task_index, dropout, weight, eps)
        self._ran |= 1 << site
        try:
            out, normed = calls[site].residual(hidden, y, task_index, weight, eps)
        except RuntimeError:
            self._stack.explain_residual(y, hidden, site, task_index, weight)
            raise
        return out if weight is None else (out, normed)


@dataclasses.dataclass
class ForwardContext:
    """Everything that the hooks read in one forward, or one whole generation.

    Args:
        owner: whose hooks it serves.
        stacks: weights by stack.
        task_index: [B] task of each sample among the generated ones, None: all samples are of the one task.
        samples: B, None where the caller named one task for a batch of any size.
        generating: rows of the decoder may be a multiple of B, sample-major (beams, return sequences).
    """

    owner: Owner
    stacks: dict[str, StackWeights]
    task_index: Tensor | None = None
    samples: int | None = None
    generating: bool = False
    _repeated: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def index_for(self, stack: str, rows: int) -> Tensor | None:
        """The task index of a batch of ``rows`` in ``stack``. ValueError where the two do not fit."""
        index, samples = self.task_index, self.samples
        if samples is None or rows == samples:
            return index
        if self.generating and stack == "decoder" and samples and rows % samples == 0:
            if index is None:
                return None
            if rows not in self._repeated:
                self._repeated[rows] = index.repeat_interleave(rows // samples)
            return self._repeated[rows]
        raise ValueError(f"tasks were given for {samples} samples, but the batch has {rows}")

    def expect_samples(self, given: Mapping[str, Any]) -> None:
        """ValueError where the tasks are not as many as the samples in the T5's arguments ``given``. The hooks check
        that on their own, but variant ``"finetuning"`` has none."""
        first = next((given[name] for name in ("input_ids", "inputs_embeds", "encoder_outputs") if name in given), None)
        if first is not None:
            self.index_for("encoder", (first if isinstance(first, Tensor) else first[0]).shape[0])

    @property
    def trains(self) -> bool:
        """Whether a backward is to reach these weights."""
        return any(weights.trains for weights in self.stacks.values())

    def expect_all_ran(self) -> None:
        """RuntimeError where a site did not run: what came out is not the adapted T5's answer."""
        for stack, weights in self.stacks.items():
            site = weights.first_not_run()
            if site is not None:
                position, layer = POSITIONS[site // weights.num_layers], site % weights.num_layers
                raise RuntimeError(
                    f"the adapter behind the {position} of {stack} block {layer} did not run, because its hook was "
                    "removed or its block was taken out or replaced after the adapters were put in: the T5 must keep "
                    "its blocks; load the checkpoint into a new HyperFormerModel"
                )


class active:
    """Make ``contexts``, at most one of each owner, those that this thread's hooks read, while a ``with`` block runs
    and however it ends. Reusable: a backward with ``retain_graph`` recomputes a block once for every backward pass."""

    def __init__(self, *contexts: ForwardContext):
        self.contexts = contexts
        self._before: list[tuple[ForwardContext, ...]] = []

    def __enter__(self) -> None:
        self._before.append(_local.contexts)
        _local.contexts = self.contexts

    def __exit__(self, *exception: object) -> None:
        _local.contexts = self._before.pop()


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: a recomputed block reads the weights of its own forward.

    Called when a block runs forward; the second of the two contexts surrounds its recomputation, perhaps after other
    forwards, perhaps on another thread.
    """
    contexts = _local.contexts
    return contextlib.nullcontext(), active(*contexts) if contexts else contextlib.nullcontext()


class _Hook:
    """Forward hook of one site. An object, not a closure, so that a deep copy of the model gets hooks of its own."""

    def __init__(self, owner: Owner, site: Site, index: int):
        self.owner, self.stack, self.index = owner, site.stack, index
        self.where = f"the {site.position} of {site.stack} block {site.layer}"
        self.is_first = (site.layer, site.position) == (0, "self_attention")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        weights, task_index = self._weights_for(x)
        adapted = weights.adapt(x, self.index, task_index)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

    def add(self, hidden: Tensor, y: Tensor, dropout: ops.Dropout, weight: Tensor | None, eps: float) -> Any:
        """``ops.residual`` of ``hidden`` and of what this hook makes of a module's output y."""
        weights, task_index = self._weights_for(y)
        return weights.adapt_and_add(y, hidden, self.index, task_index, dropout, weight, eps)

    def _weights_for(self, x: Tensor) -> tuple[StackWeights, Tensor | None]:
        """The weights of the forward that runs, and the tasks of x. RuntimeError where there are none."""
        for context in _local.contexts:
            if context.owner is self.owner:
                break
        else:
            raise RuntimeError(
                "this T5 has HyperFormer adapters, but was called by itself, so they have no weights: call the "
                "HyperFormerModel (its forward or generate, with a task), or unload() it first. In a backward pass it "
                "means that gradient checkpointing was switched on at the T5: use "
                "HyperFormerModel.gradient_checkpointing_enable()"
            )
        weights = context.stacks.get(self.stack)
        if weights is None:
            raise RuntimeError(f"the {self.stack} runs in a forward that was not to need it")
        # The input of every sublayer except the first comes from an adapter before it, so it must require a gradient.
        if not (self.is_first or x.requires_grad) and weights.trains:
            raise RuntimeError(f"no gradient flows through {self.where} of this T5, {CANNOT_TRAIN}")
        if context.samples is None:
            return weights, context.task_index
        return weights, context.index_for(self.stack, x.shape[0])


def remove_hooks(t5: nn.Module) -> None:
    """Take the adapters' hooks off a copy of a T5, whose model is another one's."""
    for module in t5.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]


def only_hook(module: nn.Module) -> _Hook | None:
    """The hook of a site, if nothing else runs around the forward of its module."""
    if len(module._forward_hooks) != 1 or module._compiled_call_impl is not None:
        return None
    (hook,) = module._forward_hooks.values()
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return hook if isinstance(hook, _Hook) and not others else None
