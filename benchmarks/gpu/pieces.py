"""The pieces between a T5's matrix products, each beside eager PyTorch, at the shapes of a T5-base's training step.

A pass' time is from a CUDA graph. What a replay of our pass wrote is compared with float64 under the same dropout mask,
and a pass that is wrong has no time. Eager PyTorch draws its own mask, and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import tolerance
from torch import Tensor

from hyperformer_fast import backends, graph_timing, ops, t5_reference
from hyperformer_fast.layout import NO_DROPOUT, Dropout

from .kernels import compare

P, EPS, SMOOTHING = 0.1, 1e-6, 0.1


class Shapes(NamedTuple):
    """The sizes of a step; the decoder, whose logits count, has a quarter of the tokens."""

    B: int = 32
    L: int = 128
    d: int = 768
    d_ff: int = 3072
    heads: int = 12
    vocabulary: int = 32128


TINY = Shapes(2, 16, 24, 40, 2, 50)

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Piece(NamedTuple):
    """One piece: what it is called with, and the three ways to compute it."""

    inputs: Sequence[Tensor]  #: those that get gradients
    ours: Function
    eager: Function
    exact: Function  #: in plain PyTorch, for inputs in float64


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' T5LayerNorm."""
    normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (normed.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else normed)


def pieces(shapes: Shapes, dtype: torch.dtype, device: str) -> dict[str, Piece]:
    """The pieces by name."""
    B, L, d, d_ff, heads, vocabulary = shapes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    dropout = Dropout(P, torch.tensor([12345], device=device), 0)
    weight = draw(d, dtype=torch.float32)
    bias, mask = draw(1, heads, L, L), torch.zeros(B, 1, 1, L, dtype=dtype, device=device)
    labels = torch.randint(vocabulary, (B * L // 4,), generator=generator).to(device)
    stream, a = (draw(B, L, d), draw(B, L, d), weight), draw(B, L, d_ff)
    return {
        "residual and norm": Piece(
            stream,
            lambda hidden, y, weight: ops.residual(hidden, y, dropout, weight, EPS),
            lambda hidden, y, weight: (out := hidden + F.dropout(y, P), eager_norm(out, weight)),
            lambda hidden, y, weight: t5_reference.residual(hidden, y, dropout, weight, EPS),
        ),
        "norm": Piece(
            stream[1:],
            lambda y, weight: ops.rms_norm(y, weight, EPS),
            eager_norm,
            lambda y, weight: t5_reference.rms_norm(y, weight, EPS),
        ),
        "relu and dropout": Piece(
            (a,),
            lambda a: ops.act_dropout(a, "relu", dropout=dropout),
            lambda a: F.dropout(F.relu(a), P),
            lambda a: t5_reference.act_dropout(a, None, "relu", dropout),
        ),
        "gated gelu and dropout": Piece(
            (a, draw(B, L, d_ff)),
            lambda a, c: ops.act_dropout(a, "gelu_new", c, dropout),
            lambda a, c: F.dropout(F.gelu(a, approximate="tanh") * c, P),
            lambda a, c: t5_reference.act_dropout(a, c, "gelu_new", dropout),
        ),
        "softmax and dropout": Piece(
            (draw(B, heads, L, L),),
            lambda scores: ops.softmax_dropout(scores, bias, mask, dropout),
            lambda scores: F.dropout(F.softmax((scores + (bias + mask)).float(), -1).to(dtype), P),
            lambda scores: t5_reference.softmax_dropout(scores, bias.double(), mask.double(), dropout)[0],
        ),
        "softmax": Piece(
            (draw(B, heads, L, L),),
            lambda scores: ops.softmax_dropout(scores, bias, mask),
            lambda scores: F.softmax((scores + (bias + mask)).float(), -1).to(dtype),
            lambda scores: t5_reference.softmax_dropout(scores, bias.double(), mask.double(), NO_DROPOUT)[0],
        ),
        "cross-entropy": Piece(
            (draw(len(labels), vocabulary),),
            lambda logits: ops.cross_entropy_rows(logits, labels, SMOOTHING),
            lambda logits: F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING, reduction="none"),
            lambda logits: t5_reference.cross_entropy(logits, labels, SMOOTHING, -100),
        ),
    }


def passes(function: Function, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Callable]:
    """A forward without autograd, and a forward with its backward; both return lists."""
    leaves = [t.clone().requires_grad_() for t in inputs]

    def outputs() -> list[Tensor]:
        found = function(*leaves)
        return [found] if isinstance(found, Tensor) else list(found)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return outputs()

    def both() -> list[Tensor]:
        found = outputs()
        return [*(t.detach() for t in found), *torch.autograd.grad(found, leaves, gradients)]

    return {"forward": forward, "both": both}


def gradients_of(piece: Piece) -> list[Tensor]:
    """A gradient for each output."""
    with torch.no_grad():
        outputs = piece.ours(*piece.inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [torch.ones_like(t) if t.dim() == 1 else torch.randn_like(t) for t in outputs]


def timed(name: str, piece: Piece, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One entry: the times of a piece, by us and by eager PyTorch."""
    gradients = gradients_of(piece)
    wide = [t.double() for t in piece.inputs]
    truth = passes(piece.exact, wide, [g.double() for g in gradients])["both"]()
    names = [f"output {i}" for i in range(len(gradients))] + [f"gradient {i}" for i in range(len(wide))]
    count = graph_timing.buffers(max(t.nbytes for t in piece.inputs), device)
    times: dict[str, dict[str, float]] = {"seconds": {}, "eager_seconds": {}}
    wrong: dict[str, str] = {}
    for kind, function in (("seconds", piece.ours), ("eager_seconds", piece.eager)):
        copies = [passes(function, piece.inputs, gradients) for _ in range(count)]
        for what in ("forward", "both"):
            recorded = graph_timing.record([each[what] for each in copies], device)
            times[kind][what] = graph_timing.median_seconds(recorded, rounds)
            if kind == "seconds":
                wrong |= compare(f"{name}, {what}", names, recorded.results[-1], truth, tolerance(dtype))
    entry = {"kind": "piece", "piece": name, "dtype": str(dtype).removeprefix("torch.")}
    if wrong:
        return {"line": f"{name}: wrong", **entry, "wrong": wrong}
    shown = "; ".join(
        f"{what} {1e6 * times['seconds'][what]:.1f} us, eager {1e6 * times['eager_seconds'][what]:.1f} us"
        for what in ("forward", "both")
    )
    return {"line": f"{name}, {entry['dtype']}: {shown}", **entry, **times}


def entries(options: SimpleNamespace) -> Iterator[dict]:
    """Every piece in bfloat16; a dry run has small ones in float32."""
    device, rounds = options.device, 1 if options.dry_run else 9
    backend = "cpu" if options.dry_run else options.backend
    support = backends.registry.get(backend).availability()
    if not support:
        yield {"line": f"{backend} is not available: {support.reason}", "absent": {backend: support.reason}}
        return
    shapes, dtype = (TINY, torch.float32) if options.dry_run else (Shapes(), torch.bfloat16)
    with backends.use_backend(backend):
        for name, piece in pieces(shapes, dtype, device).items():
            yield {"backend": backend, **timed(name, piece, dtype, device, rounds)}
