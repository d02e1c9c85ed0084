"""Load and export checkpoints of the authors' code.

Their code (github.com/rabeehk/hyperformer) has one ``nn.Linear`` per generated tensor; ours packs all rows of a
generator into one tensor. :func:`_stack_entries` maps their names to ours, for loading and for exporting weights and
gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .config import HyperFormerConfig
from .hypernetwork import POSITIONS, HyperNetwork, TaskEmbeddings
from .names import attribute_of

if TYPE_CHECKING:
    from .model import HyperFormerModel

_TASKS = "task_embedding_controller."
_NET = "adapter_layers_hyper_net."

#: Their modules that generate the down and up projections, in the shared variants and in the per-block variant, and
#: the kind of tensor that a part of ours is to them.
_SHARED = {"down": "down_sampler_hyper_net", "up": "up_sampler_hyper_net"}
_PER_BLOCK = {"down": "meta_down_sampler", "up": "meta_up_sampler"}
_KIND = {"weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Maps a tensor of an official checkpoint to rows ``rows`` of ``parameter[index]``, or to all of ``parameter``."""

    name: str
    parameter: str
    index: int | None = None
    rows: slice | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """Return the part of our parameter (or of its gradient) that this entry maps to."""
        return tensor if self.index is None else tensor[self.index, self.rows]


def _task_entries(embeddings: TaskEmbeddings) -> Iterator[_Entry]:
    for name in embeddings.task_to_embeddings:
        yield _Entry(f"{_TASKS}task_to_embeddings.{name}", f"task_to_embeddings.{attribute_of(name)}")
    if embeddings.projector is not None:
        yield from _projector_entries(f"{_TASKS}task_hyper_net.")


def _projector_entries(prefix: str) -> Iterator[_Entry]:
    for part in ("0.weight", "0.bias", "2.weight", "2.bias"):
        yield _Entry(f"{prefix}task_embeding_generator.{part}", f"projector.{part}")


def _stack_entries(net: HyperNetwork, block_name: Callable[[int, str], str]) -> Iterator[_Entry]:
    """Yield an entry for every tensor of a stack.

    Args:
        net: the hypernetwork of the stack.
        block_name: a function of (layer, position) that returns the prefix of their module in the per-block variant.
    """
    variant = net.config.variant
    if variant == "hyperformer":
        for position in POSITIONS:
            for layer in range(net.num_layers):
                prefix = block_name(layer, position)
                yield from _generator_entries(net, net.site(layer, position), prefix, _PER_BLOCK, "")
        return
    yield _Entry(f"{_NET}layer_id_embeddings.weight", "layer_embeddings.weight")
    if variant == "hyperformer++":
        yield _Entry(f"{_NET}adapters_block_type.weight", "position_embeddings.weight")
    yield from _projector_entries(f"{_NET}task_hypernet.")
    if net.embedding_norm is not None:
        for part in ("weight", "bias"):
            yield _Entry(f"{_NET}LayerNorm.{part}", f"embedding_norm.{part}")
    for index, position in enumerate(POSITIONS[: net.generator.weight.shape[0]]):
        yield from _generator_entries(net, index, _NET, _SHARED, "" if variant == "hyperformer++" else f"{position}_")


def _generator_entries(
    net: HyperNetwork, index: int, prefix: str, modules: dict[str, str], position: str
) -> Iterator[_Entry]:
    first_norm_row = net.layout.numel - net.layout.norm_numel
    for part, rows in net.layout.slices.items():
        side, what = part.split("_")
        kind = _KIND[what]
        if side in modules:
            module, generator = modules[side], f"{kind}_generator.0"
        else:
            module, generator = f"{side}_layernorm_hypernet", f"{kind}_generator"
        if side not in modules and net.generator.norms is not None:
            plain = slice(rows.start - first_norm_row, rows.stop - first_norm_row)
            yield _Entry(f"{prefix}{side}_layer_norm.{kind}", "generator.norms", index, plain)
            continue
        for parameter in ("weight", "bias"):
            yield _Entry(f"{prefix}{position}{module}.{generator}.{parameter}", f"generator.{parameter}", index, rows)


class _Part(NamedTuple):
    """A module of ours, and the prefix of its entries in the official state dict."""

    module: nn.Module
    prefix: str
    entries: list[_Entry]


