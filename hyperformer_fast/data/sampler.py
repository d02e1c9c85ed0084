"""Which task each step trains, and on which of its examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def task_probabilities(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """p ~ n^(1/T): T = 1 samples by size, a large T all tasks alike (the paper: 10). float64 [T]."""
    weights = (np.asarray(sizes, dtype=np.float64) / sum(sizes)) ** (1.0 / temperature)
    return weights / weights.sum()


class TaskBatchSampler:
    """Micro-batches of indices into the concatenated tasks, all of an optimizer step's of one task.

    A step draws a task, then the next ``batch_size * world_size * accumulation`` of its examples; the accumulated
    micro-batches and the ranks share them out. So the same seed gives the same steps however they are cut: 4 x 2
    accumulated, 2 ranks x 4 or 1 x 8. Each task goes through all of its examples, in an order of its own, before it
    repeats one. The stream depends on ``seed`` and the data alone, never on its length: a resumed run skips what it has
    had.

    Args:
        sizes: number of examples of each task, none 0.
        batch_size: examples of one micro-batch on one rank.
        steps: optimizer steps.
        temperature: see :func:`task_probabilities`.
        seed: of the stream.
        accumulation: micro-batches of an optimizer step.
        rank, world_size: this process, of how many.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        steps: int,
        *,
        temperature: float = 10.0,
        seed: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be positive, got {list(sizes)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.sizes = list(sizes)
        self.batch_size, self.steps, self.accumulation = batch_size, steps, accumulation
        self.temperature, self.seed = temperature, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        choose = np.random.default_rng([self.seed, 0])
        streams = [self._stream(task) for task in range(len(self.sizes))]
        p = task_probabilities(self.sizes, self.temperature)
        for _ in range(self.steps):
            stream = streams[choose.choice(len(p), p=p)]
            for _ in range(self.accumulation):
                batch = [next(stream) for _ in range(self.batch_size * self.world_size)]
                yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _stream(self, task: int) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, 1, task])
        offset = sum(self.sizes[:task])
        while True:
            yield from (generator.permutation(self.sizes[task]) + offset).tolist()
