"""The list of all backends, in the order in which ``"auto"`` prefers them."""

from __future__ import annotations

from collections.abc import Callable

from . import selftest
from .base import Backend, BackendError
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

AUTO = "auto"

_backends: dict[str, Backend] = {
    backend.name: backend for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}
_OURS = frozenset(_backends)
_on_change: list[Callable[[], None]] = []


def register(backend: Backend, before: str = "reference") -> None:
    """Add a backend. From then on it can be asked for by name, and ``"auto"`` considers it.

    Args:
        backend: the backend. Its ``name`` must not be taken.
        before: the name of the backend before which it is placed in the ranked order. By default it is placed last but
            one, before the reference.

    Raises:
        TypeError: ``backend`` is not a :class:`Backend`.
        ValueError: its name is taken, or there is no backend ``before``.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be an instance of hyperformer_fast.backends.Backend, got {backend!r}")
    if backend.name in (AUTO, *_backends):
        raise ValueError(f"the name {backend.name!r} is taken: unregister that backend, or take another name")
    get(before)
    ranked = list(_backends.values())
    ranked.insert(list(_backends).index(before), backend)
    _replace(ranked)


def unregister(name: str) -> None:
    """Remove a backend that :func:`register` added. ValueError if there is no backend of that name, or if it comes with
    the library."""
    removed = get(name)
    if name in _OURS:
        raise ValueError(f"{name!r} comes with the library and cannot be unregistered")
    _replace([backend for backend in _backends.values() if backend is not removed])


def _replace(ranked: list[Backend]) -> None:
    _backends.clear()
    _backends.update({backend.name: backend for backend in ranked})
    for forget in _on_change:
        forget()


def on_change(forget: Callable[[], None]) -> None:
    """Call ``forget`` whenever a backend is registered or unregistered."""
    _on_change.append(forget)


def ranked() -> list[Backend]:
    """All backends, the one that ``"auto"`` prefers first."""
    return list(_backends.values())


def backend_names() -> list[str]:
    """All names by which a backend can be asked for, ``"auto"`` first."""
    return [AUTO, *_backends]


def known(name: str, source: str) -> str:
    """Return ``name`` if a backend can be asked for by it. Otherwise raise a ValueError whose message begins with
    ``source``."""
    if name not in backend_names():
        raise ValueError(f"{source}: backend must be one of {', '.join(backend_names())}, got {name!r}")
    return name


def get(name: str) -> Backend:
    """The backend of this name. ValueError if there is none."""
    if name not in _backends:
        raise ValueError(f"backend must be one of {', '.join(_backends)}, got {name!r}")
    return _backends[name]


def backend_report() -> list[dict[str, object]]:
    """Report on every backend.

    Returns:
        One dictionary per backend: its ``name``; whether it is ``available`` on this machine; the ops it ``serves``;
        the ``reason`` why it is not available, empty if it is; and ``wrong``, whether that reason is that its kernels
        failed their self-test.
    """
    report: list[dict[str, object]] = []
    for backend in ranked():
        support = backend.availability()
        report.append(
            {
                "name": backend.name,
                "available": bool(support),
                "serves": list(backend.serves),
                "reason": support.reason or "",
                "wrong": backend.wrong,
            }
        )
    return report


def live_check(name: str) -> dict[str, float]:
    """Run the self-test of a backend, which compares its ops on a small adapter with the reference in float64.

    Args:
        name: the backend's name.

    Returns:
        For each op that the backend serves, the largest absolute error divided by the largest absolute value of the
        float64 result.

    Raises:
        BackendError: the backend is not available.
        ValueError: there is no backend of that name.
    """
    backend = get(name)
    if not (available := backend.availability()):
        raise BackendError(f"backend {name!r} is not available: {available.reason}")
    return selftest.errors(backend)
