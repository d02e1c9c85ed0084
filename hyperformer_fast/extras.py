"""Check for the optional packages that only parts of the library need."""

from __future__ import annotations

import importlib.util
import sys

#: Import name -> name to install, for packages whose names differ.
_DISTRIBUTIONS = {"rouge_score": "rouge-score", "sklearn": "scikit-learn", "yaml": "pyyaml"}


class MissingPackage(ImportError):
    """An optional package is not installed; the message names it, what needs it and how to install it."""


def require(what: str, *modules: str, extra: str = "train") -> None:
    """Raise :class:`MissingPackage` unless every module can be imported.

    Args:
        what: what needs them, as the subject of a sentence ("training").
        modules: import names of packages that the extra installs.
        extra: the name of the extra.
    """
    missing = [_DISTRIBUTIONS.get(module, module) for module in modules if not _importable(module)]
    if missing:
        names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
        verb = "are" if len(missing) > 1 else "is"
        raise MissingPackage(
            f"{what} needs {names}, which {verb} not installed: pip install 'hyperformer-fast[{extra}]'",
            name=missing[0],
        )


def _importable(module: str) -> bool:
    # find_spec raises ValueError for a loaded module without a spec, such as one that a program made itself.
    return sys.modules.get(module) is not None or importlib.util.find_spec(module) is not None
