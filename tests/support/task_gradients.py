"""Gradients of single tasks as vectors, and PCGrad as it is printed."""

from __future__ import annotations

import torch

#: The tasks of a batch's samples.
MIXED = ["mnli", "cola", "mnli", "stsb"]


def loss_of(model, inputs, tasks, only=None, wants=None):
    """The loss of a batch, in which tasks have the factors ``wants``; with ``only`` this task's part of it."""
    factors = [(wants or {}).get(task, 1.0) * (only in (None, task)) for task in tasks]
    logits, labels = model(**inputs, task=tasks).logits, inputs["labels"]
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").mean(1)
    return losses @ torch.tensor(factors, dtype=losses.dtype)


def behind_adapters(model):
    """The parameters behind the adapters' weights, by name."""
    return {n: p for n, p in model.named_parameters() if n.startswith(("hypernetworks", "task_embeddings"))}


def gradients(model, loss):
    """The gradient of each trained parameter, by name; zeros where there is none."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


def task_by_task(model, inputs, tasks, wants=None):
    """The gradient of each task of the batch, by a backward for each, in the order in which the tasks come."""
    return {task: gradients(model, loss_of(model, inputs, tasks, task, wants)) for task in dict.fromkeys(tasks)}


def on_generators(found):
    """The part of a gradient that norms and cosines are of, as one vector."""
    return torch.cat([g.flatten() for name, g in sorted(found.items()) if ".generator." in name])


def on_tables(found):
    """The gradient of learned adapters as one vector."""
    return torch.cat([g.flatten() for name, g in sorted(found.items()) if name.startswith("hypernetworks")])


def stated_pcgrad(vectors, orders):
    """Algorithm 1 of Yu et al. 2020, as it is printed. ``orders``: for each task, the others in order."""
    projected = []
    for vector, order in zip(vectors, orders, strict=True):
        vector = vector.clone()
        for other in order:
            dot = vector @ vectors[other]
            if dot < 0:
                vector -= dot / (vectors[other] @ vectors[other]) * vectors[other]
        projected.append(vector)
    return sum(projected)
