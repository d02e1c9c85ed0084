"""What the traffic counts of both GPU backends share: the shapes, and a table's row."""

from __future__ import annotations

from device import H100, Work

#: (d, b) with the published reduction factor of 32.
SHAPES = {"T5-small": (512, 16), "T5-base": (768, 24), "T5-large": (1024, 32)}
MEASURED = "measured us"  #: empty until a GPU has run it
PREDICTED = "predicted us"


def row(model: str, kernel: str, of: str, work: Work) -> dict[str, object]:
    """One launch: what it asks for, and the time that an H100 should take for it."""
    return {
        "model": model, "kernel": kernel, "of": of, "blocks": work.blocks,
        "MB, each tensor once": f"{work.once / 1e6:.1f}", "MB asked for": f"{work.asked / 1e6:.1f}",
        PREDICTED: H100.prediction(work), MEASURED: "",
    }  # fmt: skip
