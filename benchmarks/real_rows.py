"""Rows of several tasks in one batch, and a model for them, which several reports compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, get_hyperformer_model
from hyperformer_fast.data import available_tasks, load_tasks
from hyperformer_fast.tiny import EMBEDDED, load_tiny

#: The columns of a loaded task that go into the model.
_TEXTS = ("source", "target")


class Case(NamedTuple):
    """A T5 in float32, and rows of several tasks, one after another."""

    t5: nn.Module
    inputs: dict[str, Tensor]
    tasks: list[str]  #: of each row
    tokenizer: Any = None


def real_case(t5: str, data: str | None, rows: int) -> Case:
    """A pretrained T5 and rows of several tasks in turn, padded.

    Args:
        t5: its folder, or "embedded".
        data: a folder of tasks, as ``hyperformer-fast train`` takes it; None for the built-in tasks.
        rows: how many, from the split that results are reported on.
    """
    model: Any
    if t5 == EMBEDDED:
        model, tokenizer = load_tiny()
    else:
        model = T5ForConditionalGeneration.from_pretrained(t5, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(t5, local_files_only=True)
    names = available_tasks(data)
    found = load_tasks(data, names, console=Console(quiet=True))
    each = -(-rows // len(names))
    chosen = {name: found[name].splits[found[name].report_split].select(range(each)) for name in names}
    tasks = [names[row % len(names)] for row in range(rows)]
    texts = ([chosen[task][row // len(names)][column] for row, task in enumerate(tasks)] for column in _TEXTS)
    read, written = (tokenizer(each, padding=True, return_tensors="pt") for each in texts)
    labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, -100)
    inputs = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}
    return Case(model, inputs, tasks, tokenizer)


def adapted(t5: nn.Module, case: Case) -> HyperFormerModel:
    """A model of the case's tasks whose adapters do something: the same ones in whatever form the T5 is."""
    torch.manual_seed(1)
    config = HyperFormerConfig(tasks=list(dict.fromkeys(case.tasks)), reduction_factor=8, zero_delta=False)
    return get_hyperformer_model(t5.eval(), config).eval()
