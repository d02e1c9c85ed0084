"""Who is measured: each provider makes a callable for one adapter and one input, and is checked against float64 before
it is timed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor

from hyperformer_fast import backends, ops, reference
from hyperformer_fast.layout import AdapterLayout

#: d and the reduction factors of the published settings.
MODELS = {"T5-small": 512, "T5-base": 768, "T5-large": 1024}
ACTIVATION = "gelu_new"


@dataclasses.dataclass
class Case:
    """One adapter and its input.

    Args:
        N: rows; d width; b bottleneck; dtype of x; device of everything.
    """

    N: int
    d: int
    b: int
    dtype: torch.dtype
    device: str = "cpu"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.layout = AdapterLayout(self.d, self.b)
        self.packed = (draw(1, self.layout.numel) * 0.05).to(self.device)
        self.layout.unpack(self.packed)["post_gamma"].add_(1)
        self.x, self.g = (draw(self.N, self.d).to(self.dtype).to(self.device) for _ in range(2))

    @property
    def forward_flops(self) -> int:
        """The two skinny products."""
        return 4 * self.N * self.d * self.b

    @property
    def row_bytes(self) -> int:
        """Of one [N, d]."""
        return self.x.numel() * self.x.element_size()

    @functools.cached_property
    def truth(self) -> list[Tensor]:
        """out, dx, dpacked in float64."""
        x, packed = self.x.double().requires_grad_(), self.packed.double().requires_grad_()
        out = reference.adapter(x, packed, self.layout, ACTIVATION)
        return [out.detach(), *torch.autograd.grad(out, (x, packed), self.g.double())]


Apply = Callable[[Tensor, Tensor], Tensor]


def _eager(case: Case) -> Apply:
    return lambda x, packed: reference.adapter(x, packed, case.layout, ACTIVATION)


def _compiled(case: Case) -> Apply:
    torch._dynamo.reset()
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        # It asks the CPU, not ATen's capability, and mixes the two: its results were wrong where AVX2 was forced.
        torch._inductor.config.cpp.simdlen = 256
    return torch.compile(_eager(case), dynamic=False)


def _ours(case: Case) -> Apply:
    folded = ops.fold(case.packed, case.layout, case.dtype)
    return lambda x, packed: ops.adapter(x, packed, case.layout, ACTIVATION, folded)


def _ours_in_cuda(case: Case) -> Apply:
    with backends.use_backend("cuda"):
        found = backends.explain("adapter_forward", case.x, b=case.b)
        if found.chosen is None:
            raise ImportError(found.reasons["cuda"])
        folded = ops.fold(case.packed, case.layout, case.dtype)

    def apply(x: Tensor, packed: Tensor) -> Tensor:
        with backends.use_backend("cuda"):
            return ops.adapter(x, packed, case.layout, ACTIVATION, folded)

    return apply


def _adapters_library(case: Case) -> Apply:
    """`adapters.Adapter` with ln_after and the residual after the norm: our formula, its weights its own parameters."""
    from adapters import AdapterConfig
    from adapters.methods.modeling import Adapter

    config = AdapterConfig.load(
        "double_seq_bn",
        ln_before=False,
        ln_after=True,
        original_ln_before=False,
        original_ln_after=False,
        residual_before_ln=False,
        adapter_residual_before_ln=False,
        non_linearity="gelu_new",
        reduction_factor=case.d / case.b,
        init_weights="bert",
    )
    module = Adapter("bench", case.d, case.b, config)
    w = {name: part[0] for name, part in case.layout.unpack(case.packed).items()}
    down, up, norm = module.adapter_down[0], module.adapter_up, module.adapter_norm_after
    with torch.no_grad():
        for layer, names in (
            (down, "down_weight down_bias"),
            (up, "up_weight up_bias"),
            (norm, "post_gamma post_beta"),
        ):
            for parameter, name in zip((layer.weight, layer.bias), names.split()):
                parameter.copy_(w[name])
    module.to(case.device, case.dtype)
    parameters = list(module.parameters())

    def apply(x: Tensor, packed: Tensor) -> Tensor:
        return module(x, residual_input=x)[0]

    apply.parameters = parameters
    return apply


def _graphed(case: Case) -> Apply:
    if not case.device.startswith("cuda"):
        raise ImportError("CUDA graphs need a GPU")
    torch._dynamo.reset()
    return torch.compile(_eager(case), dynamic=False, mode="reduce-overhead")


PROVIDERS: dict[str, Callable[[Case], Apply]] = {
    "eager": _eager,
    "torch.compile": _compiled,
    "torch.compile, CUDA graphs": _graphed,
    "adapters": _adapters_library,
    "hyperformer_fast": _ours,
    "hyperformer_fast, CUDA C++": _ours_in_cuda,
}


class Unavailable(RuntimeError):
    """The provider is not installed, or does not compute what is asked."""


def make(provider: str, case: Case, backward: bool) -> Callable[[], object]:
    """The callable to time: a forward under no_grad, or a forward and a backward to x and the weights. Checked first.

    Raises:
        Unavailable: it cannot be imported, or its result is wrong.
    """
    try:
        apply = PROVIDERS[provider](case)
    except ImportError as error:
        raise Unavailable(f"{provider}: {error}") from error
    # a generated weight is float32 and is cast on every call; a provider with parameters of its own has them in x's
    # dtype
    packed = case.packed.clone().requires_grad_(backward)
    x = case.x.clone().requires_grad_(backward)
    leaves = [x, *getattr(apply, "parameters", [packed])]

    def forward_only() -> Tensor:
        with torch.no_grad():
            return apply(x, packed)

    def forward_backward() -> list[Tensor]:
        out = apply(x, packed)
        return [out, *torch.autograd.grad(out, leaves, case.g)]

    _check(provider, case, forward_backward() if backward else [forward_only()], own_weights=len(leaves) > 2)
    return forward_backward if backward else forward_only


def _check(provider: str, case: Case, results: list[Tensor], own_weights: bool) -> None:
    eps = torch.finfo(case.dtype).eps
    for name, mine, truth in zip(("out", "dx") if own_weights else ("out", "dx", "dpacked"), results, case.truth):
        error = ((mine.double() - truth).norm() / truth.norm()).item()
        if not error <= 16 * eps:
            raise Unavailable(f"{provider}: {name} is off by {error:.1e} relative to float64")
