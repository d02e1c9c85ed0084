"""The ops, which generate the weights of many adapters, fold the norms into them, and apply them; and the pieces of a
T5 between its matrix products.

Letters: N rows, d width, b bottleneck, T tasks, P packed numbers per adapter, k embedding width, Q generators.
"""

from ..layout import NO_DROPOUT, AdapterLayout, AdapterSpec, Dropout, Folded, Saved
from . import attention_registered  # noqa: F401  # the import registers its ops
from .attention_public import attention, cross_entropy_rows, softmax_dropout
from .head_loss import linear_cross_entropy
from .op import SCHEMAS
from .pieces import act_dropout, adapter_residual, residual, rms_norm
from .prepared_stack import PreparedStack
from .products import linear
from .public import adapter, fold, generate_weights, hyper_adapter, independent_rows
from .stack import Stack

__all__ = [
    "NO_DROPOUT",
    "SCHEMAS",
    "AdapterLayout",
    "AdapterSpec",
    "Dropout",
    "Folded",
    "PreparedStack",
    "Saved",
    "Stack",
    "act_dropout",
    "adapter",
    "adapter_residual",
    "attention",
    "cross_entropy_rows",
    "fold",
    "generate_weights",
    "hyper_adapter",
    "independent_rows",
    "linear",
    "linear_cross_entropy",
    "residual",
    "rms_norm",
    "softmax_dropout",
]
