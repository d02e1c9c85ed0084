"""Fused forwards for what stands between the matrix products of a T5: exact, optional and reversible."""

from __future__ import annotations

from .explain import FusionReport, ModuleReport, explain_fusion, pieces_of
from .install import fuse_t5, unfuse_t5
from .pieces import AUTO_PIECES, PIECES, Fuse, resolve

__all__ = [
    "AUTO_PIECES",
    "PIECES",
    "Fuse",
    "FusionReport",
    "ModuleReport",
    "explain_fusion",
    "fuse_t5",
    "pieces_of",
    "resolve",
    "unfuse_t5",
]
