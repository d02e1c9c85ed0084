"""Small runs: a random byte-level T5 on a few rows, seconds each."""

from __future__ import annotations

import atexit
import gc
import json
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration, set_seed

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.data import TaskData
from hyperformer_fast.data.registry import KNOWN, find_task
from hyperformer_fast.training import HyperFormerTrainer, RunArguments
from hyperformer_fast.training.evaluate import tokenised
from hyperformer_fast.training.progress import quiet

# Each training begins with a full garbage collection, which would go through all that was imported.
gc.freeze()
atexit.register(gc.unfreeze)

SMALL = {"reduction_factor": 4, "task_embedding_dim": 4, "projected_task_embedding_dim": 4, "task_hidden_dim": 5}
# Another default does not change what these runs are compared with.
SMALL |= {"recipe": "authors"}


def small_t5(dropout: float = 0.0, **changes) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"vocab_size": 384, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    fields |= {"dropout_rate": dropout, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**{**fields, **changes}))


def saved_t5(folder: Path, **changes) -> str:
    """A small T5 with its tokenizer, as --model_name_or_path takes it."""
    small_t5(**changes).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


def rows(task: str, n: int) -> list[dict]:
    """Rows whose texts all have the same length, as have the targets of a task."""
    spec = KNOWN[task]
    labels = [i % len(spec.labels) if spec.labels else (i % 26) * 0.2 for i in range(n)]
    return [{c: f"{c[0]}{i:03d}" for c in spec.columns} | {"label": label} for i, label in enumerate(labels)]


def data_folder(folder: Path, tasks=("cola", "stsb"), n: int = 24) -> str:
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split in ("train", "validation"):
            lines = [json.dumps(row) + "\n" for row in rows(task, n if split == "train" else 6)]
            (folder / task / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def small_run(output_dir: Path, **changes) -> RunArguments:
    """Arguments of a run of six steps; evaluations and checkpoints are off unless their steps are given."""
    fields = {"output_dir": str(output_dir), **SMALL, "max_steps": 6, "warmup_steps": 2, "logging_steps": 1}
    fields |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 0.01, "seed": 3}
    fields |= {f"{what}_strategy": "steps" if f"{what}_steps" in changes else "no" for what in ("eval", "save")}
    return RunArguments.from_dict({**fields, **changes})


def small_data(tasks=("cola", "stsb"), n: int = 24) -> dict[str, TaskData]:
    return {
        task: TaskData.from_dataset(find_task(task), train=rows(task, n), validation=rows(task, 6)) for task in tasks
    }


def small_trainer(output_dir: Path, dropout: float = 0.0, tasks=("cola", "stsb"), **changes) -> HyperFormerTrainer:
    callbacks = changes.pop("callbacks", None)
    run, data, tokenizer = small_run(output_dir, **changes), small_data(tasks), ByT5Tokenizer()
    set_seed(run.training.seed)
    model = get_hyperformer_model(small_t5(dropout), run.hyperformer_config(list(data)))

    def encoded(split):
        return {name: tokenised(task, split, tokenizer, list(data), 64) for name, task in data.items()}

    trainer = HyperFormerTrainer(
        model,
        run.training,
        train_dataset=concatenate_datasets([rows.remove_columns("label") for rows in encoded("train").values()]),
        eval_dataset=encoded("validation"),
        processing_class=tokenizer,
        tasks={name: task.spec for name, task in data.items()},
        callbacks=callbacks,
    )
    quiet(trainer)
    return trainer


def expect_same_results(found: dict, expected: dict) -> None:
    """Expect equal results of every task; sums of losses may be rounded in another order."""
    losses = [{name: task.pop("loss", None) for name, task in each.items()} for each in (found, expected)]
    assert found == expected
    if None not in losses[0].values() and None not in losses[1].values():
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def losses(trainer: HyperFormerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit by bit. (safetensors writes metadata in any order.)"""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
