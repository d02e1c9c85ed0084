"""The groups of the step profile: what is timed, and how its share of the time is."""

from __future__ import annotations

import dataclasses
import itertools

from step_models import BARE, ORIGINAL

TRAINING, FORWARD, GENERATE = "training", "forward", "generate"
FUSED, UNFUSED, REFERENCE, BARE_FUSED = "fused", "unfused", "reference", "bare, fused"
#: All but the float32 products of oneDNN, which are fused where PyTorch's own take no wider instructions than AVX2.
BETWEEN = "fused, without products"
COMPILED = ", compiled"

#: The backend and ``fuse`` of each row.
ROWS = {
    BARE: (BARE, False),
    BARE_FUSED: (BARE, True),
    ORIGINAL: (ORIGINAL, False),
    REFERENCE: (REFERENCE, False),
    UNFUSED: ("auto", False),
    BETWEEN: ("auto", ("norm", "dropout", "feed_forward", "attention", "cache")),
    FUSED: ("auto", "auto"),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SHARED, PER_BLOCK = "hyperformer++", "hyperformer"
#: Blocks of a stack, and samples of a training step or forward.
LAYERS, SAMPLES = {"T5-small": 6, "T5-base": 12}, {"T5-small": 16, "T5-base": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """One group.

    Args:
        action: a training step, a forward without gradients, or greedy decoding.
        dropout: the T5's, in training.
        compiled: each row once more under ``torch.compile``.
        layers, B, L: blocks of a stack, samples, tokens of the input.
        targets: tokens of the labels, or tokens to decode.
        rows: those that are timed, beside the bare T5 (default: all that there are).
        share: of the time that a run has.
    """

    size: str
    dtype: str
    action: str
    variant: str
    dropout: float
    compiled: bool
    layers: int
    B: int
    L: int
    targets: int
    vocabulary: int = 32128
    rows: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def name(self) -> str:
        how = {TRAINING: f"dropout={self.dropout:g}", FORWARD: "", GENERATE: f"B={self.B}"}[self.action]
        words = (self.size, self.dtype, self.action, how, self.variant, "compiled" if self.compiled else "")
        return " ".join(filter(None, words))

    @property
    def all_rows(self) -> tuple[str, ...]:
        """The names of the rows, the bare T5 first."""
        # the authors' calls are restated for one variant
        rows = self.rows or tuple(row for row in ROWS if row != ORIGINAL or self.variant == SHARED)
        return (BARE, *(row + COMPILED for row in rows)) if self.compiled else tuple(dict.fromkeys((BARE, *rows)))

    def tiny(self) -> Case:
        """The same with one block and a short batch."""
        small = {"size": "T5-small", "layers": 1, "B": min(2, self.B), "L": 8, "targets": 4, "vocabulary": 1000}
        return dataclasses.replace(self, **small)


def _cases() -> list[Case]:
    found = []
    actions = [(TRAINING, 0.1, None), (TRAINING, 0.0, None), (FORWARD, 0.0, None)]
    actions += [(GENERATE, 0.0, B) for B in (1, 8, 64)]
    for (size, layers), dtype, variant, (action, dropout, B), compiled in itertools.product(
        LAYERS.items(), DTYPES, (SHARED, PER_BLOCK), actions, (False, True)
    ):
        if not (compiled and action == GENERATE):
            L, targets = (32, 32) if action == GENERATE else (128, 8)
            B = B or SAMPLES[size]
            found.append(Case(size, dtype, action, variant, dropout, compiled, layers, B, L, targets))
    return found


CASES = {case.name: case for case in _cases()}

#: What is measured by default: a share of the time, and the rows where not all are timed.
_NO_SLOW = (BARE_FUSED, UNFUSED, FUSED)
_FLOAT32 = (BARE_FUSED, UNFUSED, BETWEEN, FUSED)
_DEFAULT: dict[str, tuple[float, tuple[str, ...]]] = {
    f"T5-small fp32 training dropout=0.1 {SHARED}": (2.0, ()),
    f"T5-small bf16 training dropout=0.1 {SHARED}": (2.0, (*_NO_SLOW, ORIGINAL)),
    f"T5-small fp32 training dropout=0 {SHARED}": (1.0, _FLOAT32),
    f"T5-small fp32 forward {SHARED}": (1.0, _FLOAT32),
    f"T5-small fp32 generate B=1 {SHARED}": (0.7, (*_FLOAT32, ORIGINAL)),
    f"T5-small fp32 generate B=8 {SHARED}": (0.7, _FLOAT32),
    f"T5-base fp32 training dropout=0.1 {SHARED}": (2.5, (*_FLOAT32, ORIGINAL)),
    f"T5-base bf16 training dropout=0.1 {SHARED}": (2.0, _NO_SLOW),
    f"T5-small fp32 training dropout=0.1 {PER_BLOCK}": (1.0, _FLOAT32),
    f"T5-base bf16 training dropout=0.1 {PER_BLOCK}": (1.5, _NO_SLOW),
    f"T5-small bf16 training dropout=0 {SHARED}": (1.0, _NO_SLOW),
    f"T5-small bf16 forward {SHARED}": (0.5, _NO_SLOW),
    f"T5-small fp32 generate B=64 {SHARED}": (0.7, _FLOAT32),
    f"T5-small fp32 training dropout=0.1 {SHARED} compiled": (2.0, (BARE, FUSED)),
}


def default_cases() -> dict[str, Case]:
    """What is measured where nothing is asked for, the most important first."""
    return {name: dataclasses.replace(CASES[name], share=share, rows=rows) for name, (share, rows) in _DEFAULT.items()}
