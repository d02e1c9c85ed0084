"""Which kernels serve a call, and why."""

from .select import (
    Explanation,
    Request,
    backend_names,
    backend_report,
    current_backend,
    explain,
    live_check,
    select,
    use_backend,
)

__all__ = [
    "Explanation",
    "Request",
    "backend_names",
    "backend_report",
    "current_backend",
    "explain",
    "live_check",
    "select",
    "use_backend",
]
