"""Choose the tasks and the examples that each optimizer step trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def task_probabilities(sizes: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """Return the probability of each task, proportional to n^(1/T), as a float64 array.

    With T = 1 tasks are sampled in proportion to their sizes n, with a large T uniformly. The paper uses T = 10.
    """
    weights: NDArray[np.float64] = (np.asarray(sizes, dtype=np.float64) / sum(sizes)) ** (1.0 / temperature)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


class TaskBatchSampler:
    """Yields micro-batches of indices into the concatenated tasks.

    Each optimizer step takes ``batch_size * world_size * accumulation`` examples and divides them among the accumulated
    micro-batches and the ranks. They are all of one task, which is drawn for the step; if ``mixed`` is set, a task is
    drawn for each example. The same seed therefore gives the same steps for 4 examples x 2 accumulated micro-batches,
    4 examples x 2 ranks, or 8 examples at once. Each task's examples are shuffled anew for every pass over them. The
    indices depend only on ``seed`` and ``sizes``, never on ``steps``: a resumed run skips those that it has already
    trained on.

    Args:
        sizes: number of examples of each task, each at least 1.
        batch_size: examples per micro-batch on one rank.
        steps: number of optimizer steps.
        temperature: see :func:`task_probabilities`.
        seed: seed of the random choices.
        accumulation: micro-batches per optimizer step.
        rank, world_size: rank of this process, and the number of processes.
        mixed: draw a task for each example instead of each step.
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
        mixed: bool = False,
    ):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be positive, got {list(sizes)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.sizes = list(sizes)
        self.batch_size, self.steps, self.accumulation = batch_size, steps, accumulation
        self.temperature, self.seed = temperature, seed
        self.rank, self.world_size, self.mixed = rank, world_size, mixed

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        choose = np.random.default_rng([self.seed, 0])
        streams = [self._stream(task) for task in range(len(self.sizes))]
        p = task_probabilities(self.sizes, self.temperature)
        together = self.batch_size * self.world_size
        for _ in range(self.steps):
            count = together * self.accumulation
            tasks = choose.choice(len(p), size=count if self.mixed else 1, p=p).tolist()
            step = [next(streams[task]) for task in (tasks if self.mixed else tasks * count)]
            for start in range(self.rank * self.batch_size, count, together):
                yield step[start : start + self.batch_size]

    def _stream(self, task: int) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, 1, task])
        offset = sum(self.sizes[:task])
        while True:
            yield from (generator.permutation(self.sizes[task]) + offset).tolist()
