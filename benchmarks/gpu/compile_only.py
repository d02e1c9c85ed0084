"""Launch everything that the report launches, without a GPU, so that Triton compiles it.

    python -m gpu.compile_only --arch 90 [--shard I N | --count] [--keyed-for DIR]

``--shard I N`` takes every N-th piece of the work, beginning with the I-th. ``--count`` compiles nothing, and prints
how many kernels each part is the first to need, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from . import compilation

#: What the sharded tests leave out: the sweep draws other kernels on each run, and inductor would compile for the CPU.
NOT_TESTED = "not sweep and not compiles_in_one_graph"


def launches() -> dict[str, list[Callable[[], object]]]:
    """For each part, calls that launch every variant of a Triton kernel that the part does. A kernel does not depend on
    the number of rows, so these are few. ``adapter`` and ``memory`` launch what ``kernels`` does."""
    import small
    import step
    from providers import Case

    from . import kernels, pieces, steps
    from .every_op import every_op

    works = [kernels.Work(256, dtype, tasks) for dtype in (torch.bfloat16, torch.float32) for tasks in ("one", "even")]
    made: dict[str, list[Callable[[], object]]] = {
        "kernels": [
            lambda work=work, what=what: kernels.Adapter(work, "cpu", 1).calls[what][0]()
            for work in works
            for what in ("forward", "both")
        ]
        + [lambda tasks=tasks: [c() for calls in kernels.Stack(tasks, "cpu", 2).calls.values() for c in calls]
           for tasks in (1, kernels.TASKS)],
        "pieces": [
            lambda piece=piece: pieces.passes(piece.ours, piece.inputs, pieces.gradients_of(piece))["both"]()
            for piece in pieces.pieces(pieces.Shapes(B=2), torch.bfloat16, "cpu").values()
        ],
        "small": [
            torch.no_grad()(lambda N=N: [calls[0]() for calls in small.calls_of(
                Case(N, 768, 24, torch.bfloat16), "triton").values()]) for N in (1, 64)
        ],
        "step": [
            lambda fuse=fuse: step.Step(
                "T5-base", 1, 2, 128, "triton", dtype=torch.bfloat16, fuse=fuse, dropout=steps.DROPOUT
            ).backward()
            for fuse in (False, "auto")
        ],
        "sanitizer": [lambda: every_op("cpu", "triton")],
    }  # fmt: skip
    return made


class EveryNth:
    """A plugin of pytest that keeps every N-th test."""

    def __init__(self, first: int, step: int):
        self.kept = slice(first, None, step)

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = items[self.kept]


def run_tests(first: int, step: int) -> None:
    """Run the tests of tests/test_on_device.py. They fail, since nothing is computed; what they launch is compiled."""
    import pytest

    os.environ |= {"HYPERFORMER_FAST_TEST_DEVICE": "cpu", "HYPERFORMER_FAST_TEST_BACKENDS": "triton"}
    options = [
        "-qq",
        "--tb=no",
        "--no-header",
        "--no-summary",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-W",
        "ignore",
    ]
    path = compilation.children.ROOT / "tests/test_on_device.py"
    pytest.main([*options, "-k", NOT_TESTED, str(path)], plugins=[EveryNth(first, step)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--keyed-for", type=Path, help="the folder of another build of this Triton, see compilation.py")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(counted(options.arch)))
        return
    first, step = options.shard
    pieces = [call for calls in launches().values() for call in calls]
    keyed = compilation.keyed_for(options.keyed_for)
    with keyed, compilation.without_a_gpu(options.arch), compilation.counted() as counts:
        for call in pieces[first::step]:
            call()
        run_tests(first, step)
    mine = counts["ours"]
    print(f"{mine['compiled']} compiled in {mine['seconds']:.0f} s, {mine['from_cache']} from the cache")


def counted(arch: int) -> dict[str, dict[str, int]]:
    """The compilations of each part by kernel, without those of the parts before it."""
    parts, before, found = launches(), {}, {}

    def since() -> dict[str, int]:
        new = {name: n - before.get(name, 0) for name, n in counts.items() if n > before.get(name, 0)}
        before.update(counts)
        return new

    with compilation.nothing_compiled() as counts, compilation.without_a_gpu(arch):
        for part, calls in parts.items():
            for call in calls:
                call()
            found[part] = since()
        run_tests(0, 1)
        found["tests"] = since()
    return found


if __name__ == "__main__":
    main()
