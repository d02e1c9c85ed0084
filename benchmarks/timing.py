"""What every report shares: its command line, interleaved timing, the machine's description, tables and JSON.

A GPU is timed in one way: launches recorded in a CUDA graph and timed by events (``hyperformer_fast.graph_timing``).
What is called eagerly there is timed with the host's time, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hyperformer_fast import atomic, graph_timing
from hyperformer_fast.backends import explain
from hyperformer_fast.backends.cpu import CpuBackend
from hyperformer_fast.graph_timing import Recorded

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str, rounds: int = 15, quick: str | None = None) -> argparse.ArgumentParser:
    """The options that all reports have.

    Args:
        doc: the report's docstring; it becomes the help.
        rounds: the default of ``--rounds``.
        quick: what ``--quick`` makes small; without it there is no such option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each call; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def relative_error(mine: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the truth's norm, in float64."""
    return ((mine.double() - truth.double()).norm() / truth.double().norm()).item()


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of what may be timed. Eager PyTorch's sums in float32 are off by several units in the
    last place; what is rounded to 16 bits at the end is off by less than one."""
    return (16 if dtype in (torch.float32, torch.float64) else 4) * torch.finfo(dtype).eps


def machine(device: str = "cpu") -> dict[str, str]:
    """The CPU, PyTorch's instruction set and ours, threads and torch; or the GPU, where that is the device."""
    if device.startswith("cuda"):
        return {
            "gpu": torch.cuda.get_device_name(device),
            "backend": explain("adapter_forward", device=device).chosen or "none",
            "torch": torch.__version__,
        }
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    cpu = CpuBackend()
    return {
        "cpu": name,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "our_instruction_set": cpu.instruction_set() if cpu.availability() else "none",
        "backend": explain("adapter_forward").chosen or "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def described(where: dict[str, str]) -> str:
    """The machine in one line, for the head of a table or a plot."""
    if "gpu" in where:
        return f"{where['gpu']}, PyTorch {where['torch']}, ours ({where['backend']})"
    threads = "1 thread" if where["threads"] == "1" else f"{where['threads']} threads"
    return (
        f"{where['cpu']}, PyTorch {where['torch']} with {where['instruction_set']}, "
        f"ours ({where['backend']}) with {where['our_instruction_set']}, {threads}"
    )


def slug(where: dict[str, str]) -> str:
    """The machine in a file's name: PyTorch's instruction set, backend and threads; or the GPU and the backend."""
    if "gpu" in where:
        return "-".join([*where["gpu"].lower().split(), where["backend"]])
    return f"{where['instruction_set'].lower()}-{where['backend']}-{where['threads']}threads"


class Within(NamedTuple):
    """A call that is timed within a context, whose entry and exit are not timed."""

    context: Callable[[], contextlib.AbstractContextManager]
    call: Callable[[], object]


Timed = Recorded | Within | Callable[[], object]


def seconds(timed: Timed, repeats: int) -> float:
    """Mean seconds per call.

    Of what is recorded in a CUDA graph, this is the GPU's own time per launch; ``repeats`` is not read then. Otherwise
    it is the host's time, and on a GPU until it has finished the last call.
    """
    if isinstance(timed, Recorded):
        return graph_timing.seconds(timed)
    context, call = timed if isinstance(timed, Within) else (contextlib.nullcontext, timed)
    settle = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    with context():
        settle()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        settle()
        return (time.perf_counter() - start) / repeats


def interleaved(calls: dict[str, Timed], rounds: int, least: float = 2e-3) -> dict[str, float]:
    """Median seconds of each call over ``rounds`` in which all calls take turns, so that disturbances meet all alike.

    A turn repeats a call until it lasts about ``least`` seconds; one that is recorded is replayed once.
    """
    return {name: median(times) for name, times in turns(calls, rounds, least).items()}


def turns(
    calls: dict[str, Timed], rounds: int, least: float = 2e-3, until: float | None = None
) -> dict[str, list[float]]:
    """The seconds of each call in each round, as :func:`interleaved` takes them.

    Args:
        until: no round begins after this time (``time.perf_counter()``), but ``rounds`` are taken at least; without it
            ``rounds`` are taken.
    """
    repeats = {}
    for name, call in calls.items():
        seconds(call, 1)
        repeats[name] = max(1, round(least / max(seconds(call, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, taken = list(calls), 0
    gc.collect()
    gc.freeze()  # so that the collections between rounds look at what is new, and are quick
    gc.disable()
    try:
        while taken < rounds or (until is not None and time.perf_counter() < until):
            for name in order:
                times[name].append(seconds(calls[name], repeats[name]))
            order = order[1:] + order[:1]
            taken += 1
            gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    return times


def show(title: str, where: dict[str, str], columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print one table under its title and the machine; floats are ratios."""
    print(text_table(title, where, columns, rows))


def text_table(title: str, where: dict[str, str], columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """What :func:`show` prints."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{cell:.2f}x" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(width=140, markup=False)
    with console.capture() as captured:
        console.print(f"{title}\n{described(where)}", highlight=False)
        console.print(table)
    return captured.get()


def write(name: str, where: dict[str, str], results: object, folder: Path = RESULTS) -> Path:
    """Write ``folder/name-<machine>.json``, named by :func:`slug`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{slug(where)}.json"
    with atomic.write_file(path) as partial:
        partial.write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    print(path)
    return path
