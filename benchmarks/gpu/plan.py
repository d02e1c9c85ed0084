"""The parts of the report, in their order: numbers first, then tests, and last what only looks for faults."""

from __future__ import annotations

from typing import NamedTuple

#: Seconds that the whole report may take. A lent machine's call has ten minutes, of which its transfers take some.
LIMIT = 540


class Part(NamedTuple):
    """One part of the report.

    Args:
        function: ``module:function`` of this package, a generator of entries (gpu_report.py) that takes the options.
        budget: seconds after which the part is killed.
        what: one line of help.
        backend: the backend that the part is about, if it is about one.
        asked: whether the part runs only where it is asked for.
    """

    function: str
    budget: int
    what: str
    backend: str | None = None
    asked: bool = False


PARTS = {
    "machine": Part("machine:entries", 40, "what is on this machine"),
    "build": Part("machine:build", 240, "compile the CUDA library for this GPU alone (needs nvcc)", asked=True),
    "compile": Part("compilation:entries", 90, "compile the Triton kernels that the parts below need, in parallel"),
    "kernels": Part("kernels:entries", 80, "each Triton kernel's own time, and passes beside a copy", "triton"),
    "kernels-cuda": Part("kernels:entries", 50, "the same of the CUDA library's kernels", "cuda"),
    "pieces": Part("pieces:entries", 40, "what lies between a T5's matrix products, beside eager PyTorch", "triton"),
    "adapter": Part("rivals:adapter", 110, "report.py: eager, torch.compile, adapters and ours, and two ceilings"),
    "small": Part("rivals:small", 50, "small.py: few rows and whole sites, by every backend and form"),
    "step": Part(
        "steps:entries", 70, "a T5-base's training step: bare, with eager adapters and with ours, fused and not"
    ),
    "memory": Part("rivals:memory", 30, "the peak memory of a forward and backward, ours and eager's"),
    "tests": Part("checks:tests", 80, "tests/test_on_device.py without its sweep"),
    "sweep": Part("checks:sweep", 50, "the sweep of tests/test_on_device.py, for as long as its budget allows"),
    "sanitizer": Part("checks:sanitizer", 120, "compute-sanitizer over every op of every backend"),
}
