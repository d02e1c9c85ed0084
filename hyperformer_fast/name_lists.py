"""A flag that takes a list of names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Names(argparse.Action):
    """Accepts both ``--tasks a b --tasks c`` and ``--tasks a,b,c``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        names = [name.strip() for value in values or () for name in value.split(",")]
        if not all(names):
            parser.error(f"argument {option_string}: an empty name in {' '.join(values or ())!r}")
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *names])
