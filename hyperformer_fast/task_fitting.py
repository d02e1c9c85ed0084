"""A new task from a few rows: which trained task is nearest to it, and an embedding that is learned for it alone.

The T5 and the hypernetworks stay as they are. What is learned is a tensor beside the model, which enters forwards in
the place of a task's embedding (``NewTask``) and is inserted once it is done. So no flag of a parameter is touched, no
gradient reaches one, and other threads may use the model meanwhile. Dropout is off, and nothing is drawn from PyTorch's
generators.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .extras import require
from .task_changes import expect_changeable, insert
from .task_choice import NewTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import TaskSpec
    from .model import HyperFormerModel

#: Rows by which the nearest task is found where a task is fitted. More would take longer than the fit.
_NEAREST_ROWS = 32

#: The name that rows without a task of their own have meanwhile.
_UNNAMED = "rows"


class NearTask(NamedTuple):
    """A trained task, and the loss that it has on rows of another one."""

    task: str
    loss: float  #: the mean over the targets' tokens


class FittedTask(NamedTuple):
    """What :func:`fit_task` did."""

    name: str
    init_from: str | list[str] | None  #: the task whose embedding it started from
    losses: list[float]  #: of each step, before it
    seconds: float


def fit_task(
    model: HyperFormerModel,
    name: str,
    rows: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: TaskSpec | Mapping[str, Any] | str | None = None,
    steps: int = 100,
    learning_rate: float = 0.2,
    batch_size: int = 32,
    init_from: str | list[str] | None = "nearest",
    max_source_length: int | None = 128,
    seed: int = 0,
) -> FittedTask:
    """Add a task whose embedding is learned from a few rows, by Adam with a rate that falls to zero.

    Nothing but the new embedding (64 numbers by default) is learned; every other parameter keeps its bits and its
    ``requires_grad``. The result depends on no random number but those of ``seed``, and dropout is off. A model in
    training mode is in evaluation mode meanwhile. On any error the model is as it was.

    Args:
        model: a model with trained hypernetworks.
        name: the new task's name.
        rows: labelled rows: a list of mappings, a ``datasets.Dataset`` or the path of a file, with the columns that the
            task's entry names; or rows with ``input_ids`` and ``labels``, as :func:`hyperformer_fast.data.encode`
            returns them.
        tokenizer: the T5's tokenizer; not needed for rows with ``input_ids``.
        task: the task's entry: a ``TaskSpec``, its fields, or the name of a built-in, official or registered task.
            None: the one that ``name`` stands for, or what the rows alone tell.
        steps: steps of the optimizer, at least 1.
        learning_rate: the first step's rate.
        batch_size: rows of a step. Where there are no more rows than that, every step takes all of them.
        init_from: the trained task whose embedding the new one starts from, a list of tasks to take the mean of, None
            for a standard normal draw, or ``"nearest"`` for the one with the least loss on the first 32 rows.
        max_source_length: longest source, in tokens; longer ones are truncated. None for no limit.
        seed: of the batches, and of a draw.

    Returns:
        What it started from, the losses of the steps, and the seconds that it took.

    Raises:
        ValueError: the name is taken, the variant has no task embeddings, an argument is out of range, or the loss is
            not finite.
        DataError: (a ValueError) a row does not fit the task.
        RuntimeError: the hypernetworks are spread over processes or offloaded.
        TypeError: the T5 has no head that writes text.
    """
    started = time.perf_counter()
    _expect_writes_text(model)
    expect_changeable(model)
    config = model.hyperformer_config
    if not config.has_hypernetworks:
        raise ValueError(
            f"fit_task learns a task embedding, which variant {config.variant!r} does not have: add_task() and train "
            "the task's own weights"
        )
    config.with_task(name)  # which raises where the name is taken
    for argument, value in (("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be a whole number from 1, got {value!r}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate!r}")
    encoded = encoded_rows(rows, name if task is None else task, tokenizer, max_source_length)
    if init_from == "nearest" and "nearest" not in config.tasks:
        init_from = config.tasks[0]
        if len(config.tasks) > 1:
            init_from = nearest_task(model, encoded[:_NEAREST_ROWS], batch_size=batch_size)[0].task
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), in_evaluation(model):
        embedding, dtype = _start(model, init_from, generator)
        optimizer = torch.optim.Adam([embedding], lr=learning_rate)
        losses = []
        for step, chosen in zip(range(steps), _batches(len(encoded), batch_size, generator)):
            batch = padded([encoded[i] for i in chosen], model)
            with torch.enable_grad():
                loss = model(**batch, task=NewTask(embedding.to(dtype)), output_logits=False).loss
            if not loss.isfinite():
                raise ValueError(f"the loss is {loss.item()} at step {step + 1}: lower learning_rate={learning_rate}")
            # asked for by name, so that no other parameter gets a gradient
            (embedding.grad,) = torch.autograd.grad(loss, [embedding])
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.step()
            losses.append(loss.item())
    insert(model, name, {"task_embedding": embedding.detach()})
    return FittedTask(name, init_from, losses, time.perf_counter() - started)


@torch.no_grad()
def nearest_task(
    model: HyperFormerModel,
    rows: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: TaskSpec | Mapping[str, Any] | str | None = None,
    tasks: Sequence[str] | None = None,
    batch_size: int = 32,
    max_source_length: int | None = 128,
) -> list[NearTask]:
    """The model's tasks by their loss on some labelled rows, best first.

    Every row is read with the weights of every task: batches hold whatever rows and tasks are next. A model in training
    mode is in evaluation mode meanwhile.

    Args:
        model: the model.
        rows, tokenizer, task, max_source_length: as for :func:`fit_task`; ``task`` None: what the rows alone tell.
        tasks: the tasks to try; None for all.
        batch_size: rows of a forward, where a row counts once for each task.

    Raises:
        ValueError: an unknown task, or an argument is out of range.
        DataError: (a ValueError) a row does not fit the task.
        TypeError: the T5 has no head that writes text.
    """
    _expect_writes_text(model)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number from 1, got {batch_size!r}")
    names = list(model.hyperformer_config.tasks if tasks is None else dict.fromkeys(tasks))
    if not names:
        raise ValueError("tasks must name at least one task, got none")
    model.hyperformer_config.task_ids(names)
    encoded = encoded_rows(rows, _UNNAMED if task is None else task, tokenizer, max_source_length)
    # Rows of similar length need little padding.
    encoded = sorted(encoded, key=lambda row: (len(row["input_ids"]), len(row["labels"])))
    pairs = [(row, name) for row in encoded for name in names]
    total = dict.fromkeys(names, 0.0)
    with in_evaluation(model):
        for first in range(0, len(pairs), batch_size):
            part = pairs[first : first + batch_size]
            batch = padded([row for row, _ in part], model)
            logits = model(**batch, task=[name for _, name in part]).logits
            losses = ops.cross_entropy_rows(logits.flatten(0, 1), batch["labels"].flatten()).view(len(part), -1)
            for (_, name), loss in zip(part, losses.sum(1, dtype=torch.float64).tolist(), strict=True):
                total[name] += loss
    tokens = sum(sum(label != -100 for label in row["labels"]) for row in encoded)
    return sorted((NearTask(name, loss / tokens) for name, loss in total.items()), key=lambda each: each.loss)


def encoded_rows(
    rows: Any,
    task: TaskSpec | Mapping[str, Any] | str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_source_length: int | None,
) -> list[dict[str, Any]]:
    """Rows as tokens: a list of rows with ``input_ids`` and ``labels``. Errors and arguments are those of
    :func:`fit_task`."""
    if not isinstance(rows, (str, os.PathLike)) and not hasattr(rows, "column_names"):
        rows = list(rows)
    if not isinstance(rows, (str, os.PathLike)):
        if not len(rows):
            raise ValueError("there are no rows to learn a task from")
        if {"input_ids", "labels"} <= set(rows[0]):
            return [_tokens(row, i) for i, row in enumerate(rows, 1)]
    if tokenizer is None:
        raise ValueError("rows of texts need the T5's tokenizer: give tokenizer=, or rows with input_ids and labels")
    require("learning a task from rows", "datasets")
    from .data import TaskData, encode
    from .data.examples import make_examples
    from .data.formats import rows_of_file
    from .data.infer import spec_of_rows
    from .data.registry import find_task
    from .data.task_fields import spec_of

    if isinstance(task, Mapping):
        name = str(task.get("name", _UNNAMED))
        fields = {field: value for field, value in task.items() if field != "name"}
        task = spec_of(name, fields, "fit_task", find_task(name))
    if isinstance(rows, (str, os.PathLike)):
        from pathlib import Path

        found = rows_of_file(Path(rows))
        spec = spec_of_rows(task, found) if isinstance(task, str) else task
        made = make_examples(spec, found, None).dataset
        assert made is not None  # only the labels of a Dataset may be absent
        data = TaskData(spec, {"train": made})
    else:
        data = TaskData.from_dataset(task, train=rows)
    tokens = encode(data, "train", tokenizer, max_source_length)
    return [_tokens(row, i) for i, row in enumerate(tokens, 1)]


def _tokens(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    found = {}
    for name in ("input_ids", "attention_mask", "labels"):
        if name in row:
            values = row[name]
            found[name] = values.tolist() if hasattr(values, "tolist") else list(values)
    if not found.get("input_ids") or not any(label != -100 for label in found.get("labels", ())):
        raise ValueError(f"row {number} must have input_ids and labels, each with a token at least")
    mask = found.setdefault("attention_mask", [1] * len(found["input_ids"]))
    if len(mask) != len(found["input_ids"]):
        raise ValueError(f"row {number} has {len(found['input_ids'])} input_ids, but an attention_mask of {len(mask)}")
    return found


def padded(rows: Sequence[Mapping[str, Any]], model: HyperFormerModel) -> dict[str, Tensor]:
    """A batch of rows with tokens, on the model's device."""
    pads = {"input_ids": model.config.pad_token_id or 0, "attention_mask": 0, "labels": -100}
    batch = {}
    for name, pad in pads.items():
        longest = max(len(row[name]) for row in rows)
        batch[name] = torch.tensor([row[name] + [pad] * (longest - len(row[name])) for row in rows])
    return {name: value.to(model.device) for name, value in batch.items()}


