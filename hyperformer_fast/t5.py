"""The T5 inside a model: which of its parameters are trained, where it computes, and how unload() restores it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .config import HyperFormerConfig
from .fingerprint import hides_its_weight, is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Heads that no T5 is pretrained with. They are drawn at random, so they are useless unless they are trained.
NEW_HEADS = ("classification_head", "classifier", "qa_outputs")


def trained_names(t5: nn.Module, config: HyperFormerConfig) -> set[str]:
    """Names of the T5's parameters that are trained: those that the configuration trains, and a head that the T5 was
    not pretrained with (``NEW_HEADS``). The names are those of ``named_parameters``, which lists tied ones once.

    Raises:
        ValueError: ``unfreeze_lm_head`` without such a head, or what is to be trained is quantised.
    """
    if config.variant == "finetuning":
        if _is_quantised(t5):
            raise ValueError(
                "variant 'finetuning' trains the whole T5, but this one is quantised: load it in floating point"
            )
        return {name for name, _ in t5.named_parameters()}
    chosen: list[nn.Parameter] = []
    if config.unfreeze_layer_norms:
        # By name, because the class is T5LayerNorm, or apex's FusedRMSNorm where that is installed.
        chosen += [
            p for name, m in t5.named_modules() if name.endswith("layer_norm") for p in m.parameters(recurse=False)
        ]
    if config.unfreeze_lm_head:
        head = getattr(t5, "lm_head", None)
        if head is None:
            raise ValueError(f"unfreeze_lm_head is True, but {type(t5).__name__} has no lm_head")
        chosen += _expect_trainable(head, "lm_head", "unfreeze_lm_head is True")
    for name in NEW_HEADS:
        if getattr(t5, name, None) is not None:
            chosen += _expect_trainable(getattr(t5, name), name, "T5s are pretrained without it, so it is trained")
    identities = {id(parameter) for parameter in chosen}
    return {name for name, parameter in t5.named_parameters() if id(parameter) in identities}


def _expect_trainable(head: nn.Module, name: str, why: str) -> list[nn.Parameter]:
    if _is_quantised(head):
        raise ValueError(f"{why}, but this T5's {name} is quantised: quantise the T5 without its {name}")
    return list(head.parameters())


def _is_quantised(module: nn.Module) -> bool:
    plain = all(p.is_meta or is_plain(p) for p in module.parameters())
    return not plain or any(map(hides_its_weight, module.modules()))


def place(t5: nn.Module, trained: set[str]) -> tuple[torch.device, torch.dtype]:
    """Where the T5 computes, and the dtype of its floating point parameters.

    Raises:
        ValueError: its weights are not there (meta device), or are there only while they compute (accelerate's
            offloading) though the configuration trains some of them.
    """
    floating = [p for p in t5.parameters() if p.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    absent = next((name for name, p in t5.named_parameters() if p.is_meta), None)
    if absent is None:
        return next(t5.parameters()).device, dtype
    device = _execution_device(t5)
    if device is None:
        raise ValueError(
            f"the T5's {absent} is on the meta device, so there is nothing to put adapters around yet: load its "
            "weights first (from_pretrained, or to_empty and load_state_dict)"
        )
    lost = next((name for name, p in t5.named_parameters() if p.is_meta and name in trained), None)
    if lost is not None:
        raise ValueError(
            f"the T5's {lost} is offloaded, and would forget what it learns: train with unfreeze_layer_norms=False "
            "(and unfreeze_lm_head=False, and without a new head), or on a T5 that is not offloaded"
        )
    return device, dtype


def _execution_device(t5: nn.Module) -> torch.device | None:
    """The device to which accelerate fetches offloaded weights; None where nothing fetches them."""
    for module in t5.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False):
                return torch.device(part.execution_device)
    return None


def tied_names(t5: nn.Module) -> list[list[str]]:
    """The names of parameters that are one tensor, for each such tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in t5.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie(t5: nn.Module, groups: list[list[str]]) -> None:
    """Give all parameters of a group the tensor of its first."""
    for first, *others in groups:
        parameter = t5.get_parameter(first)
        for name in others:
            path, _, own = name.rpartition(".")
            setattr(t5.get_submodule(path), own, parameter)


class _State(NamedTuple):
    training: bool
    requires_grad: dict[str, bool]


