"""The choice of a backend for one call. The first of these that is set decides:

1. ``impl=`` at the call of an op;
2. :func:`use_backend` in the calling thread;
3. the environment variable ``HYPERFORMER_FAST_BACKEND_<OP>``, for example
   ``HYPERFORMER_FAST_BACKEND_ADAPTER_FORWARD``;
4. the environment variable ``HYPERFORMER_FAST_BACKEND``;
5. the ranked order: the first backend that supports the request and serves by default.

The name ``"auto"`` at any of the first four means the fifth. The environment is read once, at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import registry
from .base import OPS, Backend, BackendError, Request
from .pieces import PIECE_OPS
from .registry import AUTO

ENVIRONMENT_VARIABLE = "HYPERFORMER_FAST_BACKEND"

_Function = TypeVar("_Function", bound=Callable[..., Any])


#: The name under which a thread's choice is kept. torch hands what is kept there on to the threads on which autograd
#: runs a backward for a GPU, with its recomputation of checkpoints, for which threading.local would be empty.
_OF_THREAD = "hyperformer_fast.use_backend"


def chosen() -> str | None:
    """The backend that this thread, or the one whose backward it runs, chose by :class:`use_backend`."""
    kept: str | None = torch._C._get_obj_in_tls(_OF_THREAD) if torch._C._is_key_in_tls(_OF_THREAD) else None
    return kept


def _set_of_thread(name: str | None) -> None:
    torch._C._stash_obj_in_tls(_OF_THREAD, name)


def _expect_no_graph() -> None:
    if torch.compiler.is_compiling():
        # The ops of a compiled graph choose a backend when they run. That is after the block, which would silently have
        # no effect.
        torch._dynamo.graph_break(msg="use_backend in a compiled graph: use it outside, or pass impl= to the op")


class use_backend:  # lower case, because it is called like a function, as is torch.set_grad_enabled
    """Choose the backend for all later calls in this thread, and in the backward passes that it starts.

    ``with use_backend(...):`` restores the previous choice after the block, and ``@use_backend(...)`` makes the choice
    for a function. Other threads are not affected; to choose for the whole process, set HYPERFORMER_FAST_BACKEND. A
    call that the chosen backend cannot serve raises BackendError.

    Args:
        name: a name from :func:`backend_names`. ``"auto"`` chooses the first backend that supports a call, whatever the
            environment says.

    Raises:
        ValueError: there is no backend of that name.
    """

    def __init__(self, name: str):
        self._name = registry.known(name, "use_backend")
        _expect_no_graph()
        self._before = [chosen()]
        self._entered = False
        _set_of_thread(self._name)

    def __enter__(self) -> None:
        _expect_no_graph()
        if self._entered:  # the same object is used for a further block
            self._before.append(chosen())
        self._entered = True
        _set_of_thread(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set_of_thread(self._before.pop())

    def __call__(self, function: _Function) -> _Function:
        if self._before and not self._entered:  # used as a decorator: the choice is for the function alone
            _set_of_thread(self._before.pop())

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with use_backend(self._name):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]


def current_backend(op: str | None = None) -> str:
    """The name of the backend that a call without ``impl=`` asks for.

    Args:
        op: the op that is called. None asks about ops in general, and leaves out the environment variables of single
            ops.
    """
    return _asked(op, None)[0]


def _asked(op: str | None, impl: str | None) -> tuple[str, str]:
    """Return the name of the backend that is asked for, and what asks for it."""
    if impl is not None:
        return registry.known(impl, "impl"), "impl="
    if (name := chosen()) is not None:
        return name, "use_backend"
    variables = environment()
    for variable in (variable_of(op), ENVIRONMENT_VARIABLE) if op else (ENVIRONMENT_VARIABLE,):
        if variable in variables:
            return registry.known(variables[variable], variable), variable
    return AUTO, "ranked order"


def variable_of(op: str) -> str:
    """The environment variable that chooses the backend of one op."""
    return f"{ENVIRONMENT_VARIABLE}_{op.upper()}"


@functools.cache
def environment() -> dict[str, str]:
    """Read the variables that choose a backend, with their values. ValueError if a variable's name has no known op."""
    found = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_VARIABLE) and value}
    of_ops = [variable_of(op) for op in OPS]
    for name in found:
        if name != ENVIRONMENT_VARIABLE and name not in of_ops:
            raise ValueError(f"{name} names no op: unset it, or use one of {', '.join(of_ops)}")
    return found


