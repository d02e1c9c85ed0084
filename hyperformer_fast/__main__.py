"""``python -m hyperformer_fast``: the doctor."""

from __future__ import annotations

from .doctor import main

raise SystemExit(main())
