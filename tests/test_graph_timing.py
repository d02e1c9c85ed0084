"""What is timed on a GPU: calls that take turns, recorded once after everything has run. The GPU here is a stand-in."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from hyperformer_fast import graph_timing


def calls(log):
    return [lambda i=i: log.append(i) or torch.tensor(i) for i in range(3)]


def test_calls_take_turns_equally_often():
    log = []
    recorded = graph_timing.record(calls(log), "cpu", least=20)
    assert recorded.launches == len(log) == 21 and log == [0, 1, 2] * 7
    recorded.replay()
    assert len(log) == 42 and [int(t) for t in recorded.results] == [0, 1, 2]
    assert graph_timing.median_seconds(recorded, 3) > 0 and len(log) == 42 + 4 * 21


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda with all that a recording uses, which writes down what happens."""
    log = []

    @contextlib.contextmanager
    def block(name):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    class Graph:
        def replay(self):
            log.append("replay")

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 42.0

    for name, stand_in in {
        "device": lambda device: block("device"),
        "graph": lambda graph: block("graph"),
        "stream": lambda stream: block(stream.name),
        "current_stream": lambda: Stream("current"),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return log


def test_a_graph_is_captured_after_everything_ran_on_a_side_stream(gpu):
    recorded = graph_timing.record(calls(gpu), "cuda", least=4)
    before, _, captured = (part.split() for part in " ".join(map(str, gpu)).partition("enter graph"))
    assert " ".join(before) == (
        "enter device side waits for current enter side 0 1 2 0 1 2 leave side current waits for side"
    )
    assert " ".join(captured) == "0 1 2 0 1 2 leave graph leave device"
    gpu.clear()
    assert graph_timing.seconds(recorded) == pytest.approx(42e-3 / 6)
    assert gpu == ["event", "replay", "event", "synchronize"]


def test_buffers_are_more_than_the_cache_holds(gpu):
    assert graph_timing.buffers(25 << 20, "cuda") == 4
    assert graph_timing.buffers(200 << 20, "cuda") == 1
    assert graph_timing.buffers(1, "cuda") == graph_timing.MOST_BUFFERS
    assert graph_timing.buffers(1, "cpu") == 1
