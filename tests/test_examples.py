"""The examples run on the embedded T5 and give what they promise."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

import hyperformer_fast

EXAMPLES = Path(hyperformer_fast.__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example():
    """A function from the name of an example to its module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_summarisation_from_a_csv(example, tmp_path):
    few = ["--max_steps", "4", "--max_train_samples", "32", "--per_device_train_batch_size", "8"]
    assert example("summarize_csv").main(["--output_dir", str(tmp_path), *few]) == 0
    scored = json.loads((tmp_path / "run" / "metrics.json").read_text())["tasks"]["summaries"]
    assert {"rouge1", "rouge2", "rougeL"} < set(scored["metrics"])
    with (
        open(tmp_path / "validation.csv", newline="") as before,
        open(tmp_path / "predictions.csv", newline="") as after,
    ):
        rows, predicted = list(csv.DictReader(before)), list(csv.DictReader(after))
    assert [{"article": row["article"], "summary": row["summary"]} for row in predicted] == rows
    assert list(predicted[0]) == ["article", "summary", "prediction", "prediction_text"]
    assert all(row["prediction"] == row["prediction_text"].strip() for row in predicted)


def test_summarisation_from_ones_own_columns(example, tmp_path):
    for name, count in (("train", 8), ("dev", 2)):
        lines = [f'"The text, number {i}",note {i},{i}' for i in range(count)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["body,headline,id", *lines]) + "\n")
    files = ["--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "dev.csv")]
    few = ["--text", "body", "--summary", "headline", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    assert example("summarize_csv").main([*files, "--output_dir", str(tmp_path / "out"), *few]) == 0
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["0", "1"]


def test_few_shot_transfer(example, tmp_path):
    few = ["--steps", "2", "--samples", "4", "8", "--seeds", "1", "--rows", "8", "--output_dir", str(tmp_path)]
    found = example("fewshot").main(few)
    assert list(found) == [4, 8]
    assert all(len(scores) == 1 and all(0 <= score <= 100 for score in scores) for scores in found.values())


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"[{path.name}]({path.name})" in listed
