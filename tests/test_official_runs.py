"""Every one of the authors' configurations trains, evaluates and is evaluated again, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import expect_same_results

import hyperformer_fast
from hyperformer_fast import HyperFormerConfig
from hyperformer_fast.cli import main

FOLDER = Path(hyperformer_fast.__file__).resolve().parents[1] / "configs" / "official"
VARIANTS = {
    "finetune": "finetuning", "finetune_single_task": "finetuning", "adapters": "adapters",
    "adapter_dagger": "adapters", "hyperformer": "hyperformer-shared", "hyperformer++": "hyperformer++",
}  # fmt: skip

#: What the task of the run needs, and what makes it quick: the embedded T5 on a few short rows of built-in tasks.
FLAGS = "--model_name_or_path embedded --tasks sentiment topic --eval_tasks sentiment topic --max_steps 20"
QUICK = "--per_device_train_batch_size 2 --max_source_length 48 --max_train_samples 60 --max_eval_samples 4"
QUICK = f"{QUICK} --max_predict_samples 6 --eval_steps 10 --save_steps 10 --val_max_target_length 4"


def test_every_file_is_run():
    assert VARIANTS.keys() == {path.stem for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains_and_evaluates(tmp_path, capsys, name):
    run = tmp_path / "run"
    config = str(FOLDER / f"{name}.json")
    assert main(["train", config, *FLAGS.split(), *QUICK.split(), "--output_dir", str(run)]) == 0
    said = capsys.readouterr()
    assert f'the method is variant "{VARIANTS[name]}"' in said.err and "average" in said.out
    metrics, history = (json.loads((run / f"{what}.json").read_text()) for what in ("metrics", "history"))
    assert (metrics["variant"], metrics["steps"]) == (VARIANTS[name], 20)
    assert list(metrics["tasks"]) == ["sentiment", "topic"] and "average_metrics" in metrics
    assert [entry["step"] for entry in history if "eval_average_metrics" in entry] == [10, 20]
    assert HyperFormerConfig.from_pretrained(run).variant == VARIANTS[name]
    saved = json.loads((run / "run.json").read_text())["arguments"]
    assert saved["text_style"] == "official" and saved["loss_reduction"] == "sum"
    if name not in ("finetune", "hyperformer++"):
        return  # evaluating anew takes a second, and does not depend on the file
    assert main(["evaluate", str(run)]) == 0
    again = json.loads((run / "evaluation.json").read_text())
    expect_same_results(again["tasks"], metrics["tasks"])
    assert again["average_metrics"] == metrics["average_metrics"]
