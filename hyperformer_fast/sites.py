"""Where the adapters sit in a T5, and how each finds the weights of the forward that it runs in.

Forward hooks on ``SelfAttention`` and ``DenseReluDense`` of every block of a stack put an adapter behind them, before
T5's own dropout and residual add (paper section 2); the decoder's cross-attention has none. The T5's modules, and so
its ``state_dict`` keys, stay what they are. All weights of one forward lie in one :class:`ForwardContext`, active in
the calling thread while that forward runs, and again while gradient checkpointing recomputes a block of that very
forward.

Letters: B samples, S sites of a stack, T tasks, P packed numbers per adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .layout import Folded

if TYPE_CHECKING:
    from .hypernetwork import HyperNetwork
    from .layout import AdapterLayout

STACKS = ("encoder", "decoder")
_FLOAT16_MAX = torch.finfo(torch.float16).max

# Per thread: one process may serve several requests at once, and CUDA's autograd recomputes checkpoints on threads of
# its own.
_local = threading.local()


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
        ValueError: it holds adapters of a :class:`HyperFormerModel` already.
    """
    sites = []
    for stack in STACKS:
        module = getattr(t5, stack, None)
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
    for site in sites:
        if any(isinstance(hook, _Hook) for hook in site.module._forward_hooks.values()):
            raise ValueError(
                f"this {type(t5).__name__} has HyperFormer adapters already: unload() the model that put them there"
            )
    return sites


class Owner:
    """Identity of one set of installed adapters; a context serves the hooks of its own owner only."""

    def __init__(self) -> None:
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self, sites: list[Site], hypernetworks: nn.ModuleDict) -> None:
        """Hook every site; the hypernetworks number them."""
        for site in sites:
            index = hypernetworks[site.stack].site(site.layer, site.position)
            self.handles.append(site.module.register_forward_hook(_Hook(self, site.stack, index)))

    def remove(self) -> None:
        """Take all hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class StackWeights:
    """The generated weights of one stack in one forward.

    Args:
        net: the stack's hypernetwork.
        packed: [S, T, P], what it generated.
        activation: of the adapters.
    """

    def __init__(self, net: HyperNetwork, packed: Tensor, activation: str):
        self.layout: AdapterLayout = net.layout
        self.activation = activation
        self._whole = packed.detach()
        # unbind's backward is one stack; indexing site by site would fill a [S, T, P] of zeros for each
        self._packed = packed.unbind(0)
        self._folded: dict[torch.dtype, list[Folded]] = {}

    def adapt(self, x: Tensor, site: int, task_index: Tensor | None) -> Tensor:
        """The adapter of ``site`` applied to x [B, ..., d]."""
        if x.dtype == torch.float16:
            # T5's blocks clamp what overflowed, but only behind the adapter, which would make NaN of an infinity.
            # Numbers that are finite stay what they are.
            x = x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
        # Folded at the first site that runs, for only x tells the compute dtype: autocast or a half-precision T5, whose
        # output projections may be kept in float32, so that one stack can see two.
        folded = self._folded.get(x.dtype)
        if folded is None:
            parts = ops.fold(self._whole, self.layout, x.dtype)
            folded = [Folded(*site) for site in zip(*(part.unbind(0) for part in parts))]
            self._folded[x.dtype] = folded
        return ops.adapter(x, self._packed[site], self.layout, self.activation, folded[site], task_index)


@dataclasses.dataclass
class ForwardContext:
    """Everything that the hooks read in one forward, or one whole generation.

    Args:
        owner: whose hooks it serves.
        stacks: weights by stack.
        task_index: [B] task of each sample among the generated ones, None: all samples are of the one task.
        generating: rows of the decoder may be a multiple of B, sample-major (beams, return sequences).
    """

    owner: Owner
    stacks: dict[str, StackWeights]
    task_index: Tensor | None = None
    generating: bool = False
    _repeated: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def index_for(self, stack: str, rows: int) -> Tensor | None:
        """The task index of a batch of ``rows`` in ``stack``. ValueError where the two do not fit."""
        index = self.task_index
        if index is None or rows == index.shape[0]:
            return index
        if self.generating and stack == "decoder" and index.shape[0] and rows % index.shape[0] == 0:
            if rows not in self._repeated:
                self._repeated[rows] = index.repeat_interleave(rows // index.shape[0])
            return self._repeated[rows]
        raise ValueError(f"tasks were given for {index.shape[0]} samples, but the batch has {rows}")


class active:
    """Make ``context`` the one that this thread's hooks read, while a ``with`` block runs and however it ends.
    Reusable: a backward with ``retain_graph`` recomputes a block once for every backward pass."""

    def __init__(self, context: ForwardContext):
        self.context = context
        self._before: list[ForwardContext | None] = []

    def __enter__(self) -> None:
        self._before.append(getattr(_local, "context", None))
        _local.context = self.context

    def __exit__(self, *exception) -> None:
        _local.context = self._before.pop()


def recompute_contexts():
    """``context_fn`` of ``torch.utils.checkpoint``: a recomputed block reads the weights of the forward that it belongs
    to.

    Called when a block runs forward; the second of the two contexts surrounds its recomputation, perhaps after other
    forwards, perhaps on another thread.
    """
    context = getattr(_local, "context", None)
    return contextlib.nullcontext(), contextlib.nullcontext() if context is None else active(context)


class _Hook:
    """Forward hook of one site. An object, not a closure, so that a deep copy of the model gets hooks of its own."""

    def __init__(self, owner: Owner, stack: str, site: int):
        self.owner, self.stack, self.site = owner, stack, site

    def __call__(self, module: nn.Module, args: tuple, output):
        context = getattr(_local, "context", None)
        if context is None or context.owner is not self.owner:
            raise RuntimeError(
                "this T5 has HyperFormer adapters, but was called by itself, so they have no weights: call the "
                "HyperFormerModel (its forward or generate, with a task), or unload() it first. In a backward pass it "
                "means that gradient checkpointing was switched on at the T5: use "
                "HyperFormerModel.gradient_checkpointing_enable()"
            )
        x = output[0] if isinstance(output, tuple) else output
        weights = context.stacks.get(self.stack)
        if weights is None:
            raise RuntimeError(f"the {self.stack} runs in a forward that was not to need it")
        adapted = weights.adapt(x, self.site, context.index_for(self.stack, x.shape[0]))
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted
