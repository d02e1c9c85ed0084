"""How the weights of hypernetworks and adapters start (``init_weights`` and ``zero_delta`` of a configuration).

``"authors"``: every linear layer and generator has normally distributed weights with standard deviation 1e-2 and zero
biases. A generator of width k, whose input e has a mean square of 1, then makes weights with a standard deviation of
1e-2 sqrt(k): 0.08 at k = 64, whatever they are for.

``"hyperfan_in"`` and ``"hyperfan_out"`` (Chang, Flokas and Lipson, Principled weight initialization for hypernetworks,
ICLR 2020). A generated weight w = sum_l G_l e_l has the variance k Var(G) E[e^2]. So the rows of G that make a part of
an adapter get

    Var(G) = Var(w) / (k E[e^2])

with the variance Var(w) that the part has in a plain adapter with fan-in (fan-out) initialisation:

===========  ===================  =================  =================================================================
part         Var(w), fan-in       Var(w), fan-out    why
===========  ===================  =================  =================================================================
down_weight  2 / d                2 / b              fan-in (fan-out) of the matrix; the activation halves what passes
up_weight    1 / b                1 / d              the same without an activation; both times UP_SHARE^2
biases       0                    0                  plain ones start at zero. (Chang et al. give generated biases half
                                                     of the variance, for inputs of variance 1, which a T5's are not)
===========  ===================  =================  =================================================================

The up-projection is a tenth of its plain size (``UP_SHARE``). Without a post-norm its output is what the adapter adds.
With one, the norm takes the size out again, and what is left is how fast it learns: a step of Adam has the size of the
rate, so that it turns small weights further than large ones. docs/choosing.md has what the recipe comes to at each
rate.

The generator's bias is zero but for the norms. Those start near what plain ones would be, the same for all tasks, with
a generated part of a tenth (``TASK_SHARE``): enough for the norms to differ between tasks and for a gradient to reach
the embeddings through them, and too little to change the scale of anything.

- The pre-norm: gamma 1, beta 0.
- The post-norm: gamma ``POST_GAMMA``, beta 0. The post-norm's output is what the adapter adds to the T5's hidden
  states. With a gamma of 1, as plain adapters have it, that is noise of variance 1 before anything is learned. The
  authors' gammas are small (a standard deviation of 0.08 at k = 64), but at their rates a step moves them by 0.06. At
  rates that move a gamma by the rate, small ones take long to grow, and learned less in the same steps: of one run
  each of 1,200 steps at 3e-3 with an earlier embedded T5, a gamma of 1 came to 69.3 on average, and 0.3 to 66.7.

The network between embeddings and generator has He's initialisation in its first layer, Var = 2 / fan-in, because a
ReLU follows, and 1 / fan-in in its second. With embeddings of mean square 1 its output has mean square 1, as the
formula above assumes. (With the authors' weights of 1e-2 the output has a root mean square of 0.011 at the paper's
sizes, which the layer norm behind it scales up.)

In the variants that join the embedding of a task with those of its place (layer, position), the weights of that first
layer are larger where they read the task's, so that two thirds of the variance of what it makes come from the task
(``TASK_PART``). With equal weights a third would, and any two tasks begin with generators' inputs whose cosine is 0.71:
what one task learns moves the adapters of all others.

``zero_delta``: the parts of the last factor of what an adapter adds (``last_parts``) are zero, generated from zero rows
and zero biases. Gradients reach that factor in the first step, and all others from the second on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import HyperFormerConfig
from .layout import AdapterLayout

#: Standard deviation of the initial weights: `weight_init_range` of the authors' AdapterConfig.
AUTHORS_STD = 1e-2

#: Where the post-norm's gamma starts.
POST_GAMMA = 1.0

#: How much of a plain layer's size the up-projection has.
UP_SHARE = 0.1

#: The part of a norm's start that differs between tasks, where norms are generated.
TASK_SHARE = 0.1

#: The part of the variance behind a projector's first layer that is the task's, where places are joined with it.
TASK_PART = 2 / 3


class Initialisation(NamedTuple):
    """The two choices of a configuration; the defaults are what the authors' code does."""

    weights: str = "authors"  #: ``init_weights``
    zero_delta: bool = False

    @classmethod
    def of(cls, config: HyperFormerConfig) -> Initialisation:
        """The choices of ``config``."""
        return cls(str(config.init_weights), bool(config.zero_delta))


AUTHORS = Initialisation()


class Start(NamedTuple):
    """Mean and standard deviation of the numbers in one part of an adapter."""

    mean: float
    std: float


def last_parts(layout: AdapterLayout) -> tuple[str, ...]:
    """The parts that make the last factor of what an adapter adds to its input: it adds zero where they are zero."""
    names = ("post_gamma", "post_beta"), ("up_weight", "up_bias"), ("pre_gamma", "pre_beta")
    return next(pair for pair in names if pair[0] in layout.slices)


