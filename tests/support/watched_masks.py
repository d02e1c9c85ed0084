"""``hyperformer-fast train`` that writes down each dropout that is drawn in training.

Arguments: a folder, for ``masks<rank>.json`` with [p, seed, stream] of each, then those of the command.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from hyperformer_fast import philox
from hyperformer_fast.cli import main


def watch(folder: Path) -> list[list[float]]:
    """Let every draw from now on be written down, in the list that is returned."""
    drawn: list[list[float]] = []
    draw = philox.draw

    def watched(p, like):
        dropout = draw(p, like)
        if 0 < dropout.p < 1:  # the self-test of the fused T5 drops all
            drawn.append([dropout.p, int(dropout.seed), dropout.stream])
        return dropout

    philox.draw = watched
    return drawn


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    drawn = watch(folder)
    code = main(sys.argv[2:])
    (folder / f"masks{os.environ.get('RANK', '0')}.json").write_text(json.dumps(drawn))
    sys.exit(code)
