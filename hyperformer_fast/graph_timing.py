"""Seconds that a GPU takes for a call, without the host's time and with inputs that come from memory.

:func:`record` captures some twenty launches in a CUDA graph, and :func:`seconds` times a replay of it with CUDA events.
A single eager call of a small kernel would time the host, which takes longer to launch it than the GPU to run it. One
buffer used again and again would stay in the L2 cache; so each launch takes the next of several calls, which have
buffers of their own (:func:`buffers` says how many). On a CPU the same functions run the calls one after another.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

#: The fewest launches of one graph. A replay costs the host some ten microseconds, which are shared among them.
LAUNCHES = 20
#: How many times the size of the L2 cache all buffers together have, and the most buffers that are made for that.
ROTATED, MOST_BUFFERS = 2, 64


@dataclasses.dataclass
class Recorded:
    """Launches that were recorded once, to be run again and again."""

    replay: Callable[[], object]  #: runs all launches
    launches: int
    results: list[Any]  #: what the last launch of each call returned; every replay writes the same tensors again
    on_gpu: bool


def buffers(size: int, device: str | torch.device) -> int:
    """How many buffers of ``size`` bytes to take turns with, so that none is in the L2 cache when its turn comes.

    There are at most ``MOST_BUFFERS``: fewer than it takes if ``size`` is below some two megabytes.
    """
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_BUFFERS, math.ceil(ROTATED * cache / max(size, 1))))


def record(calls: Sequence[Callable[[], Any]], device: str | torch.device, least: int = LAUNCHES) -> Recorded:
    """Record launches of ``calls`` in turn, each equally often and ``least`` in all.

    Args:
        calls: functions that launch the same work on buffers of their own. They must neither read from the device nor
            allocate pinned memory. Whatever is still to be compiled is compiled before the recording.
        device: the device that they run on.
        least: the fewest launches.
    """
    turns = math.ceil(least / len(calls))
    launches = turns * len(calls)
    results: list[Any] = [None] * len(calls)

    def run() -> None:
        for i in range(launches):
            results[i % len(calls)] = calls[i % len(calls)]()

    if torch.device(device).type != "cuda":
        run()
        return Recorded(run, launches, results, False)
    with torch.cuda.device(device):
        # torch's rule for a capture: run everything before on a side stream, which allocates the libraries' workspaces.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (*calls, *calls):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return Recorded(graph.replay, launches, results, True)


def seconds(recorded: Recorded) -> float:
    """Mean seconds per launch of one replay: the GPU's own time, or on a CPU the time that passes."""
    if not recorded.on_gpu:
        before = time.perf_counter()
        recorded.replay()
        return (time.perf_counter() - before) / recorded.launches
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    recorded.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / recorded.launches


def median_seconds(recorded: Recorded, rounds: int = 9) -> float:
    """The median of :func:`seconds` over ``rounds``, after a replay that is not counted."""
    recorded.replay()
    return median(seconds(recorded) for _ in range(rounds))
