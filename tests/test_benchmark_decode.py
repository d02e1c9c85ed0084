"""benchmarks/decode.py: what it writes, and that it times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperformer_fast import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BARE = ("bare", "bare, fused, without products", "bare, fused")
OURS = ("unfused", "fused, without products", "fused")
LOOP = ", a call for each task"
PEERS = {
    "peft": ("PEFT LoRA, adapter_names", "PEFT LoRA" + LOOP),
    "adapters": ("adapters, BatchSplit", "adapters" + LOOP),
}

pytestmark = pytest.mark.skipif(
    native.cpu_library() is None, reason="needs the compiled CPU library, which is not built"
)


@pytest.fixture
def modules(monkeypatch):
    """The modules decode and decode_models of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("decode"), importlib.import_module("decode_models")


@pytest.fixture
def t5(modules):
    from step_models import frozen_t5

    return frozen_t5("T5-small", 1, 1000, 0.0, True, "cpu", torch.float32).eval()


def test_every_row_is_checked_and_timed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])}
    done = subprocess.run(
        [sys.executable, "decode.py", "--quick", "--output", str(tmp_path)],
        cwd=BENCHMARKS, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("decode-transformers*.json")
    assert path.with_suffix(".png").exists()
    found = json.loads(path.read_text())["results"]
    assert set(found["batches"]) == {"B=1, 1 task", "B=4, 2 tasks"}
    mixed = found["batches"]["B=4, 2 tasks"]
    expected = {*BARE, *OURS, "fused" + LOOP}
    for package, rows in PEERS.items():
        if package in found["absent"]:
            assert f"not measured: {package}: " in done.stdout
        else:
            expected.update(rows)
    assert set(mixed) == expected and not any(LOOP in row for row in found["batches"]["B=1, 1 task"])
    assert all(row["ratio"] > 0 and row["error"] < 1e-4 for row in mixed.values())
    assert all("over the same fused" in mixed[row] for row in OURS)
    first, later = found["generations"]["first"], found["generations"]["later"]
    assert min(first.values()) > 0 and max(later.values()) == 0
    assert "generate_weights called 0 times" in done.stdout


def test_a_row_that_decodes_something_else_is_not_timed(modules, t5):
    decode, models = modules
    tasks = ["task0", "task1"]
    bare = models.bare_rows(t5)["bare"]
    rows = models.own_rows(models.own_models(t5, tasks))
    batch = decode.sources(2, 4)
    assert decode.check("fused", rows["fused"], bare, batch, tasks, 2) < decode.OFF
    swapped = models.Row(
        lambda batch, tasks, settings: rows["fused"].generate(batch, tasks[::-1], settings), bare.alone
    )
    for row, why in (
        (swapped, "off by"),
        (models.Row(swapped.generate, rows["fused"].alone), "off by"),
        (models.Row(lambda *given: bare.generate(*given), lambda *given: bare.alone(*given)), "the bare T5's logits"),
        (
            models.Row(
                lambda b, t, s: bare.generate(b, t, {**s, "max_new_tokens": 3, "min_new_tokens": 3}), bare.alone
            ),
            "tokens",
        ),
    ):
        with pytest.raises(decode.Wrong, match=why):
            decode.check("a row", row, bare, batch, tasks, 2)


def test_a_batch_has_no_more_tasks_than_samples(modules):
    decode, _ = modules
    assert decode.sizes_of("64:8") == (64, 8) and decode.sizes_of("4") == (4, 4)
    for wrong in ("4:8", "0", "4:0"):
        with pytest.raises(decode.argparse.ArgumentTypeError, match="at least one task"):
            decode.sizes_of(wrong)
