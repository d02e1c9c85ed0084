"""A script: writers that save again and again, each time all tensors of one value, are killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from hyperformer_fast import atomic, checkpoint

ROUNDS = 10


def write_checkpoint(path: Path, i: int) -> None:
    checkpoint.save_checkpoint(path, {name: torch.full((40000,), float(i)) for name in "abc"}, {"i": i})


def write_directory(path: Path, i: int) -> None:
    with checkpoint.write_directory(path) as partial:
        write_checkpoint(partial, i)
        (partial / "second").write_text(str(i))


def kill_writers(path: Path, write, draw: random.Random) -> None:
    last = 0
    write(path, last)
    for _ in range(ROUNDS):
        done, say = os.pipe()
        child = os.fork()
        if child == 0:
            for i in range(last + 1, sys.maxsize):
                write(path, i)
                os.write(say, b".")
        os.close(say)
        assert os.read(done, 1) == b".", "the writer died by itself"
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(done)
        tensors, description = checkpoint.load_checkpoint(path)
        assert description["i"] > last, "an older checkpoint came back"
        last = description["i"]
        assert {name: t.unique().tolist() for name, t in tensors.items()} == {name: [last] for name in "abc"}
        assert write is write_checkpoint or (path / "second").read_text() == str(last)
    write(path, last + 1)
    assert [other.name for other in path.parent.iterdir()] == [path.name], "leftovers beside it"
    names = {checkpoint.WEIGHTS_NAME, checkpoint.CONFIG_NAME} | ({"second"} if write is write_directory else set())
    assert {file.name for file in path.iterdir()} == names, "leftovers in it"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is absent or differs")
    draw = random.Random(0)
    for kind, write in (("file", write_checkpoint), ("directory", write_directory), ("renames", write_directory)):
        if kind == "renames":
            atomic._exchange = lambda *_: False
        (root / kind).mkdir()
        kill_writers(root / kind / "run", write, draw)
        print(kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
