"""The launches of the pieces between a T5's matrix products, for the compile report and the traffic counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton_launches import Launch, caught_launches

from hyperformer_fast.kernels import entry
from hyperformer_fast.layout import NO_DROPOUT, Dropout


class Sizes(NamedTuple):
    """What the pieces depend on of a T5. v1.1 models have gated feed-forward layers."""

    d: int
    d_ff: int
    heads: int
    gated: bool = False


SIZES = {
    "small": Sizes(512, 2048, 8),
    "base": Sizes(768, 3072, 12),
    "v1.1-base": Sizes(768, 2048, 12, gated=True),
    "v1.1-xxl": Sizes(4096, 10240, 64, gated=True),
}
KERNELS = (
    "residual", "residual_backward", "sum_parts", "act_dropout", "act_dropout_backward", "softmax_dropout",
    "softmax_dropout_backward", "cross_entropy",
)  # fmt: skip
VOCABULARY = 32128
P = 0.1


def calls(sizes: Sizes, dtype: torch.dtype, B: int, L: int, rows: int, keys: int | None = None) -> dict[str, list]:
    """Calls of the host functions as a training step makes them, each by the words for its variant.

    Args:
        dtype: of the stream.
        B, L: samples, and tokens of each.
        rows: of the logits.
        keys: what the tokens attend to; by default each other.
    """
    keys, dropout = keys or L, Dropout(P, torch.tensor([1]), 0)
    x, weight = torch.ones(B, L, sizes.d, dtype=dtype), torch.ones(sizes.d)
    a, c = torch.ones(B, L, sizes.d_ff, dtype=dtype), None
    if sizes.gated:
        c = torch.ones_like(a)
    normed, rstd = torch.ones_like(x, dtype=torch.float32), torch.ones(B, L)
    scores = torch.ones(B, sizes.heads, L, keys, dtype=dtype)
    bias, mask = torch.ones(1, sizes.heads, L, keys, dtype=dtype), torch.ones(B, 1, 1, keys, dtype=dtype)
    logits, labels = torch.ones(rows, VOCABULARY, dtype=dtype), torch.ones(rows, dtype=torch.int64)
    act = "gelu_new" if sizes.gated else "relu"
    # other tensors of the same shapes, made once, so that a call that is repeated has the same addresses
    y, g, probabilities = x.clone(), a.clone(), scores.clone()
    return {
        "sum and norm": lambda: entry.residual_forward(x, y, dropout, weight, 1e-6, True),
        "sum": lambda: entry.residual_forward(x, y, dropout, None, 1e-6, True),
        "norm": lambda: entry.residual_forward(None, x, NO_DROPOUT, weight, 1e-6, True),
        "sum and norm, backward": lambda: entry.residual_backward(
            x, normed, y, weight, rstd, dropout, True, True
        ),
        "sum, backward": lambda: entry.residual_backward(x, None, None, None, None, dropout, True, False),
        "norm, backward": lambda: entry.residual_backward(None, normed, x, weight, rstd, NO_DROPOUT, False, True),
        act: lambda: entry.act_dropout_forward(a, c, act, dropout),
        f"{act}, backward": lambda: entry.act_dropout_backward(g, a, c, act, dropout),
        f"{keys} keys": lambda: entry.softmax_dropout_forward(scores, bias, mask, dropout, True),
        f"{keys} keys, backward": lambda: entry.softmax_dropout_backward(scores, probabilities, dropout),
        "smoothed": lambda: entry.cross_entropy_forward(logits, labels, 0.1, -100, True),
    }  # fmt: skip


def launches_of(sizes: Sizes, dtype: torch.dtype, arch: int, B: int = 2, L: int = 128) -> list[tuple[str, Launch]]:
    """The launches of :func:`calls` for a GPU of ``arch``, each with its variant."""
    found = []
    for variant, call in calls(sizes, dtype, B, L, rows=2).items():
        with caught_launches(arch) as launches:
            call()
        found += [(variant, launch) for launch in launches]
    return found
