"""Small runs: a random byte-level T5 on a few rows, seconds each."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, PrinterCallback, T5Config, T5ForConditionalGeneration, set_seed

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.data import TaskData
from hyperformer_fast.data.sources import examples
from hyperformer_fast.data.tasks import KNOWN
from hyperformer_fast.training import HyperFormerTrainer, RunConfig
from hyperformer_fast.training.trainer import training_arguments

SMALL = {"reduction_factor": 4, "task_embedding_dim": 4, "projected_task_embedding_dim": 4, "task_hidden_dim": 5}


def small_t5(dropout: float = 0.0, **changes) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"vocab_size": 384, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    fields |= {"dropout_rate": dropout, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**{**fields, **changes}))


def saved_t5(folder: Path, **changes) -> str:
    """A small T5 with its tokenizer, as --model takes it."""
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


def small_run(output_dir: Path, **changes) -> RunConfig:
    fields = {"output_dir": str(output_dir), "hyperformer": SMALL, "steps": 6, "batch_size": 4, "warmup_steps": 2}
    fields |= {
        "eval_steps": 0,
        "save_steps": 0,
        "logging_steps": 1,
        "eval_batch_size": 8,
        "learning_rate": 0.01,
        "seed": 3,
    }
    return RunConfig(**{**fields, **changes})


def small_data(tasks=("cola", "stsb"), n: int = 24) -> dict[str, TaskData]:
    def split(task, count):
        return examples(KNOWN[task], [(f"{task}:{i}", row) for i, row in enumerate(rows(task, count))])

    return {task: TaskData(KNOWN[task], {"train": split(task, n), "validation": split(task, 6)}) for task in tasks}


def small_trainer(output_dir: Path, dropout: float = 0.0, tasks=("cola", "stsb"), **changes) -> HyperFormerTrainer:
    run, data = small_run(output_dir, **changes), small_data(tasks)
    set_seed(run.seed)
    model = get_hyperformer_model(small_t5(dropout), run.hyperformer_config(list(data)))
    trainer = HyperFormerTrainer(model, run, data, ByT5Tokenizer(), training_arguments(run, use_cpu=True))
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: HyperFormerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