def plain_starts(layout: AdapterLayout, init: Initialisation) -> dict[str, Start]:
    """How each part of a plain adapter starts, by name: one that is learned by itself, without a hypernetwork."""
    if init.weights == "authors":
        down = up = AUTHORS_STD
        post = 1.0
    else:
        fan_in = init.weights == "hyperfan_in"
        down = math.sqrt(2 / (layout.d if fan_in else layout.b))
        up = math.sqrt(1 / (layout.b if fan_in else layout.d)) * UP_SHARE
        post = POST_GAMMA
    starts = dict.fromkeys(layout.slices, Start(0.0, 0.0))
    for name, start in (
        ("down_weight", Start(0.0, down)),
        ("up_weight", Start(0.0, up)),
        ("post_gamma", Start(post, 0.0)),
        ("pre_gamma", Start(1.0, 0.0)),
    ):
        if name in starts:
            starts[name] = start
    return starts | (dict.fromkeys(last_parts(layout), Start(0.0, 0.0)) if init.zero_delta else {})


def plain_sizes(layout: AdapterLayout, init: Initialisation) -> dict[str, float]:
    """The standard deviation of each projection of a plain layer, by name: of one that starts at a share of it, the
    whole. One that starts at zero, or that is not there, is left out."""
    shares = {"down_weight": 1.0, "up_weight": 1.0 if init.weights == "authors" else UP_SHARE}
    starts = plain_starts(layout, init)
    return {name: starts[name].std / share for name, share in shares.items() if name in starts and starts[name].std}


def plain_norms(layout: AdapterLayout, init: Initialisation) -> Tensor:
    """The initial parameters of norms that are learned by themselves, as the end of a packed adapter."""
    starts = plain_starts(layout, init)
    return torch.cat(
        [torch.empty(0), *(torch.full((layout.d,), starts[name].mean) for name in starts if _is_norm(name))]
    )


@torch.no_grad()
def draw_projections(packed: Tensor, layout: AdapterLayout, init: Initialisation) -> Tensor:
    """Fill the projections of plain adapters, ``packed`` [..., P without the norms], and return them."""
    packed.normal_(std=AUTHORS_STD if init.weights == "authors" else 1.0)
    for name, start in plain_starts(layout, init).items():
        if not _is_norm(name) and not (init.weights == "authors" and start.std):
            _scale(packed[..., layout.slices[name]], start.std)
    return packed


@torch.no_grad()
def draw_generator(
    weight: Tensor, bias: Tensor, layout: AdapterLayout, init: Initialisation, mean_square: float = 1.0
) -> None:
    """Fill the weight [Q, rows, k] and the bias [Q, rows] of generators.

    Args:
        weight, bias: the parameters; ``rows`` may lack the norms.
        layout: the layout of the adapters that they generate.
        init: how.
        mean_square: E[e^2], of the numbers that the generators read.
    """
    weight.normal_(std=AUTHORS_STD if init.weights == "authors" else 1.0)
    bias.zero_()
    starts = plain_starts(layout, init)
    for name, (mean, std) in starts.items():
        rows = layout.slices[name]
        if rows.start >= weight.shape[1]:
            break
        if init.weights != "authors":
            if _is_norm(name):
                std = TASK_SHARE * starts[f"{name.split('_')[0]}_gamma"].mean
                bias[:, rows] = mean
            _scale(weight[:, rows], std / math.sqrt(weight.shape[-1] * mean_square))
        elif init.zero_delta and name in last_parts(layout):
            weight[:, rows] = 0.0


def linear(in_dim: int, out_dim: int, init: Initialisation, gain: float) -> nn.Linear:
    """A linear layer whose weight has the standard deviation of :func:`linear_std`, and whose bias is zero."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.normal_(layer.weight, std=linear_std(in_dim, init, gain))
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def favour_task(weight: Tensor, parts: int, init: Initialisation) -> None:
    """Scale the weight [hidden, parts * dim] of a layer that reads a task's embedding and ``parts - 1`` of its place,
    so that ``TASK_PART`` of the variance of what it makes is the task's. The authors' weights stay as they were drawn.
    """
    if init.weights != "authors":
        task, *places = weight.chunk(parts, 1)
        task.mul_(math.sqrt(TASK_PART * parts))
        for place in places:
            place.mul_(math.sqrt((1 - TASK_PART) * parts / len(places)))


def linear_std(fan_in: int, init: Initialisation, gain: float) -> float:
    """The initial standard deviation of a linear layer's weight: 1e-2 of the authors, else sqrt(gain / fan-in)."""
    return AUTHORS_STD if init.weights == "authors" else math.sqrt(gain / fan_in)


def _scale(drawn: Tensor, factor: float) -> None:
    """Multiply in place. A factor of 0 leaves no negative zeros."""
    if factor:
        drawn.mul_(factor)
    else:
        drawn.zero_()


def _is_norm(name: str) -> bool:
    return name.startswith(("post_", "pre_"))
