"""The host functions of all kernels; ``backends/triton.py`` imports them from here."""

from .adapter_backward import adapter_backward
from .adapter_forward import adapter_forward
from .fold import fold
from .generate import generate_weights
from .stack import TritonStack

__all__ = ["TritonStack", "adapter_backward", "adapter_forward", "fold", "generate_weights"]
