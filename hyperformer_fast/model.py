"""HyperFormerModel: generated adapters in a frozen T5, and all that a person does with one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pretrained
from .checkpoint import CheckpointError
from .config import HyperFormerConfig
from .hypernetwork import HyperNetwork, TaskEmbeddings
from .ops.checks import check_task_range
from .parameters import ParameterCount
from .sites import ForwardContext, Owner, StackWeights, active, find_sites
from .surface import T5Surface, is_checkpointing


def get_hyperformer_model(t5: nn.Module, config: HyperFormerConfig) -> HyperFormerModel:
    """Put adapters into ``t5`` (in place; :meth:`HyperFormerModel.unload` takes them out) and freeze it, but for what
    the configuration trains. Raises as :class:`HyperFormerModel` does."""
    return HyperFormerModel(t5, config)


class HyperFormerModel(T5Surface):
    """A frozen T5 with hypernetwork-generated adapters behind self-attention and feed-forward (arXiv 2106.04489).

    The T5 is not copied: its modules get forward hooks, its parameters ``requires_grad=False`` but for its layer norms
    (``unfreeze_layer_norms``) and its head (``unfreeze_lm_head``). Where the head is tied to the embeddings, as in T5
    v1.0, the two stay one tensor and train as one, as in the authors' code.

    Args:
        t5: ``T5ForConditionalGeneration`` or another T5 with ``encoder`` (and ``decoder``) of T5 blocks.
        config: copied; the model and its caller share no state.

    Raises:
        TypeError: ``t5`` is not a T5.
        ValueError: it has adapters already, has gradient checkpointing on, or is too narrow for ``reduction_factor``.
    """

    def __init__(self, t5: nn.Module, config: HyperFormerConfig):
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
        first = next(t5.parameters())
        # Generated weights keep float32 precision under a half-precision T5.
        place = {"device": first.device, "dtype": torch.promote_types(first.dtype, torch.float32)}
        self.hyperformer_config = config
        self.task_embeddings = TaskEmbeddings(config).to(**place)
        self.hypernetworks = nn.ModuleDict(
            {name: HyperNetwork(config, t5.config.d_model, n) for name, n in layers.items()}
        ).to(**place)
        self.t5 = t5
        self._modes = {module: module.training for module in t5.modules()}
        self._required_grad = {name: parameter.requires_grad for name, parameter in t5.named_parameters()}
        trained = _trained_names(t5, config)
        self._originals = {name: p.detach().clone() for name, p in t5.named_parameters() if name in trained}
        for name, parameter in t5.named_parameters():
            parameter.requires_grad_(name in trained)
        self._owner = Owner()
        self._owner.install(sites, self.hypernetworks)
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
        **kwargs: Any,
    ):
        """The T5's forward, with adapters. All arguments but two, and the result, are the T5's.

        Args:
            task: one task for the whole batch, or one per sample (B names). Not needed where the model has one only.
            task_index: [B] integers in its place: indices into ``hyperformer_config.tasks``, -1 for no adapters. On the
                model's device no host synchronisation is needed; an index out of range is an error on a CPU, NaN on a
                GPU.

        Raises:
            ValueError: an unknown task, both or neither of ``task`` and ``task_index``, or not as many as samples.
            RuntimeError: the model was unloaded.
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
        t5 = self._base
        with active(self._context(task, task_index, "encoder_outputs" in given)):
            return t5(**given)

    @torch.no_grad()
    def generate(
        self, *args: Any, task: str | Sequence[str] | None = None, task_index: Tensor | None = None, **kwargs: Any
    ):
        """The T5's ``generate``, with adapters, whose weights are generated once for the whole call.

        ``task`` and ``task_index`` as in :meth:`forward`, one per prompt: beams and return sequences follow their
        prompt's.
        """
        t5 = self._base
        encoder_outputs = kwargs.get("encoder_outputs")
        context = self._context(task, task_index, encoder_outputs is not None, generating=True)
        if encoder_outputs is not None:
            context.index_for("encoder", encoder_outputs[0].shape[0])
        with active(context):
            return t5.generate(*args, **kwargs)

    def _context(self, task, task_index: Tensor | None, encoded: bool, generating: bool = False) -> ForwardContext:
        embeddings = self.task_embeddings()
        rows, task_index = self._choose(task, task_index, embeddings.device)
        if rows is not None:
            # All embeddings take part, chosen or not, so that each has a gradient, zero if need be.
            each = embeddings.unbind(0)
            embeddings = torch.stack([each[row] for row in rows])
        activation = self.hyperformer_config.non_linearity
        stacks = {
            name: StackWeights(net, net(embeddings), activation)
            for name, net in self.hypernetworks.items()
            if not (encoded and name == "encoder")
        }
        return ForwardContext(self._owner, stacks, task_index, generating)

    def _choose(self, task, task_index: Tensor | None, device: torch.device) -> tuple[list[int] | None, Tensor | None]:
        """Which tasks to generate weights for (None: all), and each sample's index [B] among them (None: the first)."""
        config = self.hyperformer_config
        if task is not None and task_index is not None:
            raise ValueError("give task or task_index, not both")
        if task_index is not None:
            _check_task_index(task_index, len(config.tasks))
            return None, task_index.to(device)
        if task is None:
            if len(config.tasks) > 1:
                raise ValueError(f"say which task: task= or task_index=; this model has {', '.join(config.tasks)}")
            return [0], None
        if isinstance(task, str):
            return [config.task_id(task)], None
        if not isinstance(task, Sequence) or not all(isinstance(name, str) for name in task) or not task:
            raise ValueError(f"task must be a name or a list of names, one per sample, got {task!r}")
        names = list(dict.fromkeys(task))
        rows = [config.task_id(name) for name in names]
        return rows, torch.tensor([names.index(name) for name in task], device=device)

    def add_task(self, name: str, init_from: str | list[str] | None = None) -> None:
        """Add a task, with an embedding of its own.

        Args:
            name: new.
            init_from: a task to copy the embedding of, a list of tasks to take the mean of, or None for a standard
                normal draw.

        An optimizer made before does not know the new parameter.

        Raises:
            ValueError: the name is taken, or ``init_from`` names an unknown task.
        """
        self.task_embeddings.add_task(name, init_from)
        self.hyperformer_config = self.task_embeddings.config
        for net in self.hypernetworks.values():
            net.config = self.hyperformer_config

    def parameter_count(self) -> ParameterCount:
        """What is trained now (``requires_grad``), and what the T5 has."""
        trained = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad)  # noqa: E731
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

    def save_pretrained(self, directory: str | Path) -> None:
        """Save all that is trained: hypernetworks, embeddings, and the T5's parameters that the configuration trains.

        ``hyperformer.safetensors`` holds it all under these names: ``hypernetworks.*``, ``task_embeddings.*``, and
        ``t5.`` before the T5's own; ``hyperformer_config.json`` is a copy of its description. An old checkpoint there
        is replaced in one step, other files are left alone.

        Raises:
            OSError: the directory cannot be written.
            ValueError: a T5 parameter is trained that the configuration does not train: the checkpoint would lack it;
                or a value is not finite.
        """
        extra = self._trained_beyond_config()
        if extra:
            raise ValueError(
                f"{extra[0]} (and {len(extra) - 1} more) of the T5 has requires_grad, but the configuration trains no "
                "such parameter, so the checkpoint would lack it: freeze it, or see unfreeze_layer_norms and "
                "unfreeze_lm_head"
            )
        frozen = self._base, self._originals.keys()
        pretrained.save(directory, self._trained_tensors(), self.hyperformer_config, *frozen)

    @classmethod
    def from_pretrained(cls, t5: nn.Module, directory: str | Path) -> HyperFormerModel:
        """A model around ``t5`` with the configuration and weights of a checkpoint. On any error the T5 stays as it
        was.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: (a ValueError) it is broken, or was trained on another T5.
        """
        find_sites(t5)
        checkpoint = pretrained.read(directory, t5)
        try:
            trained = _trained_names(t5, checkpoint.config)
            shapes = pretrained.shapes_of(checkpoint.config, t5, trained)
        except ValueError as error:
            raise CheckpointError(f"{directory}: config: {error}") from error
        checkpoint.expect(shapes, t5, trained)
        model = cls(t5, checkpoint.config)
        try:
            model._load(checkpoint)
        except BaseException:
            model.unload()
            raise
        return model

    def load_weights(self, directory: str | Path) -> None:
        """Load a checkpoint of this very configuration and T5 into this model: all of it, or, on an error, nothing.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: naming the first difference, and both sides of it.
        """
        checkpoint = pretrained.read(directory, self._base)
        checkpoint.expect_config(self.hyperformer_config)
        shapes = {name: target.shape for name, target in self._trained_tensors().items()}
        checkpoint.expect(shapes, self._base, self._originals.keys())
        checkpoint.warn_of_old_order()
        self._load(checkpoint)

    @torch.no_grad()
    def _load(self, checkpoint: pretrained.Checkpoint) -> None:
        targets = self._trained_tensors()
        values = checkpoint.values_for(targets)
        for name, target in targets.items():
            target.copy_(values[name])

    def _trained_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, under its names there; the parameters' own memory."""
        t5 = dict(self._base.named_parameters())
        parts = {"task_embeddings": self.task_embeddings, "hypernetworks": self.hypernetworks}
        ours = {f"{part}.{name}": p.detach() for part, module in parts.items() for name, p in module.named_parameters()}
        return ours | {f"t5.{name}": t5[name].detach() for name in self._originals}

    def _trained_beyond_config(self) -> list[str]:
        return [name for name, p in self._base.named_parameters() if p.requires_grad and name not in self._originals]

    @torch.no_grad()
    def unload(self) -> nn.Module:
        """Take the adapters out and give the T5 back as it came in: every bit of its parameters, their
        ``requires_grad``, the modes of its modules. This model is of no use afterwards.

        Bits that a cast (``model.to(torch.bfloat16)``) took from frozen parameters are gone, and a parameter that the
        caller unfroze and trained past the configuration cannot be restored (a warning).
        """
        t5 = self._base
        for name in self._trained_beyond_config():
            warnings.warn(f"the T5's {name} was unfrozen by hand: its values cannot be restored", stacklevel=2)
        self.gradient_checkpointing_disable()
        self._owner.remove()
        for name, parameter in t5.named_parameters():
            if name in self._originals:
                parameter.copy_(self._originals[name])
                parameter.grad = None
            parameter.requires_grad_(self._required_grad[name])
        for module, mode in self._modes.items():
            module.training = mode
        self.t5 = None
        return t5


