"""Backends: the sets of kernels that serve the ops, and the choice among them."""

from .base import Backend, BackendError, Request, Support
from .choice import Explanation, current_backend, explain, select, serving, serving_piece, use_backend
from .registry import backend_names, backend_report, live_check, register, unregister

__all__ = [
    "Backend",
    "BackendError",
    "Explanation",
    "Request",
    "Support",
    "backend_names",
    "backend_report",
    "current_backend",
    "explain",
    "live_check",
    "register",
    "select",
    "serving",
    "serving_piece",
    "unregister",
    "use_backend",
]
