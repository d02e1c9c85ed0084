"""The host functions of all kernels; ``backends/triton.py`` imports them from here."""

from .act_dropout import act_dropout_backward, act_dropout_forward
from .adapter_backward import adapter_backward
from .adapter_forward import adapter_forward
from .cross_entropy import cross_entropy_forward
from .fold import fold
from .generate import generate_weights
from .residual import residual_backward, residual_forward
from .softmax_dropout import softmax_dropout_backward, softmax_dropout_forward
from .stack import TritonStack

__all__ = [
    "TritonStack",
    "act_dropout_backward",
    "act_dropout_forward",
    "adapter_backward",
    "adapter_forward",
    "cross_entropy_forward",
    "fold",
    "generate_weights",
    "residual_backward",
    "residual_forward",
    "softmax_dropout_backward",
    "softmax_dropout_forward",
]
