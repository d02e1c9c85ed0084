"""The registry of providers: each computes one adapter in its own way, and is checked against float64 before timing.

A provider registers itself with :func:`provider`, and says in ``missing`` what must be installed where it cannot run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._inductor.config
from timing import relative_error, tolerance
from torch import Tensor

from hyperformer_fast import backends, ops, reference
from hyperformer_fast.layout import AdapterLayout

#: The width d of each published T5.
MODELS = {"T5-small": 512, "T5-base": 768, "T5-large": 1024}
ACTIVATION = "gelu_new"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "hyperformer_fast"


@dataclasses.dataclass
class Case:
    """One adapter and its input.

    Args:
        N: rows.
        d: width.
        b: bottleneck.
        dtype: the dtype of x.
        device: where everything lies.
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
        """Operations of the two products of a forward."""
        return 4 * self.N * self.d * self.b

    @property
    def row_bytes(self) -> int:
        """Bytes of x."""
        return self.x.numel() * self.x.element_size()

    @functools.cached_property
    def truth(self) -> list[Tensor]:
        """out, dx and dpacked, computed in float64."""
        x, packed = self.x.double().requires_grad_(), self.packed.double().requires_grad_()
        out = reference.adapter(x, packed, self.layout, ACTIVATION)
        return [out.detach(), *torch.autograd.grad(out, (x, packed), self.g.double())]


Apply = Callable[[Tensor, Tensor], Tensor]


class Provider(NamedTuple):
    """One way to compute an adapter.

    Args:
        build: makes a function of (x, packed) that returns out. It may have an attribute ``parameters``: tensors that
            it trains in place of ``packed``.
        missing: why it cannot run on a device, and what to install; empty where it can.
        recordable: whether a CUDA graph can record it; not if it replays graphs of its own.
    """

    build: Callable[[Case], Apply]
    missing: Callable[[str], str]
    recordable: bool = True


PROVIDERS: dict[str, Provider] = {}


def provider(
    name: str, missing: Callable[[str], str] = lambda device: "", recordable: bool = True
) -> Callable[[Callable], Callable]:
    """Register a :class:`Provider` under ``name``; tables keep the order of registration."""

    def register(build: Callable[[Case], Apply]) -> Callable[[Case], Apply]:
        PROVIDERS[name] = Provider(build, missing, recordable)
        return build

    return register


def absent(device: str = "cpu") -> dict[str, str]:
    """The providers that cannot run on ``device`` here, and why."""
    reasons = {name: found.missing(device) for name, found in PROVIDERS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def present(device: str = "cpu") -> list[str]:
    """The providers that can run on ``device`` here."""
    return [name for name in PROVIDERS if name not in absent(device)]


@functools.cache
def _without_adapters(device: str) -> str:
    if importlib.util.find_spec("adapters") is None:
        return "pip install adapters"
    try:
        import adapters  # noqa: F401
    except Exception as error:  # a version that does not go with the installed transformers fails in many ways
        return f"pip install a version of adapters for this transformers: {error}"
    return ""


def _without_gpu(device: str) -> str:
    return "" if device.startswith("cuda") else "needs a GPU"


def _without_cuda_library(device: str) -> str:
    if not device.startswith("cuda"):
        return "needs a GPU"
    with backends.use_backend("cuda"):
        found = backends.explain("adapter_forward", device=device)
    return "" if found.chosen else found.reasons["cuda"]


@provider("eager")
def eager(case: Case) -> Apply:
    return lambda x, packed: reference.adapter(x, packed, case.layout, ACTIVATION)


def own_code(function: Callable) -> Callable:
    """A copy of ``function`` with a code object of its own. Dynamo keeps what it compiled by code object: two cases of
    one would meet each other's guards, and after eight it would silently compile no more."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


@provider("torch.compile")
def compiled(case: Case) -> Apply:
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        # torch.compile asks the CPU for its vectors' width, not ATen; where AVX2 is forced, the mixture is wrong.
        torch._inductor.config.cpp.simdlen = 256
    return torch.compile(own_code(eager(case)), dynamic=False)


@provider("torch.compile, CUDA graphs", _without_gpu, recordable=False)
def graphed(case: Case) -> Apply:
    return torch.compile(own_code(eager(case)), dynamic=False, mode="reduce-overhead")


@provider("adapters", _without_adapters)
def adapters_library(case: Case) -> Apply:
    """``adapters.Adapter`` set up to compute our formula, with our numbers as its own parameters."""
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

    def apply(x: Tensor, packed: Tensor) -> Tensor:
        return module(x, residual_input=x)[0]

    apply.parameters = list(module.parameters())
    return apply


@provider(OURS)
def ours(case: Case) -> Apply:
    folded = ops.fold(case.packed, case.layout, case.dtype)
    return lambda x, packed: ops.adapter(x, packed, case.layout, ACTIVATION, folded)


@provider(f"{OURS}, CUDA C++", _without_cuda_library)
def ours_in_cuda(case: Case) -> Apply:
    with backends.use_backend("cuda"):
        found = backends.explain("adapter_forward", case.x, b=case.b)
        if found.chosen is None:
            raise Unavailable(found.reasons["cuda"])
        apply = ours(case)

    def in_cuda(x: Tensor, packed: Tensor) -> Tensor:
        with backends.use_backend("cuda"):
            return apply(x, packed)

    return in_cuda


class Unavailable(RuntimeError):
    """The provider does not compute what is asked."""


class Wrong(Unavailable):
    """The provider's result is not that of float64."""


def make(name: str, case: Case, backward: bool) -> Callable[[], object]:
    """The checked call to time: a forward under no_grad, or a forward and a backward to x and the weights.

    Raises:
        Unavailable: the provider does not serve this case.
        Wrong: its result is off.
    """
    (call,) = calls(name, case, backward, 1)
    check(name, case, call())
    return call


def calls(name: str, case: Case, backward: bool, buffers: int) -> list[Callable[[], list[Tensor]]]:
    """Calls of a provider that do the same on buffers of their own; each returns out, and dx and the gradient of the
    weights after it. Nothing is checked yet, see :func:`check`.

    Raises:
        Unavailable: the provider does not serve this case.
    """
    apply = PROVIDERS[name].build(case)
    # Generated weights are float32 and cast at every call; a provider with parameters of its own has them in x's dtype.
    packed = case.packed.clone().requires_grad_(backward)
    weights = getattr(apply, "parameters", [packed])

    def on_buffers(x: Tensor, g: Tensor) -> Callable[[], list[Tensor]]:
        def forward_only() -> list[Tensor]:
            with torch.no_grad():
                return [apply(x, packed)]

        def forward_backward() -> list[Tensor]:
            out = apply(x, packed)
            return [out.detach(), *torch.autograd.grad(out, [x, *weights], g)]

        return forward_backward if backward else forward_only

    return [on_buffers(case.x.clone().requires_grad_(backward), case.g.clone()) for _ in range(buffers)]


def check(name: str, case: Case, results: list[Tensor]) -> float:
    """Compare what a call returned with float64; returns the largest relative error.

    Raises:
        Wrong: it is too large for rounding.
    """
    worst = 0.0
    for what, mine, truth in zip(("out", "dx", "dpacked"), results, case.truth):
        if mine.shape != truth.shape:
            if what == "dpacked":
                continue  # the gradients of a provider's own parameters are not compared
            raise Wrong(f"{name}: {what} is {list(mine.shape)}, expected {list(truth.shape)}")
        error = relative_error(mine, truth)
        if not error <= tolerance(case.dtype):
            raise Wrong(f"{name}: {what} is off by {error:.1e} relative to float64")
        worst = max(worst, error)
    return worst
