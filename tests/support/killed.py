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


def wait_for(folder: Path, step: int) -> None:
    until = time.monotonic() + 60
    while newest(folder) < step:
        assert time.monotonic() < until, "no progress"
        time.sleep(0.001)


def main() -> None:
    torch.set_num_threads(1)
    folder, left = map(Path, sys.argv[1:])
    left.mkdir()
    draw = random.Random(5)
    for _ in range(10):
        before = newest(folder)
        child = os.fork()
        if not child:
            try:
                train(folder)
            finally:
                os._exit(1)
        # one save must be through, the kill falls into the steps and saves after it
        wait_for(folder, before + 1)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = newest(folder)
        assert sorted(folder.glob("checkpoint-*")) == sorted(checkpoints(folder)), "an incomplete checkpoint"
        for path in checkpoints(folder):
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(path / name, weights_only=True)
            model = HyperFormerModel.from_pretrained(path, t5=small_t5())
        if not (left / f"{step}.safetensors").exists():
            save_file(trained(model), left / f"{step}.safetensors")
        print(step)
    assert (folder / f"checkpoint-{step}" / WEIGHTS_NAME).is_file()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
