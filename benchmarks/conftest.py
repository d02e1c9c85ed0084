"""`pytest benchmarks/ --benchmark-only` times the short list, with `--full` everything; it ends with a table of ratios.

Threads are as torch finds them. The short list finishes within four minutes on two cores.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import torch
from providers import OURS, absent
from timing import machine, text_table

#: Seconds for each call of the short list; five rounds at least.
SHORT_SECONDS = 0.5
MEDIANS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="time every shape; without it those that matter")


def pytest_configure(config):
    config.stash[MEDIANS] = {}


def pytest_report_header():
    lines = [f"not measured: {name} ({reason})" for name, reason in absent().items()]
    if "HF_BENCH_QUICK" in os.environ:
        lines.append("HF_BENCH_QUICK is no longer read: the short list is the default, and --full times everything")
    return lines


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            item.add_marker(pytest.mark.benchmark(max_time=SHORT_SECONDS, min_rounds=5))


@pytest.fixture
def record_median(benchmark, request):
    """A function of (entry, provider) that keeps the median of what was just timed for the table at the end."""

    def record(entry, provider):
        if benchmark.stats is not None:  # None with --benchmark-disable
            times = request.config.stash[MEDIANS].setdefault((entry.op, entry.shape, entry.dtype), {})
            times[provider] = benchmark.stats["median"]

    return record


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    machine_info["threads"] = torch.get_num_threads()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    medians = {key: times for key, times in config.stash[MEDIANS].items() if OURS in times and len(times) > 1}
    if not medians:
        return
    rivals = list(dict.fromkeys(name for times in medians.values() for name in times if name != OURS))
    rows = [
        (*key, *(times[name] / times[OURS] if name in times else "" for name in rivals))
        for key, times in medians.items()
    ]
    title = "Time of each rival over ours (medians); above 1 ours is faster"
    terminalreporter.write_line("")
    terminalreporter.write_line(text_table(title, machine(), ("op", "shape", "dtype", *rivals), rows))
