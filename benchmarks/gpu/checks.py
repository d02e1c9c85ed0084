"""Correctness on the GPU: the fixed tests, the sweep, and compute-sanitizer."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

from . import children
from .machine import tool

TOOLS = ("memcheck", "racecheck", "synccheck")
#: Seconds that a part keeps of its limit, to report before it would be killed, and that pytest takes to start.
SPARE, START = 5, 15


def left(options: SimpleNamespace) -> float:
    """Seconds until the part must have reported."""
    return max(1, options.end - time.monotonic() - SPARE)


def pytest(options: SimpleNamespace, chosen: str, **variables: str) -> tuple[int, str]:
    """Run those of tests/test_on_device.py that ``-k chosen`` chooses."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-rsf", "-s", "--import-mode=importlib", "-p", "no:cacheprovider",
        "-W", "ignore", "-k", chosen, str(children.ROOT / "tests/test_on_device.py"),
    ]  # fmt: skip
    variables["HYPERFORMER_FAST_TEST_DEVICE"] = options.device
    return children.run_quietly(command, left(options), **variables)


def verdict(code: int, said: str) -> dict:
    """An entry about a run of pytest. Exit code 5 means that nothing was there to be tested."""
    entry = {"line": children.last_line(said, code), "said": said}
    return {**entry, "failed": f"exit code {code}"} if code else entry


def tests(options: SimpleNamespace) -> Iterator[dict]:
    """The fixed examples first, because they say most, then everything but the sweep."""
    yield verdict(*pytest(options, "an_example"))
    if options.dry_run:
        return
    yield verdict(*pytest(options, "not an_example and not sweep"))


def sweep(options: SimpleNamespace) -> Iterator[dict]:
    """As many drawn examples as the budget allows, three in a dry run."""
    seconds = max(1, left(options) - START)
    examples = "3" if options.dry_run else "100000"
    code, said = pytest(
        options, "sweep", HYPERFORMER_FAST_SWEEP_SECONDS=str(seconds), HYPERFORMER_FAST_SWEEP_EXAMPLES=examples
    )
    entry = verdict(code, said)
    checked = re.search(r"sweep: (\d+) examples", said)
    yield {**entry, "line": f"{checked[1] if checked else 'unknown'} examples: {entry['line']}"}


def sanitizer(options: SimpleNamespace) -> Iterator[dict]:
    """Every tool over every backend; a run without a tool where there is none."""
    from small import ours

    path, backends = tool("compute-sanitizer"), ours(options.device)
    for i, backend in enumerate(backends):
        call = [sys.executable, "-m", "gpu.every_op", options.device, backend]
        if path is None or options.dry_run:
            code, said = children.run_quietly(call, left(options))
            why = "a dry run" if path else "compute-sanitizer is not on this machine"
            entry = {"line": f"{backend} without a tool ({why}): exit code {code}", "absent": {"sanitizer": why}}
            yield {**entry, "failed": said} if code else entry
            continue
        for j, name in enumerate(TOOLS):
            limit = left(options) / (len(TOOLS) * (len(backends) - i) - j)
            command = [path, "--tool", name, "--error-exitcode", "9", *call]
            code, said = children.run_quietly(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            entry = {"line": f"{backend}, {name}: exit code {code}", "backend": backend, "tool": name}
            yield {**entry, "failed": said} if code else entry