@contextlib.contextmanager
def in_evaluation(model: HyperFormerModel) -> Iterator[None]:
    """Have a model in evaluation mode within a ``with`` block, and each of its modules as it was afterwards.

    Raises:
        RuntimeError: another thread trains the model, or is in a forward of it when the mode is to change.
    """
    training = [module for module in model.modules() if module.training]
    if not training:
        yield
        return
    threads = model._threads
    with threads.alone("set this model to evaluation"):
        threads.expect_no_other_trains()  # whose dropout would be off from now on
        model.eval()
    try:
        yield
    finally:
        with threads.alone("set this model to training"):
            for module in training:
                module.training = True
            if model.training:
                model._prepared.clear()


@torch.no_grad()
def _start(
    model: HyperFormerModel, init_from: str | list[str] | None, generator: torch.Generator
) -> tuple[Tensor, torch.dtype]:
    """The embedding to start from, in float32 at least, and the dtype that embeddings have in the model."""
    embeddings: Any = model.task_embeddings
    config, own = model.hyperformer_config, embeddings.of_tasks()
    if init_from is None:
        like = next(iter(own.values()))
        found = torch.randn(like.shape, generator=generator).to(like.device)
    else:
        names = [init_from] if isinstance(init_from, str) else init_from
        if not names:
            raise ValueError("init_from must name at least one task, got []; None draws random numbers")
        config.task_ids(names)
        found = torch.stack([own[config.embedding_of(name)] for name in names]).mean(0)
    dtype = next(iter(own.values())).dtype
    return found.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_(), dtype


def _batches(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """The rows of each step, without end: all of them, or the next of a permutation of them."""
    waiting: list[int] = []
    while True:
        if rows <= size:
            yield list(range(rows))
            continue
        while len(waiting) < size:
            waiting += torch.randperm(rows, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _expect_writes_text(model: HyperFormerModel) -> None:
    if not hasattr(model._base, "lm_head"):
        raise TypeError(f"rows have targets to write, and {type(model._base).__name__} has no head that writes text")
