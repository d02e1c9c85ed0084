"""One part of the report, in its own process: ``python -m gpu.child PART OPTIONS``, with the options as JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from . import children, planted
from .plan import PARTS


def entries_of(name: str) -> Callable[[SimpleNamespace], Iterator[dict]]:
    """The generator of a part's entries."""
    module, function = PARTS[name].function.split(":")
    return getattr(importlib.import_module(f"gpu.{module}"), function)


def main() -> None:
    name, options = sys.argv[1], SimpleNamespace(**json.loads(sys.argv[2]))
    children.die_with_the_parent()
    write = children.writer()
    options.end = time.monotonic() + options.limit
    if options.plant:
        planted.plant(options.plant, write)
    if not options.device.startswith("cuda"):
        for entry in entries_of(name)(options):
            write(entry)
        return
    from .compilation import counted

    with counted() as counts:
        try:
            for entry in entries_of(name)(options):
                write(entry)
        finally:
            write({"compiled": counts})


if __name__ == "__main__":
    main()
