"""pytest-benchmark's suites: `pytest benchmarks/ --benchmark-only`. Threads as torch finds them; HF_BENCH_QUICK=1 for
the short list."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    machine_info["threads"] = torch.get_num_threads()


QUICK = os.environ.get("HF_BENCH_QUICK") == "1"