class Snapshot:
    """The state of a T5 before it got adapters: modes, ``requires_grad``, and the values of what will be trained.

    Modules are known by identity, because others may be put around them (PEFT does), and by name, because others may
    take their place (resized embeddings).

    Args:
        t5: the T5 in its present state.
        trained: names of the parameters whose values will change; they are copied.
    """

    def __init__(self, t5: nn.Module, trained: set[str]):
        self._modules = {
            module: _State(module.training, {name: p.requires_grad for name, p in module.named_parameters("", False)})
            for module in t5.modules()
        }
        self._required_grad = {name: p.requires_grad for name, p in t5.named_parameters()}
        self._originals = {name: p.detach().clone() for name, p in t5.named_parameters() if name in trained}

    @property
    def trained(self) -> list[str]:
        """Names of the trained parameters."""
        return list(self._originals)

    def trained_parameters(self, t5: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters of ``t5``, by name. RuntimeError where one is no longer there."""
        now = dict(t5.named_parameters(remove_duplicate=False))
        for name in self._originals:
            if name not in now:
                raise RuntimeError(
                    f"the T5 has no {name} any more, which this model trains: undo what was done to the T5 after the "
                    "adapters were put in"
                )
        return {name: now[name] for name in self._originals}

    def trained_beyond(self, t5: nn.Module) -> list[str]:
        """Names of parameters that require a gradient, but are not among the trained."""
        return [name for name, p in t5.named_parameters() if p.requires_grad and name not in self._originals]

    def resized(self, t5: nn.Module) -> None:
        """Adjust the kept values to parameters whose number of rows changed: new rows count as original, and removed
        rows are forgotten."""
        for name, parameter in self.trained_parameters(t5).items():
            old, new = self._originals[name], parameter.detach().clone()
            if new.shape != old.shape:
                rows = min(len(old), len(new))
                new[:rows] = old[:rows]
                self._originals[name] = new

    @torch.no_grad()
    def restore_values(self, t5: nn.Module) -> None:
        """Give the trained parameters their original values: all of them or, on an error, none.

        Raises:
            RuntimeError: one of them is gone, or of another shape or kind.
        """
        now = self.trained_parameters(t5)
        for name, parameter in now.items():
            original = self._originals[name]
            if parameter.shape != original.shape or not parameter.is_floating_point():
                raise RuntimeError(
                    f"the T5's {name}, which this model trained, is {list(parameter.shape)} in {parameter.dtype} now, "
                    f"and was {list(original.shape)}, so its values cannot be given back: undo that first (embeddings "
                    "are resized by HyperFormerModel.resize_token_embeddings)"
                )
        learned = {name: parameter.detach().clone() for name, parameter in now.items()}
        try:
            for name, parameter in now.items():
                parameter.copy_(self._originals[name])
        except BaseException:
            for name, parameter in now.items():
                parameter.copy_(learned[name])
            raise
        for name in self.trained_beyond(t5):
            if name in self._required_grad:
                warnings.warn(f"the T5's {name} was unfrozen by hand: its values cannot be restored", stacklevel=4)

    def restore_flags(self, t5: nn.Module) -> None:
        """Restore the modes of modules and the ``requires_grad`` of parameters. What was added since stays as it is."""
        for parameter in self.trained_parameters(t5).values():
            parameter.grad = None
        for path, module in t5.named_modules():
            state = self._modules.get(module)
            if state is not None:
                module.training = state.training
            for name, parameter in module.named_parameters("", False):
                flag = state.requires_grad.get(name) if state else self._required_grad.get(f"{path}.{name}")
                if flag is not None and (parameter.is_floating_point() or not flag):
                    parameter.requires_grad_(flag)


@contextlib.contextmanager
def untied_head_kept(t5: PreTrainedModel) -> Iterator[None]:
    """While this is active, an untied head (as T5 v1.1 has) stays untied. transformers 5 marks the head of every T5 as
    tied, and would replace it by the embeddings when they are resized."""
    head, said = t5.get_output_embeddings(), t5.config.tie_word_embeddings
    if head is not None and head.weight is not t5.get_input_embeddings().weight:
        t5.config.tie_word_embeddings = False
    try:
        yield
    finally:
        t5.config.tie_word_embeddings = said