def select(request: Request, impl: str | None = None) -> Backend:
    """Choose the backend that serves ``request``.

    Raises:
        BackendError: the backend that is asked for by name cannot serve the request.
        ValueError: no backend has the name that is asked for.
    """
    return _select(chosen() if impl is None else impl, *request)


def serving(op: str, device: str, dtype: torch.dtype, d: int = 0, b: int = 0, impl: str | None = None) -> Backend:
    """:func:`select` without making a :class:`Request`, because every eager call comes through here."""
    return _select(chosen() if impl is None else impl, op, device, dtype, d, b)


def serving_piece(op: str, device: torch.device, dtype: torch.dtype, impl: str | None = None) -> Backend:
    """:func:`serving` for a piece of a T5 (``pieces.PIECE_OPS``).

    A backend may have no kernels for these. One that was chosen for all ops (:class:`use_backend`, or the environment
    variable without an op's name) then leaves them to the ranked order; asked for by ``impl`` or the op's variable, it
    raises BackendError.
    """
    return _select_piece(impl, None if impl is not None else chosen(), op, device, dtype)


@functools.lru_cache(maxsize=4096)
def _select_piece(
    impl: str | None, of_thread: str | None, op: str, device: torch.device, dtype: torch.dtype
) -> Backend:
    asked, source = _asked(op, impl) if impl is not None or of_thread is None else (of_thread, "use_backend")
    if _left_to_others(op, asked, source):
        asked = AUTO
    return _select(asked, op, device.type, dtype, 0, 0)


def _left_to_others(op: str, asked: str, source: str) -> bool:
    """Whether ``op`` is a piece for which the backend that was chosen for all ops has no kernels."""
    general = source in ("use_backend", ENVIRONMENT_VARIABLE)
    return general and op in PIECE_OPS and asked != AUTO and op not in registry.get(asked).serves


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
    """Return why ``backend`` does not serve ``request`` if the backend ``asked`` is asked for, or None if it does."""
    if not (available := backend.availability()):
        return available.reason
    if request.op not in backend.serves:
        return f"it has kernels for {', '.join(backend.serves)} only; use backend 'auto' or 'reference'"
    if backend.device not in (None, request.device):
        return f"the inputs are on {request.device}, not on {backend.device}: move them, or use backend 'auto'"
    if not (support := backend.supports(request)):
        return support.reason
    return backend.serves_by_default(request).reason if asked == AUTO else None


#: Counts how often :func:`forget` was called, for those who keep what a backend has made.
epoch = 0


def forget() -> None:
    """Clear the caches: the next call reads the environment and asks the backends what they support again."""
    global epoch
    epoch += 1
    _select.cache_clear()
    _select_piece.cache_clear()
    environment.cache_clear()


registry.on_change(forget)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend serves a request, and why the others do not."""

    request: Request
    choice: str  #: the name that is asked for
    chosen: str | None  #: the backend that serves; None if the one that is asked for cannot
    reasons: dict[str, str]  #: why each of the other backends does not serve
    source: str = "ranked order"  #: what asks: ``impl=``, ``use_backend``, an environment variable, or ``ranked order``

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
    """Explain which backend would serve ``op``, what that choice comes from, and why the other backends do not serve.

    Args:
        op: a name of ``backends.base.OPS``, such as ``adapter_forward``.
        x: an input; its device, dtype and width replace ``device``, ``dtype`` and ``d``.
        device: the device of the input.
        dtype: the dtype of the input.
        d: the width of the input.
        b: the adapter's bottleneck.
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
    if _left_to_others(op, asked, source):
        asked, source = AUTO, f"{source}={asked}, which has no kernels for it"
    refusals = {backend.name: _refusal(backend, request, asked) for backend in registry.ranked()}
    willing = [name for name, reason in refusals.items() if reason is None]
    chosen = (willing[0] if asked == AUTO else asked if asked in willing else None) if willing else None
    passed_over = f"{chosen} is preferred" if asked == AUTO else f"{asked} was asked for"
    reasons = {name: reason or passed_over for name, reason in refusals.items() if name != chosen}
    return Explanation(request, asked, chosen, reasons, source)
