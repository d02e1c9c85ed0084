"""Failures planted in a part, to see that the report survives them: ``gpu_report.py --plant PART=KIND``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

KINDS = ("abort", "segfault", "hang", "missing", "wrong")


def plant(kind: str, write: Callable[[dict], None]) -> None:
    """Make this process fail as ``kind`` says, some kinds after a first entry.

    abort, segfault   it dies as after an illegal access
    hang              it never ends, and neither does a process that it started
    missing           the compiled libraries are not there
    wrong             what our adapters return is a tenth too large
    """
    if kind in ("abort", "segfault"):
        write({"line": "planted: before the crash"})
        os.abort() if kind == "abort" else os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "hang":
        started = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        write({"line": "planted: before the hang", "started": started.pid})
        signal.pause()
    elif kind == "missing":
        from hyperformer_fast import native

        native._load = lambda library: f"planted: there is no library {library}"
    elif kind == "wrong":
        from hyperformer_fast import ops

        right = ops.adapter
        ops.adapter = lambda *arguments, **named: right(*arguments, **named) * 1.1
    else:
        raise ValueError(f"--plant: the kind must be one of {', '.join(KINDS)}, got {kind!r}")
