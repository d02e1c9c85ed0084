"""The choice of a backend: ``HYPERFORMER_FAST_BACKEND``, ``use_backend``, ``explain``."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
from collections.abc import Iterator

import torch

from . import self_test
from .base import OPS, Backend, BackendError, Request
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

ENVIRONMENT_VARIABLE = "HYPERFORMER_FAST_BACKEND"

#: In the order in which ``auto`` prefers them; a backend refuses what is not its device's.
_BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("hyperformer_fast_backend", default=None)


def backend_names() -> list[str]:
    """Every name that ``HYPERFORMER_FAST_BACKEND`` and :func:`use_backend` take."""
    return ["auto", *_BACKENDS]


def current_backend() -> str:
    """The choice in force: of the innermost :func:`use_backend`, else of the environment, else ``"auto"``."""
    return _forced.get() or _from_environment()


@functools.cache
def _from_environment() -> str:
    return _known(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def _known(name: str, source: str) -> str:
    if name not in backend_names():
        raise ValueError(f"{source}: backend must be one of {', '.join(backend_names())}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for all calls of this thread within the block; ``"auto"`` restores the choice by inputs.

    Raises:
        ValueError: no backend of that name. A call that the backend can't serve raises RuntimeError, with the cure.
    """
    token = _forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def select(request: Request) -> Backend:
    """The backend that serves ``request``. RuntimeError where an explicit choice can't."""
    return _select(current_backend(), request)


@functools.lru_cache(maxsize=4096)
def _select(choice: str, request: Request) -> Backend:
    if choice != "auto":
        reason = _refusal(_BACKENDS[choice], request)
        if reason is not None:
            raise BackendError(f"backend {choice!r} cannot serve {request.op}: {reason}")
        return _BACKENDS[choice]
    return next(backend for backend in _BACKENDS.values() if _refusal(backend, request, choice) is None)


def _refusal(backend: Backend, request: Request, choice: str = "") -> str | None:
    reason = backend.unavailable() or backend.refuses(request)
    return reason or (backend.passes(request) if choice == "auto" else None)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a request (None: the explicit choice can't), and why each other one does not."""

    request: Request
    choice: str
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        request, chosen = self.request, self.chosen or "none"
        lines = [f"{request.op} on {request.device}, {request.dtype}: {chosen} (asked for: {self.choice})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items()])


def explain(
    op: str = "adapter_forward",
    x: torch.Tensor | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    d: int = 768,
    b: int = 24,
) -> Explanation:
    """The backend that would serve ``op``, and the reason each other one was refused.

    Args:
        op: one of ``generate_weights``, ``fold``, ``adapter_forward``, ``adapter_backward``, ``hyper_adapter``.
        x: an input; stands for ``device``, ``dtype`` and ``d``.
        device, dtype, d, b: of the input, and the adapter's bottleneck.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if x is not None:
        device, dtype, d = x.device, x.dtype, x.shape[-1]
    request = Request(op, torch.device(device).type, dtype, d, b)
    choice = current_backend()
    refusals = {name: _refusal(backend, request, choice) for name, backend in _BACKENDS.items()}
    willing = [name for name, reason in refusals.items() if reason is None]
    chosen = (willing[0] if choice == "auto" else choice if choice in willing else None) if willing else None
    passed_over = f"{chosen} is preferred" if choice == "auto" else f"{choice} was asked for"
    reasons = {name: reason or passed_over for name, reason in refusals.items() if name != chosen}
    return Explanation(request, choice, chosen, reasons)


def backend_report() -> list[dict[str, object]]:
    """Every backend: its name, whether it is available here, the ops it serves, the reason where it is not, and whether
    that is that its kernels compute wrong numbers."""
    return [
        {
            "name": name,
            "available": backend.unavailable() is None,
            "serves": backend.serves,
            "reason": backend.unavailable() or "",
            "wrong": backend.wrong,
        }
        for name, backend in _BACKENDS.items()
    ]


def live_check(name: str) -> dict[str, float]:
    """Run the ops of backend ``name`` on a small adapter: the largest error relative to the float64 truth, per op.

    Raises:
        RuntimeError: the backend is not available.
    """
    backend = _BACKENDS[_known(name, "live_check")]
    if backend.unavailable() is not None:
        raise BackendError(f"backend {name!r} is not available: {backend.unavailable()}")
    return self_test.errors(backend)
