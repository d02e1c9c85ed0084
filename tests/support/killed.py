"""Kill a run that saves at every step, ten times at random moments, going on from what is left each time.

Prints the step of the newest checkpoint after each kill; copies its weights to <left>/<step>.safetensors. Fails where
anything is broken. Children are forked, so that the imports are paid once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.checkpoint import WEIGHTS_NAME
from hyperformer_fast.training.folder import checkpoints
from support.runs import small_t5, small_trainer, trained


def train(folder: Path) -> None:
    whole = checkpoints(folder)
    trainer = small_trainer(folder, dropout=0.1, max_steps=1000, save_steps=1)
    trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)


def newest(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in checkpoints(folder)), default=0)


def forked(work: Callable[[], None]) -> int:
    """The process that does ``work``. The parent does nothing but wait, so that no thread of its own, whose locks a
    fork would copy, is ever running."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return child


def wait_for(folder: Path, step: int, child: int) -> None:
    until = time.monotonic() + 60
    while newest(folder) < step:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        assert time.monotonic() < until, "no progress"
        time.sleep(0.001)


def check(folder: Path, left: Path) -> None:
    """Every checkpoint that is left is whole. Copies the weights of the newest."""
    assert sorted(folder.glob("checkpoint-*")) == sorted(checkpoints(folder)), "an incomplete checkpoint"
    for path in checkpoints(folder):
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(path / name, weights_only=True)
        model = HyperFormerModel.from_pretrained(path, t5=small_t5())
    copy = left / f"{newest(folder)}.safetensors"
    if not copy.exists():
        save_file(trained(model), copy)


def main() -> None:
    torch.set_num_threads(1)
    folder, left = map(Path, sys.argv[1:])
    left.mkdir()
    draw = random.Random(5)
    for _ in range(10):
        before = newest(folder)
        child = forked(lambda: train(folder))
        # one save must be through, the kill falls into the steps and saves after it
        wait_for(folder, before + 1, child)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        _, status = os.waitpid(forked(lambda: check(folder, left)), 0)
        assert status == 0, "what is left is broken"
        step = newest(folder)
        print(step)
    assert (folder / f"checkpoint-{step}" / WEIGHTS_NAME).is_file()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
