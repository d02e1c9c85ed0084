"""The attributes and methods that transformers and its Trainer expect of a model, answered by the T5 inside ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from .sites import recompute_contexts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


class T5Delegate(PreTrainedModel):
    """The part of a model that stands for its T5: attributes of the T5, and gradient checkpointing.

    A ``PreTrainedModel``, because the Trainer asks such a model to save itself (``save_pretrained``), and others for
    their whole state dict. What a PreTrainedModel keeps as attributes, its T5 answers here, so that the two cannot
    differ (which mypy cannot know); its initialisation is skipped, because the T5 comes with its weights.
    """

    main_input_name = "input_ids"
    #: The T5 that holds the adapters; None after ``unload()``.
    t5: PreTrainedModel | None

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def post_init(self) -> None:
        """Does nothing: the T5 has done so for itself, and the hypernetworks draw their weights when they are built."""

    init_weights = post_init

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer is to pass ``num_items_in_batch``, so that the loss is the mean over all labels of a step.

        False with a transformers whose label smoothing does not divide by it, though Trainer assumes that it does
        (4.57): each micro-batch and process then counts the same, as for a plain T5 there.
        """
        from transformers.trainer_pt_utils import LabelSmoother

        return "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters

    @property
    def _base(self) -> PreTrainedModel:
        if self.t5 is None:
            raise RuntimeError("this HyperFormerModel was unloaded: wrap the T5 again with get_hyperformer_model")
        return self.t5

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute blocks in the backward, each with the weights of the forward that it ran in.

        Args:
            gradient_checkpointing_kwargs: keyword arguments of ``torch.utils.checkpoint.checkpoint``.
                ``use_reentrant`` defaults to False here, whatever transformers' default is: reentrant checkpoints lose
                the gradients of weights that blocks share.
            kwargs: further arguments of transformers' method, such as ``every_n_layers`` and ``offload``.

        Raises:
            ValueError: ``use_reentrant=True``, or a ``context_fn`` (ours restores the weights).
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError(
                "use_reentrant=True cannot work with generated adapters: their weights are shared by all blocks, and "
                "reentrant checkpoints lose those gradients; leave it out, or set it to False"
            )
        if options.setdefault("context_fn", recompute_contexts) is not recompute_contexts:
            raise ValueError(
                "context_fn is taken: the adapters' own finds the weights of the forward that is recomputed"
            )
        t5 = self._base
        # transformers 5.23 renamed the method.
        enable = getattr(t5, "activation_checkpointing_enable", None) or t5.gradient_checkpointing_enable
        enable(options, **kwargs)
        # transformers 5 makes the embedding's output require a gradient, which only reentrant checkpoints need.
        self.disable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        """Undo :meth:`gradient_checkpointing_enable`."""
        t5 = self._base
        if is_checkpointing(t5):
            (getattr(t5, "activation_checkpointing_disable", None) or t5.gradient_checkpointing_disable)()
        self.disable_input_require_grads()

    def activation_checkpointing_enable(  # type: ignore[override]  # its options are in kwargs here
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Same as :meth:`gradient_checkpointing_enable`, under the name that transformers uses since 5.23."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward (in ``train()`` mode only, as everywhere in transformers)."""
        return is_checkpointing(self._base)

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """transformers' method of this name. Nothing here needs it, because checkpoints are not reentrant."""
        self._base.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo :meth:`enable_input_require_grads`; does nothing where it was not called."""
        if getattr(self._base, "_require_grads_hook", None) is not None:
            self._base.disable_input_require_grads()

    @property
    def config(self) -> PretrainedConfig:  # type: ignore[override]
        """The T5's configuration; ours is ``hyperformer_config``."""
        return self._base.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The T5's generation configuration."""
        return self._base.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._base.generation_config = value

    @property
    def device(self) -> torch.device:
        """The T5's device."""
        return self._base.device

    @property
    def dtype(self) -> torch.dtype:
        """The T5's dtype. The adapters compute in it; their weights are generated in float32."""
        return self._base.dtype

    @property
    def _no_split_modules(self) -> list[str]:  # type: ignore[override]
        """The classes of the T5's blocks, each of which FSDP and accelerate keep on one device."""
        return list(self._base._no_split_modules or ())

    def can_generate(self) -> bool:  # type: ignore[override]
        """Whether the T5 has a head to generate with."""
        return self._base.can_generate()

    def get_input_embeddings(self) -> nn.Module:
        """The T5's input embeddings."""
        return self._base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The T5's head."""
        head: nn.Module | None = self._base.get_output_embeddings()
        return head

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The T5's encoder. It cannot be called by itself, because its adapters then have no task; the model's forward
        returns its output as ``encoder_last_hidden_state``."""
        encoder: nn.Module = self._base.get_encoder(*args, **kwargs)
        return encoder

    def get_decoder(self) -> nn.Module:
        """The T5's decoder. It cannot be called by itself, because its adapters then have no task."""
        decoder: nn.Module = self._base.get_decoder()
        return decoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the T5's input embeddings."""
        self._base.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the T5's head."""
        self._base.set_output_embeddings(value)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where the parts of a T5 are that was loaded with ``device_map``; no such attribute otherwise."""
        device_map: dict[str, Any] = getattr(self._base, "hf_device_map")  # noqa: B009
        return device_map

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of the T5, counted as transformers counts them, and of the hypernetworks."""
        ours = (p for name, p in self.named_parameters() if not name.startswith("t5."))
        t5 = self._base.num_parameters(only_trainable, exclude_embeddings)
        return t5 + sum(p.numel() for p in ours if p.requires_grad or not only_trainable)

    @property
    def name_or_path(self) -> str:  # type: ignore[override]
        """The name or folder that the T5 was loaded from."""
        return str(self._base.name_or_path)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The T5's method, which PEFT's wrappers call."""
        # PreTrainedModel does not declare this method; T5's classes with a head have it.
        prepare: Callable[..., dict[str, Any]] = getattr(self._base, "prepare_inputs_for_generation")  # noqa: B009
        return prepare(*args, **kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> None:
        # This is the first method that transformers calls of an assistant_model.
        raise TypeError(
            "a HyperFormerModel can assist the generation of another HyperFormerModel only, whose task it takes: pass "
            "its unload()ed T5 to a model without tasks"
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels shifted right by one, as the T5's decoder reads them."""
        shift: Callable[[Tensor], Tensor] = getattr(self._base, "prepare_decoder_input_ids_from_labels")  # noqa: B009
        return shift(labels)


def with_cache(t5: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``t5.generate``, with a cache that has room for all of its decoder's blocks.

    ``generate`` of transformers makes caches with a place for each block of the encoder, because ``num_hidden_layers``
    of a T5's configuration is the encoder's number of blocks: a deeper decoder ends in an IndexError. A dynamic cache
    that is made without a configuration grows instead.

    Raises:
        ValueError: a kind of cache is asked for that would be too small, here or for an assistant.
    """
    config = arguments.get("generation_config") or getattr(t5, "generation_config", None)

    def setting(name: str) -> Any:
        return arguments[name] if arguments.get(name) is not None else getattr(config, name, None)

    # An assistant's own cache is always made by transformers.
    assistant = arguments.get("assistant_model")
    if _has_deeper_decoder(assistant):
        raise ValueError(
            f"{_deeper_decoder(assistant)}, so that transformers cannot make its cache: take another assistant_model"
        )
    if not _has_deeper_decoder(t5) or setting("use_cache") is False or arguments.get("past_key_values") is not None:
        return arguments
    kind = setting("cache_implementation")
    if kind is not None:
        raise ValueError(
            f"cache_implementation={kind!r} cannot serve this T5: {_deeper_decoder(t5)}, and transformers makes a "
            f"cache of the encoder's size; leave cache_implementation out, or pass past_key_values"
        )
    return {**arguments, "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


def _has_deeper_decoder(t5: PreTrainedModel | None) -> bool:
    config = getattr(t5, "config", None)
    return (getattr(config, "num_decoder_layers", None) or 0) > getattr(config, "num_layers", 0)


def _deeper_decoder(t5: Any) -> str:
    return f"its decoder has {t5.config.num_decoder_layers} blocks and its encoder {t5.config.num_layers}"


def is_checkpointing(module: nn.Module) -> bool:
    """Whether any block is recomputed in the backward (transformers 5.23 warns at its own property of that name)."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
