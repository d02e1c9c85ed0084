"""The learning rate of each part of a model: parameter groups for any optimizer.

The rule ``"uniform"`` gives every parameter the rate that is set. With Adam, whose steps have the size of the rate
whatever the gradient's, this rate then means something else in a hypernetwork than in a plain adapter: a generated
weight w = sum_l G_l e_l + g_0 is a sum over k inputs of size 1, so that a step of the rate in every G_l moves w by up
to k times the rate. At k = 64 a rate of 1e-3 moves the weights of the adapters by up to 0.06 a step.

The rule ``"fan_in"`` gives each part a rate that follows from how many numbers it reads (as in maximal update
parametrisation for Adam, whose rate of a matrix goes with 1 / fan-in: Yang et al., Tensor Programs V, 2022):

- Generators: the rate / sqrt(k). Their biases, and adapters that are learned without a generator, are plain weights and
  have the rate itself. ``FAN_IN_EXPONENT`` says why it is the root.
- Each layer of the network between embeddings and generators: the rate / sqrt(fan-in), where it makes numbers of size
  1, as it does with ``init_weights="hyperfan_in"``. The authors' smaller weights make smaller numbers (1e-2 behind the
  second layer), and have the rate that changes them by the same fraction: times the ratio of their standard deviation
  to that of a layer which preserves the size of what it reads. Biases have the rate times the size of what the layer
  makes.
- Embeddings, whose numbers have size 1, layer norms, and what of the T5 is trained: the rate.

What this is for, measured by ``tools/recipe_start.py`` (``tools/results/recipe_start.md``): at a rate of 1e-3 the first
step of the authors' start moves the inputs of the generators by 0.88 of their size, all tasks' in one direction, and
after ten steps the mean cosine between tasks has gone from 0.71 to 0.99. Under ``"fan_in"`` the first step of ours
moves them by 0.012, and the cosine goes from 0.46 to 0.49.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .adapter_table import AdapterTable
from .config import HyperFormerConfig
from .hypernetwork import HyperNetwork, TaskEmbeddings, TaskProjector
from .initialisation import AUTHORS, Initialisation, linear_std
from .recipes import learning_rate_rule
from .t5 import NEW_HEADS

#: The rate of a generator and of a layer before it goes with fan-in^-FAN_IN_EXPONENT. At 1 a step moves what a layer
#: makes by up to the rate, as a step of a plain adapter moves its weights, but only if all of its inputs pull in one
#: direction. The gradient of what tasks share is a sum over tasks, of which Adam makes a step of one size, so that the
#: share of each is smaller: tasks learn more slowly in company. At 1/2 a step moves what a layer makes by about the
#: rate where its inputs are unlike. docs/choosing.md has what both came to.
FAN_IN_EXPONENT = 0.5

#: The group whose rate ``embedding_warmup_steps`` raises.
EMBEDDINGS = "embeddings"


class Place(NamedTuple):
    """The group of a parameter, and its rate as a multiple of the one that is set."""

    group: str
    scale: float = 1.0


def parameter_groups(
    model: nn.Module, learning_rate: float, rule: str | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trained parameters of a model in groups, each with its learning rate, as any optimizer takes them.

    :class:`~hyperformer_fast.training.HyperFormerTrainer` does this by itself. The stock Trainer is given an
    optimizer::

        groups = hyperformer_fast.parameter_groups(model, learning_rate=1e-3, weight_decay=0.01)
        trainer = Seq2SeqTrainer(model, args, optimizers=(torch.optim.AdamW(groups), None), ...)

    Every parameter that requires a gradient now is in exactly one group, also if it has several names. The groups have
    a ``"name"``: ``"generators"`` and ``"generator biases"``, ``"projectors"`` (between embeddings and generators) and
    ``"projector biases"``, ``"embeddings"`` (of tasks, layers and positions), ``"adapters"`` (learned without a
    generator), ``"norms"``, ``"head"``, ``"t5"``, and ``"other"`` for those of a module around the model. Groups whose
    rate is ``learning_rate`` itself come first, because the Trainer logs the rate of the first.

    Args:
        model: a :class:`~hyperformer_fast.HyperFormerModel`, or DDP or another module around one. One that FSDP2 is to
            shard must be sharded before.
        learning_rate: the rate of a plain weight, of which the rule makes that of each part.
        rule: ``"uniform"`` or ``"fan_in"``; None for that of the model's recipe.
        weight_decay: for all parameters except biases and norms, as the Trainer decays them.

    Raises:
        TypeError: there is no HyperFormerModel in ``model``.
        ValueError: there is no such rule.
    """
    places = place_parameters(model, rule)
    decayed = decayed_names(model) if weight_decay else set()
    groups: dict[tuple[Place, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((places[id(parameter)], name in decayed), []).append(parameter)
    made = [
        {
            "params": parameters,
            "lr": learning_rate * place.scale,
            "weight_decay": weight_decay if decays else 0.0,
            "name": place.group if decays or not weight_decay else f"{place.group} (no decay)",
        }
        for (place, decays), parameters in groups.items()
    ]
    return sorted(made, key=lambda group: _rank(group, {learning_rate}))


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rule: str) -> None:
    """Split the parameter groups of an optimizer that has not stepped yet by place, and scale their rates.

    What else a group sets (weight decay, say) stays.

    Raises:
        ValueError: the optimizer chooses its rate itself, or does not take its parameters from its groups.
    """
    places = place_parameters(model, rule)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if set(held) != trained or any(not isinstance(group.get("lr"), (int, float)) for group in optimizer.param_groups):
        raise ValueError(
            f"learning_rate_rule={rule!r} and embedding_warmup_steps need an optimizer with a learning rate for each "
            f'parameter group, which {type(optimizer).__name__} is not here: set learning_rate_rule="uniform" and '
            "embedding_warmup_steps=0, or choose another optim"
        )
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[Place, list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(places[id(parameter)], []).append(parameter)
        for place, parameters in parts.items():
            rate = group["lr"] * place.scale
            split.append({**group, "params": parameters, "lr": rate, "name": place.group})
    base = {group["lr"] for group in optimizer.param_groups}
    optimizer.param_groups[:] = sorted(split, key=lambda group: _rank(group, base))


def _rank(group: Mapping[str, Any], base: Collection[float]) -> tuple[bool, bool]:
    """A key that sorts groups with the rate that is set before others, and those whose rate warms up behind these."""
    return group["lr"] not in base, group["name"].startswith(EMBEDDINGS)


def decayed_names(model: nn.Module) -> set[str]:
    """The names of the parameters that the Trainer of transformers applies weight decay to."""
    from transformers import Trainer

    return set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # it reads nothing of the Trainer


def place_parameters(model: nn.Module, rule: str | None = None) -> Mapping[int, Place]:
    """The place of each parameter in ``model``, by its identity. Errors are those of :func:`parameter_groups`."""
    from .model import HyperFormerModel

    adapted = next((module for module in model.modules() if isinstance(module, HyperFormerModel)), None)
    if adapted is None:
        raise TypeError(f"parameter groups are those of a HyperFormerModel, and {type(model).__name__} has none in it")
    config = adapted.hyperformer_config
    places = {id(p): Place("other") for p in model.parameters()}
    places |= {id(p): Place("t5") for p in adapted._base.parameters()}
    places |= {id(p): Place("norms") for p in _norms(adapted._base)}
    if config.variant != "finetuning":
        heads = (getattr(adapted._base, name, None) for name in ("lm_head", *NEW_HEADS))
        places |= {id(p): Place("head") for head in heads if head is not None for p in head.parameters()}
    return places | place_parts([adapted.task_embeddings, *adapted.hypernetworks.values()], config, rule)


def place_parts(parts: Iterable[nn.Module], config: HyperFormerConfig, rule: str | None = None) -> dict[int, Place]:
    """The same for the task embeddings and the stacks' hypernetworks or tables alone."""
    scaled = learning_rate_rule(config, rule) == "fan_in"
    return {
        id(parameter): place if scaled else Place(place.group)
        for part in parts
        for parameter, place in _of_part(part, config)
    }


def _norms(t5: nn.Module) -> Iterator[nn.Parameter]:
    # By name, because the class depends on what is installed and fused.
    for name, module in t5.named_modules():
        if name.endswith("layer_norm"):
            yield from module.parameters(recurse=False)


def _of_part(part: nn.Module, config: HyperFormerConfig) -> Iterator[tuple[nn.Parameter, Place]]:
    """Every parameter of the task embeddings or of one stack, and its place under the rule "fan_in"."""
    if isinstance(part, AdapterTable):
        yield from ((p, Place("adapters")) for p in part.adapters.values())
        if part.norms is not None:
            yield part.norms, Place("norms")
    elif isinstance(part, TaskEmbeddings):
        yield from ((p, Place(EMBEDDINGS)) for p in part.task_to_embeddings.values())
        yield from _of_projector(part.projector, config)
    elif isinstance(part, HyperNetwork):
        generator = part.generator
        yield generator.weight, Place("generators", generator.weight.shape[-1] ** -FAN_IN_EXPONENT)
        yield generator.bias, Place("generator biases")
        if generator.norms is not None:
            yield generator.norms, Place("norms")
        for name in ("layer_embeddings", "position_embeddings"):
            if hasattr(part, name):
                yield from ((p, Place(EMBEDDINGS)) for p in getattr(part, name).parameters())
        yield from _of_projector(getattr(part, "projector", None), config)
        norm = getattr(part, "embedding_norm", None)
        if norm is not None:
            yield from ((p, Place("norms")) for p in norm.parameters())


def _of_projector(projector: TaskProjector | None, config: HyperFormerConfig) -> Iterator[tuple[nn.Parameter, Place]]:
    size = 1.0  # of what the layer makes at the start
    for index, gain in projector.GAINS.items() if projector is not None else ():
        layer: Any = cast(nn.Sequential, projector)[index]
        fan_in = layer.weight.shape[-1]
        plain = linear_std(fan_in, AUTHORS._replace(weights="hyperfan_in"), gain)
        ratio = linear_std(fan_in, Initialisation.of(config), gain) / plain
        size *= ratio
        yield layer.weight, Place("projectors", ratio * fan_in**-FAN_IN_EXPONENT)
        yield layer.bias, Place("projector biases", size)
