"""From the tasks of a batch to the weights of its forward: task ids, embeddings, generated or kept weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .delegate import with_cache
from .hypernetwork import AdapterSource, TaskEmbeddings
from .prepared import may_be_prepared
from .sites import ForwardContext, StackWeights, active
from .task_choice import NewTask, Selection, select
from .task_methods import ManagedTasks

if TYPE_CHECKING:
    from .model import HyperFormerModel


def context_of(
    model: HyperFormerModel, task: Any, task_index: Tensor | None, encoded: bool, generating: bool = False
) -> ForwardContext:
    """What the adapters read in one forward, or in one whole generation.

    Args:
        task, task_index: as :meth:`HyperFormerModel.forward` takes them, or a :class:`NewTask` for ``task``.
        encoded: whether the encoder's outputs are given, so that its adapters need no weights.
        generating: whether rows of the decoder may be a multiple of the samples.
    """
    if torch.compiler.is_compiling():
        return _chosen(model, task, task_index, encoded, generating)
    with model._task_order.lock:
        return _chosen(model, task, task_index, encoded, generating)


def _chosen(
    model: HyperFormerModel, task: Any, task_index: Tensor | None, encoded: bool, generating: bool
) -> ForwardContext:
    nets = {name: net for name, net in model.hypernetworks.items() if not (encoded and name == "encoder")}
    selection, config, order = None, model.hyperformer_config, model._task_order
    if isinstance(task, NewTask):
        embeddings = cast(TaskEmbeddings, model.task_embeddings).projected(task.embedding.unsqueeze(0))
        return _generated(model, nets, embeddings, task.selection(), generating)
    if nets and may_be_prepared(model):
        device = model._own_device()
        selection = select(config, task, task_index, device, order)
        kept = model._prepared.find(model, selection, device)
        if kept is not None:
            stacks = {name: StackWeights.kept(cast(AdapterSource, nets[name]), kept.stacks[name]) for name in nets}
            return ForwardContext(model._owner, stacks, kept.task_index, selection.samples, generating)
    embeddings = model.task_embeddings()
    if embeddings.is_meta and hasattr(model, "_hf_hook"):
        raise RuntimeError(
            "the hypernetworks are offloaded, but nothing fetches them, because they run once for all blocks: "
            "offload the T5 (accelerate's cpu_offload or dispatch_model) before it gets adapters, and only the T5"
        )
    if selection is None:
        selection = select(config, task, task_index, embeddings.device, order)
    if selection.rows is not None:
        # Selected from all embeddings, so that each has a gradient, even if it is zero.
        embeddings = embeddings.index_select(0, selection.rows)
    return _generated(model, nets, embeddings, selection, generating)


def _generated(
    model: HyperFormerModel, nets: Mapping[str, nn.Module], embeddings: Tensor, selection: Selection, generating: bool
) -> ForwardContext:
    watch = None if torch.compiler.is_compiling() or not model.training else model._task_gradients
    if watch is None or not torch.is_grad_enabled():
        packed = {name: net(embeddings) for name, net in nets.items()}
    else:
        packed = watch.generate(nets, embeddings, selection.tasks)
    activation = model.hyperformer_config.non_linearity
    stacks = {name: StackWeights(cast(AdapterSource, net), packed[name], activation) for name, net in nets.items()}
    return ForwardContext(model._owner, stacks, selection.task_index, selection.samples, generating)


def decode(model: HyperFormerModel, task: Any, task_index: Tensor | None, arguments: dict[str, Any]) -> Any:
    """The T5's ``generate`` with the adapters of ``model``, and with those of an ``assistant_model`` that has some.

    Args:
        task, task_index: as :meth:`HyperFormerModel.generate` takes them.
        arguments: all others of the T5's ``generate``, by name.

    Raises:
        ValueError: the assistant has other tasks, or the tasks do not fit the samples.
        RuntimeError: an adapter did not run.
    """
    outputs = arguments.get("encoder_outputs")
    context = context_of(model, task, task_index, outputs is not None, generating=True)
    contexts = [context]
    assistant = arguments.get("assistant_model")
    if isinstance(assistant, ManagedTasks):
        if assistant.hyperformer_config.tasks != model.hyperformer_config.tasks:
            theirs, ours = assistant.hyperformer_config.tasks, model.hyperformer_config.tasks
            raise ValueError(f"the assistant must have this model's tasks, {ours}, in this order, got {theirs}")
        arguments["assistant_model"] = assistant._base
        if assistant is not model:
            contexts.append(context_of(cast("HyperFormerModel", assistant), task, task_index, False, generating=True))
    if outputs is not None:
        context.index_for("encoder", outputs[0].shape[0])
    with active(*contexts):
        out = cast(Any, model._base).generate(**with_cache(model._base, arguments))
    for each in contexts:
        each.expect_all_ran()
    return out
