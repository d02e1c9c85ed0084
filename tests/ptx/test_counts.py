"""The table of tools/ptx_counts.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ptx.grids import Ran

COUNTS = ("instructions", "barriers", "mma", "global_bytes_read", "global_bytes_written", "shared_bytes")


@pytest.fixture
def ptx_counts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    return importlib.import_module("ptx_counts")


def test_a_row(ptx_counts):
    """The smallest, the median and the largest of the blocks, and one number where they agree."""
    blocks = [dict.fromkeys(COUNTS, 2000) | {"instructions": n} for n in (5, 70000, 6)]
    row = ptx_counts.row("triton", "one task", Ran("weights", (2, 3, 1), blocks, [], set()))
    assert row["blocks"] == 6 and row["counted"] == 3
    assert row["instructions"] == "5 / 6 / 70,000" and row["barriers"] == "2,000" and row["KB read"] == "2"


def test_the_mixes_have_as_many_samples(ptx_counts):
    assert {len(tasks) for tasks in ptx_counts.MIXES.values() if tasks} == {ptx_counts.SAMPLES}
    assert all(len(set(tasks)) in (1, ptx_counts.TASKS) for tasks in ptx_counts.MIXES.values() if tasks)
