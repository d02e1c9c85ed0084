"""The choice of a backend for one call. The first of these that says anything decides:

1. ``impl=`` at the call of an op;
2. :func:`use_backend`, in force in the calling thread;
3. ``HYPERFORMER_FAST_BACKEND_<OP>``, as ``HYPERFORMER_FAST_BACKEND_ADAPTER_FORWARD``;
4. ``HYPERFORMER_FAST_BACKEND``;
5. the ranked order: the first backend that supports the request and serves by default.

The name ``"auto"`` at any of the first four stands for the fifth. The environment is read once, at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import registry
from .base import OPS, Backend, BackendError, Request
from .registry import AUTO

ENVIRONMENT_VARIABLE = "HYPERFORMER_FAST_BACKEND"

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _OfThread(threading.local):
    name: str | None = None


_of_thread = _OfThread()


def _choose(name: str) -> None:
    if torch.compiler.is_compiling():
        # The ops of a graph choose a backend when they run, which is after the block: it would be silently ignored.
        torch._dynamo.graph_break(msg="use_backend in a compiled graph: use it outside, or pass impl= to the op")
    _of_thread.name = name


class use_backend:  # a class that is called like a function, as torch.set_grad_enabled is
    """Choose a backend for the calls of this thread: from now on, or, as ``with use_backend(...):``, within the block.
    It decorates a function, too.

    Other threads do not see the choice; HYPERFORMER_FAST_BACKEND is for the whole process.

    Args:
        name: as in :func:`backend_names`; ``"auto"``: the first that supports a call, whatever the environment says.

    Raises:
        ValueError: there is no backend of that name. A call that the backend cannot serve raises BackendError, with
            the cure.
    """

    def __init__(self, name: str):
        self._name = registry.known(name, "use_backend")
        self._before = [_of_thread.name]
        self._entered = False
        _choose(self._name)

    def __enter__(self) -> None:
        if self._entered:  # a second block with the same object
            self._before.append(_of_thread.name)
        self._entered = True
        _choose(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _of_thread.name = self._before.pop()

    def __call__(self, function: _Function) -> _Function:
        if self._before and not self._entered:  # as a decorator it chooses for the function alone
            _of_thread.name = self._before.pop()

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with use_backend(self._name):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]


def current_backend(op: str | None = None) -> str:
    """The name that is asked for where a call has no ``impl=``: in general, or for one op."""
    return _asked(op, None)[0]


def _asked(op: str | None, impl: str | None) -> tuple[str, str]:
    """The name asked for, and what asked."""
    if impl is not None:
        return registry.known(impl, "impl"), "impl="
    if _of_thread.name is not None:
        return _of_thread.name, "use_backend"
    chosen = environment()
    for variable in (variable_of(op), ENVIRONMENT_VARIABLE) if op else (ENVIRONMENT_VARIABLE,):
        if variable in chosen:
            return registry.known(chosen[variable], variable), variable
    return AUTO, "ranked order"


def variable_of(op: str) -> str:
    """The environment variable that chooses the backend of one op."""
    return f"{ENVIRONMENT_VARIABLE}_{op.upper()}"


@functools.cache
def environment() -> dict[str, str]:
    """The variables that choose a backend, and their values. ValueError for one that names no op."""
    found = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_VARIABLE) and value}
    of_ops = [variable_of(op) for op in OPS]
    for name in found:
        if name != ENVIRONMENT_VARIABLE and name not in of_ops:
            raise ValueError(f"{name} names no op: the variables of single ops are {', '.join(of_ops)}")
    return found


def select(request: Request, impl: str | None = None) -> Backend:
    """The backend that serves ``request``.

    Raises:
        BackendError: the one asked for cannot.
        ValueError: there is no backend of the name asked for.
    """
    return _select(_of_thread.name if impl is None else impl, *request)


def serving(op: str, device: str, dtype: torch.dtype, d: int = 0, b: int = 0, impl: str | None = None) -> Backend:
    """:func:`select` without a :class:`Request`: on the path of every eager call."""
    return _select(_of_thread.name if impl is None else impl, op, device, dtype, d, b)


@functools.lru_cache(maxsize=4096)
def _select(name: str | None, op: str, device: str, dtype: torch.dtype, d: int, b: int) -> Backend:
    request = Request(op, device, dtype, d, b)
    asked, source = _asked(op, None) if name is None else (registry.known(name, "impl"), "")
    if asked == AUTO:
        return next(backend for backend in registry.ranked() if _refusal(backend, request, asked) is None)
    backend = registry.get(asked)
    if reason := _refusal(backend, request, asked):
        by = f" ({source} asks for it)" if source else ""
        raise BackendError(f"backend {asked!r} cannot serve {op}: {reason}{by}")
    return backend


def _refusal(backend: Backend, request: Request, asked: str) -> str | None:
    """Why ``backend`` does not serve ``request`` where ``asked`` is asked for; None where it does."""
    if not (available := backend.availability()):
        return available.reason
    if request.op not in backend.serves:
        return f"it has kernels for {', '.join(backend.serves)} only; use backend 'auto' or 'reference'"
    if backend.device not in (None, request.device):
        return f"the inputs are on {request.device}, not on {backend.device}"
    if not (support := backend.supports(request)):
        return support.reason
    return backend.serves_by_default(request).reason if asked == AUTO else None


def forget() -> None:
    """Read the environment anew, and ask every backend again what it serves."""
    _select.cache_clear()
    environment.cache_clear()


registry.on_change(forget)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a request (None: the one asked for cannot), and why each other one does not."""

    request: Request
    choice: str  #: the name asked for
    chosen: str | None
    reasons: dict[str, str]
    source: str = "ranked order"  #: what asked: ``impl=``, ``use_backend``, an environment variable, or this

    def __str__(self) -> str:
        request, chosen = self.request, self.chosen or "none"
        asked = self.choice if self.source == "ranked order" else f"{self.choice}, by {self.source}"
        lines = [f"{request.op} on {request.device}, {request.dtype}: {chosen} (asked for: {asked})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items()])


def explain(
    op: str = "adapter_forward",
    x: Tensor | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    d: int = 768,
    b: int = 24,
    impl: str | None = None,
) -> Explanation:
    """The backend that would serve ``op``, where that choice comes from, and why each other one was refused.

    Args:
        op: ``generate_weights``, ``fold``, ``adapter_forward``, ``adapter_backward`` or ``hyper_adapter``.
        x: an input, which stands for ``device``, ``dtype`` and ``d``.
        device, dtype, d, b: of the input, and the adapter's bottleneck.
        impl: as at the call of an op.

    Raises:
        ValueError: an unknown op or backend.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if x is not None:
        device, dtype, d = x.device, x.dtype, x.shape[-1]
    request = Request(op, torch.device(device).type, dtype, d, b)
    asked, source = _asked(op, impl)
    refusals = {backend.name: _refusal(backend, request, asked) for backend in registry.ranked()}
    willing = [name for name, reason in refusals.items() if reason is None]
    chosen = (willing[0] if asked == AUTO else asked if asked in willing else None) if willing else None
    passed_over = f"{chosen} is preferred" if asked == AUTO else f"{asked} was asked for"
    reasons = {name: reason or passed_over for name, reason in refusals.items() if name != chosen}
    return Explanation(request, asked, chosen, reasons, source)
