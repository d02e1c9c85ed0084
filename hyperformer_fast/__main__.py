"""``python -m hyperformer_fast``: the command ``hyperformer-fast``."""

from __future__ import annotations

import sys

from .cli import main

_argv = sys.argv[1:]
if _argv and set(_argv) <= {"--json", "--no-check"}:
    # Once this module was the doctor. Scripts read what it prints, so the warning is not part of that.
    print("python -m hyperformer_fast is the whole command now: add the word doctor", file=sys.stderr)
    _argv = ["doctor", *_argv]
raise SystemExit(main(_argv))