def _check_task_index(task_index: Any, T: int) -> None:
    if not isinstance(task_index, Tensor):
        raise ValueError(f"task_index must be a tensor, got {task_index!r}")
    if task_index.dim() != 1 or task_index.dtype not in (torch.int32, torch.int64):
        got = f"{task_index.dtype} {list(task_index.shape)}"
        raise ValueError(f"task_index must be [B] in int32 or int64, got {got}")
    if not torch.compiler.is_compiling():
        check_task_range(task_index, T)


def _trained_names(t5: nn.Module, config: HyperFormerConfig) -> set[str]:
    """Names (as ``named_parameters`` gives them: tied ones once) of the T5's parameters that the configuration
    trains."""
    chosen: list[nn.Parameter] = []
    if config.unfreeze_layer_norms:
        # by name: the class is T5LayerNorm, or apex's FusedRMSNorm where that is installed
        chosen += [
            p for name, m in t5.named_modules() if name.endswith("layer_norm") for p in m.parameters(recurse=False)
        ]
    if config.unfreeze_lm_head:
        head = getattr(t5, "lm_head", None)
        if head is None:
            raise ValueError(f"unfreeze_lm_head is True, but {type(t5).__name__} has no lm_head")
        chosen += head.parameters()
    identities = {id(parameter) for parameter in chosen}
    return {name for name, parameter in t5.named_parameters() if id(parameter) in identities}
