"""Train a T5 to summarise, from CSV files with a column of texts and a column of summaries.

    python examples/summarize_csv.py      # made-up sentences and the embedded tiny T5: seconds
    python examples/summarize_csv.py --train_file train.csv --validation_file dev.csv --text article \\
        --summary highlights --model_name_or_path google-t5/t5-small --max_steps 3000

The task is one entry of a task file, and `hyperformer-fast train` and `predict` do the rest. Options that are not
listed by --help go to `hyperformer-fast train`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from hyperformer_fast.cli import main as hyperformer_fast
from hyperformer_fast.data.builtin import load_builtin


def made_up_file(path: Path, split: str, count: int) -> Path:
    """Write a CSV of events in full and in short: "Nina cleaned a blue lamp in Paris" and "Nina cleaned a lamp"."""
    rows = [row for row in load_builtin("entailment", split) if row["label"] == 0]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["article", "summary"])
        writer.writerows([row["sentence1"], row["sentence2"]] for row in rows[:count])
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the task file, train, and summarise the validation file; return the command's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, help="CSV to train on (default: made-up sentences)")
    parser.add_argument("--validation_file", type=Path, help="CSV to evaluate on (default: made-up sentences)")
    parser.add_argument("--text", default="article", help="column of the texts (default: article)")
    parser.add_argument("--summary", default="summary", help="column of the summaries (default: summary)")
    parser.add_argument("--output_dir", type=Path, default=Path("summaries"), help="folder of the run")
    options, further = parser.parse_known_args(arguments)
    if (options.train_file is None) != (options.validation_file is None):
        parser.error("give both --train_file and --validation_file, or neither")

    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.train_file is None:
        options.train_file = made_up_file(options.output_dir / "train.csv", "train", 400)
        options.validation_file = made_up_file(options.output_dir / "validation.csv", "validation", 20)

    entry = {
        "source": f"summarize: {{{options.text}}}",
        "target": "text",
        "label_columns": [options.summary],
        "metrics": ["rouge1", "rouge2", "rougeL"],
        "max_target_length": 64,
        "generation": {"num_beams": 2, "length_penalty": 1.0},
        "train_file": str(options.train_file.resolve()),
        "validation_file": str(options.validation_file.resolve()),
    }
    task_file = options.output_dir / "tasks.json"
    task_file.write_text(json.dumps({"summaries": entry}, indent=2), encoding="utf-8")

    run = options.output_dir / "run"
    train = ["train", "--task_file", str(task_file), "--tasks", "summaries", "--output_dir", str(run)]
    output = options.output_dir / "predictions.csv"
    predict = ["predict", str(run), "--input", str(options.validation_file), "--output", str(output)]
    return hyperformer_fast([*train, *further]) or hyperformer_fast(predict)


if __name__ == "__main__":
    raise SystemExit(main())
