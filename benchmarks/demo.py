"""The demo's trainer: the embedded T5 on the built-in tasks, as `make demo` trains it."""

from __future__ import annotations

from typing import Any, TypeVar

from datasets import concatenate_datasets
from transformers import set_seed

from hyperformer_fast.data import encode, load_tasks
from hyperformer_fast.training import HyperFormerTrainer, RunArguments
from hyperformer_fast.training.start import build_model

Kind = TypeVar("Kind", bound=HyperFormerTrainer)


def demo_trainer(kind: type[Kind], output: str, **fields: Any) -> Kind:
    """A trainer that neither evaluates nor saves.

    Args:
        kind: its class.
        output: its folder.
        fields: arguments in place of the demo's.
    """
    silent = {"eval_strategy": "no", "save_strategy": "no"}
    run = RunArguments.from_dict({"preset": "demo", "output_dir": output, **silent, **fields})
    data = load_tasks(run.data)
    set_seed(run.training.seed)
    model, tokenizer = build_model(run, list(data))
    rows = [
        encode(task, "train", tokenizer, run.data.max_source_length, index=index)
        for index, task in enumerate(data.values())
    ]
    return kind(model, run.training, train_dataset=concatenate_datasets(rows), processing_class=tokenizer)
