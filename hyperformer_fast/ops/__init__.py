"""The ops, which generate the weights of many adapters, fold the norms into them, and apply them.

Letters: N rows, d width, b bottleneck, T tasks, P packed numbers per adapter, k embedding width, Q generators.
"""

from ..layout import AdapterLayout, AdapterSpec, Folded, Saved
from .public import adapter, fold, generate_weights, hyper_adapter
from .registered import SCHEMAS
from .stack import Stack

__all__ = [
    "SCHEMAS",
    "AdapterLayout",
    "AdapterSpec",
    "Folded",
    "Saved",
    "Stack",
    "adapter",
    "fold",
    "generate_weights",
    "hyper_adapter",
]
