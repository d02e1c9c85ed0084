"""What `pytest benchmarks/` times: every op, and a training step, each by us and by its rivals.

One entry is one op at one shape and dtype. The short list has the shapes that matter; the full one has all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import mixed
import stack
import step
import torch
from providers import ACTIVATION, DTYPES, MODELS, OURS, Case, make, present
from timing import relative_error

from hyperformer_fast import ops
from hyperformer_fast.backends import use_backend
from hyperformer_fast.parameters import T5_SHAPES

EMBEDDING, TASKS, SITES = 64, 8, 24
FORWARD, BOTH = "forward", "forward and backward"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op at one shape and dtype.

    Args:
        make: the checked call of a provider, by its name.
        rivals: the providers besides ours.
        short: whether the short list has it.
    """

    op: str
    shape: str
    dtype: str
    make: Callable[[str], Callable[[], object]]
    rivals: tuple[str, ...]
    short: bool

    @property
    def providers(self) -> tuple[str, ...]:
        return (*self.rivals, OURS)


def suite(full: bool) -> list[Entry]:
    """The entries of the short list, or of the full one."""
    entries = itertools.chain(adapters(), batches(), single_ops(), stacks(), steps())
    return [entry for entry in entries if full or entry.short]


@functools.lru_cache(maxsize=1)
def case(N: int, d: int, b: int, dtype: torch.dtype) -> Case:
    """Shared by the providers of an entry, which follow one another."""
    return Case(N, d, b, dtype)


def adapters() -> Iterator[Entry]:
    """One adapter with given weights."""
    rivals = tuple(name for name in present() if name != OURS)
    shapes = itertools.product(MODELS.items(), (32, 16, 8), (1, 128, 1024, 4096, 16384), DTYPES.items(), (False, True))
    for (model, d), reduction, N, (dtype_name, dtype), backward in shapes:
        yield Entry(
            f"adapter, {BOTH if backward else FORWARD}", f"{model} r={reduction} N={N}", dtype_name,
            lambda name, c=(N, d, d // reduction, dtype), backward=backward: make(name, case(*c), backward),
            rivals, short=(model, reduction) == ("T5-base", 32) and N in (1024, 4096),
        )  # fmt: skip


def batches() -> Iterator[Entry]:
    """Eight tasks in one batch against a loop over the tasks in eager PyTorch, generation and fold counted."""
    B, L = 32, 128
    for (dtype_name, dtype), spread in itertools.product(DTYPES.items(), ("even", "uneven")):

        def call(name: str, dtype: torch.dtype = dtype, spread: str = spread) -> Callable[[], object]:
            leaves, index = mixed.Leaves(B, L, TASKS, dtype), mixed.batches(B, TASKS)[spread]
            calls = mixed.providers(leaves, index, generated=True)
            mixed.check(calls, leaves, index, generated=True)
            return calls["mixed" if name == OURS else "loop, eager"]

        op, shape = f"mixed batch, {BOTH}", f"T5-base r=32 B={B} L={L}, {TASKS} tasks, {spread}"
        yield Entry(op, shape, dtype_name, call, ("eager",), short=spread == "even")


def single_ops() -> Iterator[Entry]:
    """Generation, fold and the whole site, each by our kernels and in plain PyTorch."""
    for (model, d), n in itertools.product(MODELS.items(), (1, TASKS)):
        short = (model, n) == ("T5-base", 1)
        for op, build in (("generate_weights", generation), ("fold", fold)):
            shape = f"{model} r=32, {SITES} sites, {n} task{'s' * (n > 1)}"
            yield Entry(op, shape, "fp32", functools.partial(by_backend, build, d, n), ("eager",), short)
    for (model, d), N in itertools.product(MODELS.items(), (1, 8, 64, 1024)):
        call = functools.partial(by_backend, whole_site, d, N)
        shape = f"{model} r=32 N={N}, {TASKS} tasks"
        yield Entry("hyper_adapter", shape, "bf16", call, ("eager",), short=model == "T5-base" and N in (1, 1024))


Build = Callable[[int, int], tuple[Callable[[], torch.Tensor], float]]


def by_backend(build: Build, d: int, size: int, name: str) -> Callable[[], object]:
    """A call of ``build`` by our kernels or by the reference, which is plain PyTorch; checked against the latter."""
    call, tolerance = build(d, size)

    def run() -> torch.Tensor:
        with use_backend("auto" if name == OURS else "reference"), torch.no_grad():
            return call()

    with use_backend("reference"), torch.no_grad():
        truth = call()
    error = relative_error(run(), truth)
    if not error <= tolerance:
        raise RuntimeError(f"{name}: off by {error:.1e} relative to the reference")
    return run


def site(d: int) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """An adapter, the embeddings of all sites and tasks, and its generator."""
    made = case(1, d, d // 32, torch.float32)
    generator = torch.Generator().manual_seed(1)
    E = torch.randn(SITES * TASKS, EMBEDDING, generator=generator)
    return made, E, 0.01 * torch.randn(made.layout.numel, EMBEDDING, generator=generator)


def generation(d: int, tasks: int) -> tuple[Callable[[], torch.Tensor], float]:
    made, E, G = site(d)
    return lambda: ops.generate_weights(E[None, : SITES * tasks], G[None], made.packed), 1e-5


def fold(d: int, tasks: int) -> tuple[Callable[[], torch.Tensor], float]:
    made, E, G = site(d)
    packed = ops.generate_weights(E[None, : SITES * tasks], G[None], made.packed)[0]
    return lambda: ops.fold(packed, made.layout, torch.float32)[1], 1e-5


def whole_site(d: int, N: int) -> tuple[Callable[[], torch.Tensor], float]:
    made, E, G = site(d)
    x = torch.randn(N, d, generator=torch.Generator().manual_seed(2)).bfloat16()
    index = torch.arange(N) % TASKS
    return lambda: ops.hyper_adapter(x, E[:TASKS], G, made.packed[0], made.layout, ACTIVATION, index), 2e-2


@functools.lru_cache(maxsize=1)
def checked_stacks(size: str) -> list[stack.Stack]:
    both = stack.stacks(size)
    for each in both:
        each.difference()
    return both


def stacks() -> Iterator[Entry]:
    """Generation and folding for a whole T5 against the authors' calls, site by site."""
    for size, backward in itertools.product(T5_SHAPES, (False, True)):

        def call(name: str, size: str = size, backward: bool = backward) -> Callable[[], object]:
            return stack.providers(checked_stacks(size), backward)[stack.FOLD if name == OURS else stack.ORIGINAL]

        op = f"a T5's weights, {BOTH if backward else FORWARD}"
        yield Entry(op, f"{size}, one task", "fp32", call, ("the authors' code",), short=size == "T5-base")


def steps() -> Iterator[Entry]:
    """A training step, beside that of the bare T5: there is no faster one."""
    B, L = 8, 64
    for size, layers in (("T5-small", 2), ("T5-small", 6), ("T5-base", 4)):

        def call(name: str, size: str = size, layers: int = layers) -> Callable[[], object]:
            backend = {OURS: "auto", "eager": "reference", "the bare T5": step.BARE}[name]
            return step.step(size, layers, B, L, backend)

        shape = f"{size}, {layers}+{layers} layers, B={B} L={L}, {TASKS} tasks"
        yield Entry("training step", shape, "fp32", call, ("eager", "the bare T5"), short=layers == 2)
