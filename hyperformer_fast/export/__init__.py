"""Models for programs without this library: one task as a plain T5, or all tasks as graphs."""

from __future__ import annotations

from .artifact import export_model
from .materialize import MaterializedTask

__all__ = ["MaterializedTask", "export_model"]
