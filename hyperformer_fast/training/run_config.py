"""RunConfig, which were the arguments of a run in version 0.1."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arguments import RunArguments
from .config_file import read_fields
from .translate import today


class RunConfig:
    """Deprecated: use :class:`RunArguments`, which this returns for the fields of version 0.1 with their defaults."""

    def __new__(cls, **fields: Any) -> RunArguments:  # type: ignore[misc]
        return _todays(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunArguments:
        """Return the RunArguments that ``fields`` mean."""
        return _todays(fields)

    @classmethod
    def load(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> RunArguments:
        """Return the RunArguments that the fields of a file mean, overridden by ``changes``."""
        return _todays({**read_fields(path), **(changes or {})})


def _todays(fields: Mapping[str, Any]) -> RunArguments:
    warnings.warn("RunConfig is now RunArguments, which has Hugging Face's names", DeprecationWarning, stacklevel=3)
    named = fields.get("model") is not None
    return RunArguments.from_dict(today({"steps": 2000 if named else 1200, **fields}, whole=True, quiet=True))