@torch.no_grad()
def _load(parts: list[_Part], state: Mapping[str, Tensor]) -> None:
    """Copy all entries, or none: raises ValueError if a tensor is missing or has another shape."""
    copies, missing = [], []
    for part in parts:
        parameters = dict(part.module.named_parameters())
        for entry in part.entries:
            name, target = part.prefix + entry.name, entry.view(parameters[entry.parameter])
            if name not in state:
                missing.append(name)
            elif state[name].shape != target.shape:
                raise ValueError(
                    f"{name} is {list(state[name].shape)} in the checkpoint, {list(target.shape)} in this model"
                )
            else:
                copies.append((target, state[name]))
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that this configuration needs; the first is {missing[0]}"
        )
    for target, value in copies:
        target.copy_(value)


def _export(parts: list[_Part], read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    exported = {}
    for part in parts:
        parameters = {name: read(parameter) for name, parameter in part.module.named_parameters()}
        for entry in part.entries:
            exported[part.prefix + entry.name] = entry.view(parameters[entry.parameter]).clone()
    return exported


def _refuse_unknown(state: Mapping[str, Tensor], known: set[str], where: str) -> None:
    unknown = sorted(set(state) - known)
    if unknown:
        raise ValueError(f"the checkpoint has {len(unknown)} tensors unknown to {where}; the first is {unknown[0]}")


class OfficialStack(nn.Module):
    """The task embeddings and the hypernetworks of one stack, called with the arguments of the authors' code."""

    def __init__(self, config: HyperFormerConfig, d: int, num_layers: int):
        super().__init__()
        self.config = config
        self.task_embeddings = TaskEmbeddings(config)
        self.hypernetwork = HyperNetwork(config, d, num_layers)

    def forward(self, x: Tensor, task: str, layer: int, position: str) -> Tensor:
        """Apply the adapter after ``position`` of block ``layer``, with the skip connection: x [..., d] -> [..., d]."""
        net = self.hypernetwork
        site = net.site(layer, position)
        task_id = self.config.task_id(task)
        packed = net(self.task_embeddings()[task_id : task_id + 1])[site]
        return ops.adapter(x, packed, net.layout, self.config.non_linearity)

    def parts(self) -> list[_Part]:
        entries = list(_stack_entries(self.hypernetwork, lambda layer, position: f"{_NET}{layer}_{position}."))
        return [
            _Part(self.task_embeddings, "", list(_task_entries(self.task_embeddings))),
            _Part(self.hypernetwork, "", entries),
        ]


def build_stack(config: Mapping[str, Any], num_layers: int, state_dict: Mapping[str, Tensor]) -> OfficialStack:
    """Build one stack from the authors' configuration and state dict.

    Args:
        config: the configuration under the authors' field names, with ``input_dim`` (d).
        num_layers: number of blocks of the stack.
        state_dict: the tensors ``task_embedding_controller.*`` and ``adapter_layers_hyper_net.*`` (in the per-block
            variant ``adapter_layers_hyper_net.<layer>_<position>.*``). The stack takes their dtype.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape; the message names the first.
    """
    if "input_dim" not in config:
        raise ValueError("the configuration lacks input_dim, the width of the stack")
    fields = {name: value for name, value in config.items() if name != "input_dim"}
    stack = OfficialStack(HyperFormerConfig.from_official(fields), config["input_dim"], num_layers)
    dtypes = {tensor.dtype for tensor in state_dict.values()}
    if len(dtypes) != 1:
        raise ValueError(f"the tensors of a stack must share one dtype, got {sorted(map(str, dtypes))}")
    stack.to(dtypes.pop())
    parts = stack.parts()
    _load(parts, state_dict)
    _refuse_unknown(state_dict, {entry.name for part in parts for entry in part.entries}, "this configuration")
    return stack


def export_gradients(stack: OfficialStack) -> dict[str, Tensor]:
    """Return the gradients of the stack's parameters under the official names; zeros for a parameter without one."""
    return _export(stack.parts(), lambda p: torch.zeros_like(p) if p.grad is None else p.grad)


def _expect_theirs(config: HyperFormerConfig) -> None:
    """Raise ValueError where the authors' checkpoints have no names for what is in a model of ``config``."""
    if config.variant == "adapters":
        raise ValueError(
            "variant 'adapters' has no official names here: only checkpoints of hypernetworks and of fine-tuned T5s "
            "are translated"
        )
    for switch in ("task_projector", "train_adapters_blocks"):
        if not getattr(config, switch):
            raise ValueError(f"{switch}=False has no official names here: only models with it True are translated")
    if config.has_hypernetworks and config.normalize_embeddings:
        raise ValueError(
            "normalize_embeddings=True has no official counterpart, because the authors' code reads embeddings as they "
            'are: only models with it False (as in recipe "authors") are translated'
        )


def _model_parts(model: HyperFormerModel) -> list[_Part]:
    _expect_theirs(model.hyperformer_config)
    if not isinstance(model.task_embeddings, TaskEmbeddings):  # without hypernetworks there are only numbers of tasks
        return []
    parts = [_Part(model.task_embeddings, "", list(_task_entries(model.task_embeddings)))]
    for stack, net in model.hypernetworks.items():
        assert isinstance(net, HyperNetwork)  # a ModuleDict does not know the class of its values
        last = 2 if stack == "decoder" else 1  # the decoder has cross-attention at index 1
        block_name = lambda layer, position, last=last: (  # noqa: E731
            f"block.{layer}.layer.{0 if position == 'self_attention' else last}.adapter_controller."
        )
        parts.append(_Part(net, f"{stack}.", list(_stack_entries(net, block_name))))
    return parts


@torch.no_grad()
def load_state_dict(model: HyperFormerModel, state_dict: Mapping[str, Tensor], load_frozen: bool = False) -> None:
    """Load an official T5 checkpoint into a model of the same configuration. On an error nothing is changed.

    Args:
        model: the :class:`HyperFormerModel` to load into.
        state_dict: the checkpoint, as ``torch.load(..., weights_only=True)`` or safetensors return it. The adapters and
            every T5 weight that the configuration trains are taken from it.
        load_frozen: also overwrite the frozen T5 weights. Otherwise they must equal the model's own bit for bit,
            because adapters on top of another T5 would be silently wrong.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape, a frozen one has other values, or one parameter
            has different values under two names; the message names the first.
    """
    parts = _model_parts(model)
    own = model._base.state_dict()
    # Keep duplicates: a head that is tied to the embeddings is one parameter with several names.
    parameters = dict(model._base.named_parameters(remove_duplicate=False))
    # The T5 of transformers 3.5 saves a position bias of cross-attention that its forward does not use.
    dead = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
    known = {part.prefix + entry.name for part in parts for entry in part.entries} | set(own) | dead
    _refuse_unknown(state_dict, known, "this model")
    copies: dict[int, tuple[str, Tensor, Tensor]] = {}
    for name, tensor in own.items():
        parameter = parameters.get(name)
        trained = parameter is not None and parameter.requires_grad
        if name not in state_dict:
            if trained and not any(p is parameter and alias in state_dict for alias, p in parameters.items()):
                raise ValueError(f"the checkpoint lacks {name}, which this configuration trains")
            continue
        value = state_dict[name]
        if value.shape != tensor.shape:
            raise ValueError(f"{name} is {list(value.shape)} in the checkpoint, {list(tensor.shape)} in this model")
        if trained or load_frozen:
            first, _, other = copies.setdefault(id(tensor if parameter is None else parameter), (name, tensor, value))
            if not torch.equal(value, other):
                raise ValueError(f"{first} and {name} are the same tensor in this model, but differ in the checkpoint")
        elif not torch.equal(value.to(tensor.device, tensor.dtype), tensor):
            raise ValueError(
                f"{name} is frozen, but differs between the checkpoint and this model's T5: start from the T5 that the "
                "checkpoint was trained on, or pass load_frozen=True"
            )
    _load(parts, state_dict)
    for _, target, value in copies.values():
        target.copy_(value)


def export(model: HyperFormerModel) -> dict[str, Tensor]:
    """Return the whole model as an official state dict, with the adapters under the authors' names."""
    exported = {name: tensor.detach().clone() for name, tensor in model._base.state_dict().items()}
    return exported | _export(_model_parts(model), lambda p: p.detach())
