"""One of two ranks: train, save and evaluate as rank RANK, and write the weights to <folder>/rank<RANK>.safetensors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from support import runs


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    options = json.loads(sys.argv[2])
    # Two processes on one machine with an accelerator would need two of them.
    options |= {"use_cpu": True, "ddp_backend": "gloo"}
    trainer = runs.small_trainer(folder / "two", per_device_train_batch_size=2, **options)
    assert trainer.args.world_size == 2
    trainer.train()
    save_file(runs.trained(trainer.model), folder / f"rank{os.environ['RANK']}.safetensors")
    torch.distributed.barrier()
    # gloo's destructors, with a DDP model alive, have hung at a plain exit (torch 2.13)
    os._exit(0)


if __name__ == "__main__":
    main()
