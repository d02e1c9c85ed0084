"""Every report runs to its end on small inputs; what they measure is checked there before it is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyperformer_fast import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)


@pytest.mark.parametrize(
    "command",
    [
        "report.py --rows 65 --dtypes fp32 --rounds 1",
        "mixed.py --quick",
        "stack.py --quick",
        "memory.py --quick",
        "training.py --quick",
        "gpu_report.py --dry-run --parts tests sanitizer kernels small memory",
        "small.py --device cpu --rows 3 --rounds 1",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_report_runs(command, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])}
    done = subprocess.run(
        [sys.executable, *command.split(), "--output", str(tmp_path)],
        cwd=BENCHMARKS, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("*.json"))


def test_every_suite_is_collected():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(BENCHMARKS)],
        cwd=BENCHMARKS.parent, env={**os.environ, "HF_BENCH_QUICK": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    for group in ("test_adapter.py", "test_weights.py"):
        assert group in done.stdout
