"""The T5s whose decoding is timed: bare, with our adapters, and with those of two other libraries."""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from step_cases import BARE_FUSED, BETWEEN, FUSED, ROWS, UNFUSED
from step_models import BARE, shared_copy
from torch import Tensor, nn

from hyperformer_fast import HyperFormerConfig, fuse_t5, get_hyperformer_model
from hyperformer_fast.backends import use_backend

Batch = dict[str, Tensor]
BARE_BETWEEN = "bare, fused, without products"
#: Each row of ours, and the row of the bare T5 in which the same pieces are fused.
SAME_FUSE = {UNFUSED: BARE, BETWEEN: BARE_BETWEEN, FUSED: BARE_FUSED}
LOOP = ", a call for each task"
#: The rank of LoRA, and the reduction factor of all bottleneck adapters.
RANK, REDUCTION = 8, 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to decode a batch in which each sample has a task.

    Args:
        generate: (batch, the samples' tasks, settings) -> what ``generate`` of transformers returns. The samples of a
            task come one after another.
        alone: (one sample, its task, decoder_input_ids) -> the logits that are expected, from a forward of this sample
            alone, without a cache and with nothing fused.
        loops: whether ``generate`` is called once for each task.
    """

    generate: Callable[[Batch, Sequence[str], dict[str, Any]], Any]
    alone: Callable[[Batch, str, Tensor], Tensor]
    loops: bool = False

    def __call__(self, batch: Batch, tasks: Sequence[str], settings: dict[str, Any]) -> list[Any]:
        """What the calls of ``generate`` returned: one for all samples, or one for those of each task."""
        if not self.loops:
            return [self.generate(batch, tasks, settings)]
        found = []
        for task in dict.fromkeys(tasks):
            rows = [row for row, name in enumerate(tasks) if name == task]
            samples = {name: each[rows] for name, each in batch.items()}
            found.append(self.generate(samples, [task] * len(rows), settings))
        return found


def logits_of(model: nn.Module, sample: Batch, ids: Tensor, **given: Any) -> Tensor:
    """The logits of one forward without a cache."""
    found: Tensor = model(**sample, decoder_input_ids=ids, use_cache=False, **given).logits
    return found


def bare_rows(t5: nn.Module) -> dict[str, Row]:
    """The T5 without adapters, fused in each of the ways in which ours is."""

    def alone(sample: Batch, task: str, ids: Tensor) -> Tensor:
        return logits_of(t5, sample, ids)

    def row(fuse: Any) -> Row:
        model: Any = fuse_t5(shared_copy(t5), fuse).eval() if fuse else t5
        return Row(lambda batch, tasks, settings: model.generate(**batch, **settings), alone)

    return {same: row(ROWS[name][1]) for name, same in SAME_FUSE.items()}


def own_models(t5: nn.Module, tasks: list[str]) -> dict[str, Any]:
    """Our model, fused in each of the ways that are compared; the adapters are the same in all."""
    config = HyperFormerConfig(tasks=tasks, reduction_factor=REDUCTION)
    models = {}
    for name in SAME_FUSE:
        torch.manual_seed(0)
        models[name] = get_hyperformer_model(shared_copy(t5), config, ROWS[name][1]).eval()
    return models


def own_rows(models: dict[str, Any]) -> dict[str, Row]:
    """Rows of :func:`own_models`, and a loop over the tasks with the fused model."""

    def alone(sample: Batch, task: str, ids: Tensor) -> Tensor:
        with use_backend("reference"):
            return logits_of(models[UNFUSED], sample, ids, task=task)

    def row(model: Any) -> Row:
        return Row(lambda batch, tasks, settings: model.generate(**batch, task=tasks, **settings), alone)

    rows = {name: row(model) for name, model in models.items()}
    rows[FUSED + LOOP] = dataclasses.replace(rows[FUSED], loops=True)
    return rows


def lora_rows(t5: nn.Module, tasks: list[str]) -> dict[str, Row]:
    """PEFT's LoRA on q and v, an adapter for each task, not merged into the T5's weights."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=RANK, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(shared_copy(t5), config, adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, config)
    model.eval()

    def mixed(batch: Batch, tasks: Sequence[str], settings: dict[str, Any]) -> Any:
        return model.generate(**batch, adapter_names=list(tasks), **settings)

    def single(batch: Batch, tasks: Sequence[str], settings: dict[str, Any]) -> Any:
        model.set_adapter(tasks[0])
        return model.generate(**batch, **settings)

    def alone(sample: Batch, task: str, ids: Tensor) -> Tensor:
        model.set_adapter(task)
        return logits_of(model, sample, ids)

    return {"PEFT LoRA, adapter_names": Row(mixed, alone), "PEFT LoRA" + LOOP: Row(single, alone, loops=True)}


def adapters_rows(t5: nn.Module, tasks: list[str]) -> dict[str, Row]:
    """Bottleneck adapters of the ``adapters`` library behind each feed-forward (its default places)."""
    adapters = importlib.import_module("adapters")
    composition = importlib.import_module("adapters.composition")
    model: Any = shared_copy(t5)
    adapters.init(model)
    torch.manual_seed(0)
    for task in tasks:
        model.add_adapter(task, config=adapters.SeqBnConfig(reduction_factor=REDUCTION))
    model.eval()

    def mixed(batch: Batch, tasks: Sequence[str], settings: dict[str, Any]) -> Any:
        runs = collections.Counter(tasks)
        with adapters.AdapterSetup(composition.BatchSplit(*runs, batch_sizes=list(runs.values()))):
            return model.generate(**batch, **settings)

    def single(batch: Batch, tasks: Sequence[str], settings: dict[str, Any]) -> Any:
        with adapters.AdapterSetup(tasks[0]):
            return model.generate(**batch, **settings)

    def alone(sample: Batch, task: str, ids: Tensor) -> Tensor:
        with adapters.AdapterSetup(task):
            return logits_of(model, sample, ids)

    return {"adapters, BatchSplit": Row(mixed, alone), "adapters" + LOOP: Row(single, alone, loops=True)}


#: The other libraries, by the names of their packages, and what makes their rows.
PEERS = {"peft": lora_rows, "adapters": adapters_rows}


def peer_rows(t5: nn.Module, tasks: list[str]) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows of the libraries that can be imported here, and why the others cannot be."""
    rows, absent = {}, {}
    for package, make in PEERS.items():
        try:
            importlib.import_module(package)
        except Exception as error:  # a version that does not go with the installed transformers fails in many ways
            absent[package] = str(error).strip().splitlines()[0]
        else:
            rows |= make(t5, tasks)
    return rows, absent


def versions() -> dict[str, str]:
    """The versions of what is compared; they depend on the environment."""
    found = {}
    for package in ("transformers", *PEERS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
