"""The kernels as ``backends/triton.py`` calls them."""

from .adapter_backward import adapter_backward
from .adapter_forward import adapter_forward

__all__ = ["adapter_backward", "adapter_forward"]
