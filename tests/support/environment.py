"""Environment variables of the tests that were renamed from ``HF_*``, Hugging Face's own prefix, to ``HFF_*``."""

from __future__ import annotations

import os
import warnings


def setting(name: str, otherwise: str = "") -> str:
    """The value of ``name``, an ``HFF_*`` variable. Its old ``HF_*`` name works for one release, and warns."""
    old = name.replace("HFF_", "HF_", 1)
    if name not in os.environ and old in os.environ:
        warnings.warn(f"{old} is now called {name}", DeprecationWarning, stacklevel=2)
        return os.environ[old]
    return os.environ.get(name, otherwise)
