"""What the tools record: the tables that the documents link are those that the code makes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


def test_the_recorded_predictions_are_those_of_the_code(tool):
    recorded = json.loads((TOOLS / "results/cuda_traffic.json").read_text())["records"]
    assert tool("cuda_traffic").rows() == recorded


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "blocks"),
    [(96, 32768, 4, 80, 4), (192, 91904, 8, 80, 1), (121, 43136, 8, 80, 2), (32, 0, 1, 90, 32), (255, 0, 8, 86, 1)],
)
def test_blocks_per_multiprocessor(tool, registers, shared, warps, arch, blocks):
    assert tool("device").blocks_per_multiprocessor(registers, shared, warps, arch) == blocks


def test_a_table_is_written_for_programs_and_for_people(tool, tmp_path):
    records = tool("records")
    made = [{"kernel": "fold", "wide_loads": 3}, {"kernel": "rows", "wide_loads": 0}]
    records.write("made", "A title", "python tools/made.py", made, tmp_path, triton="3.9.0")
    assert records.read("made", tmp_path) == made
    assert json.loads((tmp_path / "made.json").read_text())["triton"] == "3.9.0"
    page = (tmp_path / "made.md").read_text()
    assert "| kernel | wide loads |" in page and "| rows | 0 |" in page and "`python tools/made.py`" in page
