"""Multi-task fine-tuning with HyperFormer (arXiv 2106.04489): generated adapters in a frozen T5, fused."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import native

if TYPE_CHECKING:
    # For type checkers and editors; at run time __getattr__ imports the same names when they are first used.
    from . import backends, official, ops, reference
    from .adapter import FusedHyperAdapter
    from .backends import explain, use_backend
    from .config import HyperFormerConfig
    from .data.registry import register_task
    from .fusion import explain_fusion, fuse_t5, unfuse_t5
    from .layout import AdapterLayout
    from .learning_rates import parameter_groups
    from .model import HyperFormerModel, get_hyperformer_model
    from .task_fitting import fit_task, nearest_task
    from .task_gradients import TaskGradients

__version__ = "0.1.0"

native.warn_once()

#: Public name -> the module that defines it.
_PUBLIC = {
    "AdapterLayout": "layout",
    "FusedHyperAdapter": "adapter",
    "HyperFormerConfig": "config",
    "HyperFormerModel": "model",
    "TaskGradients": "task_gradients",
    "explain": "backends",
    "explain_fusion": "fusion",
    "fit_task": "task_fitting",
    "fuse_t5": "fusion",
    "get_hyperformer_model": "model",
    "nearest_task": "task_fitting",
    "parameter_groups": "learning_rates",
    "register_task": "data.registry",
    "unfuse_t5": "fusion",
    "use_backend": "backends",
}
_MODULES = ("backends", "official", "ops", "reference")

__all__ = [
    "AdapterLayout",
    "FusedHyperAdapter",
    "HyperFormerConfig",
    "HyperFormerModel",
    "TaskGradients",
    "backends",
    "explain",
    "explain_fusion",
    "fit_task",
    "fuse_t5",
    "get_hyperformer_model",
    "nearest_task",
    "official",
    "ops",
    "parameter_groups",
    "reference",
    "register_task",
    "unfuse_t5",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command's help and the doctor do not wait for transformers.
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
