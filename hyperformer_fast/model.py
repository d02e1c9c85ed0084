"""HyperFormerModel: a frozen T5 with generated adapters, and everything that a user does with one."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from . import frozen_head
from .config import HyperFormerConfig
from .delegate import is_checkpointing
from .export.materialize import MaterializedTask, materialize
from .forward_weights import context_of, decode
from .fusion import AUTO_PIECES, Fuse, fuse_t5, pieces_of, resolve, unfuse_t5
from .fusion.before import reads_no_cache
from .gradient_flow import expect_gradients
from .hypernetwork import AdapterSource
from .loss import as_share, smoothed
from .methods import build_parts, freeze_but_task_embeddings
from .parameters import ParameterCount
from .prepared import MemoryFootprint, PreparedWeights, bytes_of
from .sharding import is_fsdp2, separate_embeddings, share_embeddings
from .sites import Owner, active, find_sites
from .t5 import Snapshot, place, tie, tied_names, trained_names, untied_head_kept
from .task_choice import choose_outside_the_graph
from .task_methods import ManagedTasks
from .task_order import TaskOrder
from .threads import Threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from .task_gradients import TaskGradients


#: The names that ``generate`` of transformers has for its first positional arguments.
_GENERATE_ARGUMENTS = ("inputs", "generation_config", "logits_processor", "stopping_criteria")


def get_hyperformer_model(t5: nn.Module, config: HyperFormerConfig, fuse: Fuse = "auto") -> HyperFormerModel:
    """Put adapters into ``t5`` and freeze all of it that the configuration does not train.

    The T5 is changed in place; :meth:`HyperFormerModel.unload` takes the adapters out again. Arguments and errors are
    those of :class:`HyperFormerModel`.
    """
    return HyperFormerModel(t5, config, fuse)


class HyperFormerModel(ManagedTasks):
    """A frozen T5 with hypernetwork-generated adapters behind self-attention and feed-forward (arXiv 2106.04489).

    The T5 is not copied. Its modules get forward hooks, and its parameters ``requires_grad=False``, except for its
    layer norms (``unfreeze_layer_norms``) and its head (``unfreeze_lm_head``). Where the head is tied to the
    embeddings, as in T5 v1.0, the two stay one tensor and train as one, as in the authors' code.

    Args:
        t5: ``T5ForConditionalGeneration`` or another T5 with ``encoder`` (and ``decoder``) of T5 blocks. A head that no
            T5 is pretrained with (sequence or token classification, question answering) is trained, and shared by all
            tasks.
        config: the adapters' configuration. It is copied; the model and its caller share no state.
        fuse: what of the T5 is fused, as in :func:`~hyperformer_fast.fuse_t5`: ``"auto"`` for all that is supported,
            True for the same and an error where something is not, names of pieces, or False to leave the T5 as it is.

    Raises:
        TypeError: ``t5`` is not a T5.
        ValueError: it has adapters already, has gradient checkpointing on, is too narrow for ``reduction_factor``, or
            its weights are on the meta device; or ``fuse`` names an unknown piece, or is True and cannot be met.
    """

    def __init__(self, t5: nn.Module, config: HyperFormerConfig, fuse: Fuse = "auto"):
        super().__init__()
        if not isinstance(config, HyperFormerConfig):
            raise TypeError(f"config must be a HyperFormerConfig, got {type(config).__name__}")
        sites = find_sites(t5)
        if is_checkpointing(t5):
            raise ValueError(
                "gradient checkpointing is on in this T5: switch it off there, and on with "
                "HyperFormerModel.gradient_checkpointing_enable()"
            )
        config = config.replace()
        layers = {site.stack: site.layer + 1 for site in sites}
        trained = trained_names(t5, config)
        device, dtype = place(t5, trained)
        # Generated weights keep float32 precision under a half-precision T5.
        dtype = torch.promote_types(dtype, torch.float32)
        base = cast("PreTrainedModel", t5)
        self.hyperformer_config = config
        task_embeddings, hypernetworks = build_parts(config, base.config.d_model, layers)
        self.task_embeddings = task_embeddings.to(device, dtype)
        #: What makes the adapters' weights of each stack; see :func:`~hyperformer_fast.methods.build_parts`.
        self.hypernetworks = hypernetworks.to(device, dtype)
        self._fused_before, self._pieces = pieces_of(t5), resolve(fuse)
        if self._pieces:
            fuse_t5(t5, fuse)
        self.t5 = base
        self._snapshot = Snapshot(t5, trained)
        self._embeddings = share_embeddings(t5)
        self._tied = tied_names(t5)
        #: Task -> metric -> value, for the model card that :meth:`save_pretrained` writes.
        self.card_metrics: Mapping[str, Mapping[str, float]] | None = None
        for name, parameter in t5.named_parameters():
            parameter.requires_grad_(name in trained)
        if config.freeze_model_but_task_embeddings:
            freeze_but_task_embeddings(self.task_embeddings, self.hypernetworks, t5)
        self._threads = Threads()
        # True after a forward that trained, whose autograd graph was checked. A T5 can begin to cut gradients after any
        # inference (bitsandbytes in 4 bits does), so that an inference sets it back.
        self._gradients_flow = False
        self._prepared = PreparedWeights()
        self._task_order = TaskOrder(config.tasks)
        #: What watches the tasks' gradients now.
        self._task_gradients: TaskGradients | None = None
        self._owner = Owner()
        self._owner.install([site for site in sites if site.stack in hypernetworks], hypernetworks)
        frozen_head.prepare(t5)
        frozen_head.restore_forward(t5)  # the model decides for each forward
        self.register_forward_pre_hook(choose_outside_the_graph, with_kwargs=True)
        self.train(t5.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | Sequence[str] | None = None,
        task_index: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        smoothing: float = 0.0,
        output_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The T5's forward, with adapters. All arguments except five, and the result, are the T5's.

        Args:
            task: one task for the whole batch, or one per sample (B names). Not needed where the model has one only.
            task_index: [B] integers in its place: indices into ``hyperformer_config.tasks``, -1 for no adapters. On the
                model's device no host synchronisation is needed; an index out of range is an error on a CPU, NaN on a
                GPU.
            num_items_in_batch: the number of labels in all micro-batches and processes of an optimizer step, by which
                the loss is divided, as transformers' Trainer asks for it. None: the mean over this batch's labels.
            smoothing: of the labels, at least 0 and below 1: the loss is that of Trainer's ``label_smoothing_factor``.
            output_logits: False: compute the loss of a frozen head without logits, which takes less time and memory;
                whatever reads the output's ``logits`` then gets an error. It has no effect where the logits are needed
                (:meth:`why_logits`). None: True, except in training with the fused piece ``"loss"``.

        Raises:
            ValueError: an unknown task, both or neither of ``task`` and ``task_index``, or not as many as samples.
            RuntimeError: the model was unloaded, an adapter did not run because its hook or its block is gone, no
                gradient flows through the T5 in a forward that is to train, or another thread trains the model.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            **kwargs,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if is_tracing():
            raise RuntimeError(
                "torch.jit.trace would take this forward's task and weights for constants: use torch.compile or "
                "torch.export"
            )
        if torch.compiler.is_compiling():
            return self._forward(given, task, task_index, num_items_in_batch, smoothing, output_logits)
        with self._threads.running(self):
            return self._forward(given, task, task_index, num_items_in_batch, smoothing, output_logits)

    def _forward(
        self,
        given: dict[str, Any],
        task: str | Sequence[str] | None,
        task_index: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        smoothing: float,
        output_logits: bool | None,
    ) -> Any:
        """:meth:`forward`, with the T5's arguments in ``given``."""
        t5, labels = self._base, given.get("labels")
        context = context_of(self, task, task_index, "encoder_outputs" in given)
        if not context.stacks and context.samples is not None:
            context.expect_samples(given)
        skips = self._skips_logits(output_logits, labels)
        with active(context):
            if skips:
                if "cache" in self._pieces and reads_no_cache(t5, (), given):
                    given["use_cache"] = False
                out = frozen_head.with_loss(t5, t5, given, smoothing, num_items_in_batch)
            else:
                out = as_share(smoothed(t5(**given), labels, smoothing), labels, num_items_in_batch)
        context.expect_all_ran()
        if not torch.compiler.is_compiling():
            if context.trains and not self._gradients_flow:
                expect_gradients(out)
            self._gradients_flow = context.trains
        return out

    def why_logits(self) -> str | None:
        """Why ``output_logits=False`` would have no effect now; None where the loss is computed without logits."""
        return frozen_head.why_not(self._base)

    @property
    def loss_without_logits(self) -> bool:
        """Whether a trainer that reads no logits is to ask for none: where ``fuse`` is ``"auto"`` or has ``"loss"``."""
        return (self._pieces == AUTO_PIECES or "loss" in self._pieces) and self.why_logits() is None

    def _skips_logits(self, output_logits: bool | None, labels: Tensor | None) -> bool:
        if output_logits is None:
            output_logits = not ("loss" in self._pieces and self.training and torch.is_grad_enabled())
        return labels is not None and not output_logits and self.why_logits() is None

    @torch.no_grad()
    def generate(
        self, *args: Any, task: str | Sequence[str] | None = None, task_index: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The T5's ``generate``, with adapters, whose weights are generated once for the whole call.

        ``task`` and ``task_index`` as in :meth:`forward`, one per prompt: beams and return sequences follow their
        prompt's. An ``assistant_model`` may be another :class:`HyperFormerModel` of the same tasks.
        """
        if len(args) > len(_GENERATE_ARGUMENTS):
            raise TypeError(f"generate takes {', '.join(_GENERATE_ARGUMENTS)} by position, and the rest by name")
        # by name, because PEFT's wrapper of a T5 takes nothing by position
        positional = dict(zip(_GENERATE_ARGUMENTS, args, strict=False))
        twice = sorted(positional.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"{twice[0]} is given twice, by position and by name")
        kwargs |= positional
        if is_fsdp2(self):
            if "generate" not in vars(self):
                # FSDP2 gathers the parameters for this method, too, once it is told of it.
                torch.distributed.fsdp.register_fsdp_forward_method(self, "generate")
                return self.generate(task=task, task_index=task_index, **kwargs)
            # Every process takes part in gathering the blocks for each token, even if its own texts have ended.
            kwargs["synced_gpus"] = True
        assistant = kwargs.get("assistant_model")
        with contextlib.ExitStack() as stack:
            for model in {id(each): each for each in (self, assistant) if isinstance(each, HyperFormerModel)}.values():
                stack.enter_context(model._threads.running(model))
                stack.enter_context(model._threads.static_cache(model.t5, kwargs))
            out = decode(self, task, task_index, kwargs)
            self._gradients_flow = False
            return out

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward in place, as ``torch.nn.Module.compile`` does, but leave hooks outside of the graph.

        The choice of tasks is one of the hooks, so that another task needs no other graph.
        """
        compiled = torch.compile(type(self).forward.__get__(self), *args, **kwargs)
        self.__dict__["forward"] = self.__dict__["_compiled_forward"] = compiled

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled belongs to this very instance, as in torch.nn.Module. Another forward may be accelerate's.
        parent: Any = super()  # its __getstate__ has no annotations
        state: dict[str, Any] = parent.__getstate__()
        compiled = state.pop("_compiled_forward", None)
        if compiled is not None and state.get("forward") is compiled:
            del state["forward"]
        return state

    def train(self, mode: bool = True) -> Self:
        """``torch.nn.Module.train``. Weights that were kept for inference are freed. RuntimeError where the mode is to
        change while another thread is in a forward of this model."""
        changes = any(part.training != mode for part in self.modules())
        what = f"set this model to {'training' if mode else 'evaluation'}"
        with self._threads.alone(what) if changes else contextlib.nullcontext():
            if mode:
                self._prepared.clear()
            else:
                self._threads.stopped_training()
            super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # the way of every move to a device or a dtype
        with self._threads.alone("move or cast this model"), self._task_order.lock:
            self._prepared.clear()
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def prepare(self, tasks: str | Sequence[str] | None = None, dtype: torch.dtype | None = None) -> None:
        """Generate and fold the adapters' weights of ``tasks`` now, and keep them for the forwards to come.

        In ``eval()`` and without gradients a model on a CPU does that by itself, for the tasks that it is asked for and
        up to 1 GiB; on other devices only this method does. What is kept is used until anything that it is made of
        changes: a parameter of the hypernetworks or embeddings, the configuration, the choice of a backend. It is freed
        then, and by ``train()`` and every move.

        Args:
            tasks: the tasks, by default all.
            dtype: the dtype that the adapters compute in, by default the T5's.

        Raises:
            RuntimeError: the model is in training mode, or a change of its parameters could go unnoticed, as where FSDP
                shards them, a hook or another forward is in a hypernetwork, or they were made in inference mode.
            ValueError: an unknown task.

        A write in place past autograd's versions (``parameter.data[...] = ...``, a NumPy array that shares the memory)
        is noticed on a CPU where it changes one of some 64 numbers, spread over the parameter evenly. After changing
        single numbers like that, or on another device, call this method again.
        """
        config = self.hyperformer_config
        names = config.tasks if tasks is None else [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
        if not names:
            raise ValueError("tasks must name at least one task, got none")
        dtype = self._base.dtype if dtype is None else dtype
        with self._task_order.lock:
            self._prepared.prepare(self, self.hyperformer_config.task_ids(names), dtype, self._own_device())

    def memory_footprint(self) -> MemoryFootprint:
        """The bytes of this model's tensors, by what they are for."""

        def nbytes(module: nn.Module) -> int:
            return sum(map(bytes_of, (*module.parameters(), *module.buffers())))

        with self._task_order.lock:
            t5, networks, embeddings = map(nbytes, (self._base, self.hypernetworks, self.task_embeddings))
        return MemoryFootprint(t5, networks, embeddings, *self._prepared.footprint())

    def materialize(self, task: str) -> MaterializedTask:
        """One task as a plain T5: a copy, not fused, with ordinary adapter modules that hold this task's weights.

        Its ``save(folder)`` writes it with a short Python file that loads it without this library, and
        ``save_adapters(folder)`` writes the format of the ``adapters`` library.

        Raises:
            ValueError: an unknown task, or weights that are spread over processes or not in memory.
        """
        return materialize(self, task)

    def _own_device(self) -> torch.device:
        """The device of the hypernetworks and embeddings."""
        part = self.task_embeddings
        return next(itertools.chain(part.parameters(), part.buffers())).device

    def train_only_task_embeddings(self) -> None:
        """Train nothing but the tasks' embeddings from now on (``freeze_model_but_task_embeddings``).

        Raises:
            ValueError: the model has no task embeddings.
        """
        config = self.hyperformer_config.replace(freeze_model_but_task_embeddings=True)
        freeze_but_task_embeddings(self.task_embeddings, self.hypernetworks, self._base)
        self.hyperformer_config = self.task_embeddings.config = config
        for net in self.hypernetworks.values():
            cast(AdapterSource, net).config = config

    def parameter_count(self) -> ParameterCount:
        """How many parameters require a gradient now, by part, and how many the T5 has."""

        def trained(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters() if p.requires_grad)

        total = sum(p.numel() for p in self._base.parameters())
        parts = (trained(self.hypernetworks), trained(self.task_embeddings), trained(self._base))
        return ParameterCount(*parts, total, len(self.hyperformer_config.tasks))

    def print_trainable_parameters(self) -> None:
        """Print one line; percentages are of the T5, the last one is the paper's measure."""
        c = self.parameter_count()
        print(
            f"trainable params: {c.trained:,} || T5 params: {c.t5_total:,} || trainable%: "
            f"{100 * c.trained / c.t5_total:.4f} || per task: {c.percent_per_task:.4f} % ({c.tasks} tasks)"
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Let parameters that were one tensor when the adapters were put in be one again. Arguments are not read.

        transformers' method would tie a head, too, that is none of the T5's ties (T5 v1.1).
        """
        tie(self._base, self._tied)

    def resize_token_embeddings(  # type: ignore[override]  # a quantised T5 may have another class for them
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Resize the T5's embeddings, so that :meth:`unload` knows of it.

        New rows are trained only where the embeddings are trained (``unfreeze_lm_head`` with a tied head). An optimizer
        made before does not know what was resized.
        """
        t5 = self._base
        before = cast(nn.Embedding, t5.get_input_embeddings()).weight.shape[0]
        with untied_head_kept(t5):
            embeddings: nn.Embedding = t5.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self._snapshot.resized(t5)
        frozen_head.prepare(t5)
        added = embeddings.weight.shape[0] - before
        if added > 0 and not embeddings.weight.requires_grad:
            warnings.warn(
                f"the {added} new rows of the embeddings stay as they were drawn, and no checkpoint holds them, "
                "because this configuration trains no embeddings",
                stacklevel=2,
            )
        return embeddings

    def unload(self) -> nn.Module:
        """Take the adapters out and give the T5 back as it came in: every bit of its parameters, their
        ``requires_grad``, the modes and forwards of its modules. This model is of no use afterwards. What others have
        added to the T5 (LoRA, say) stays in it as it is.

        Bits that a cast (``model.to(torch.bfloat16)``) took from frozen parameters are gone, and a parameter that the
        caller unfroze and trained past the configuration cannot be restored (a warning).

        Raises:
            RuntimeError: a block was replaced, or a parameter that was trained is gone or of another shape. Nothing
                has changed then, and the model works on.
        """
        t5 = self._base
        site = self._owner.missing(t5)
        if site is not None:
            raise RuntimeError(
                f"the {site.position} of {site.stack} block {site.layer} was taken out or replaced since the adapters "
                "were put in, so this T5 cannot be given back as it came: put the block back first"
            )
        with self._threads.alone("unload this model"):
            self._snapshot.restore_values(t5)
            self.gradient_checkpointing_disable()
            self._prepared.clear()
            self._owner.remove()
            frozen_head.restore(t5)
            unfuse_t5(t5)
            fuse_t5(t5, self._fused_before)
            separate_embeddings(t5, self._embeddings)
            self._snapshot.restore_flags(t5)
            self.t5 = None
        return t5
