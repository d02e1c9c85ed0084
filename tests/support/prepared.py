"""What the tests of weights that are kept in evaluation share (tests/test_prepared*.py, tests/test_stamp.py)."""

from __future__ import annotations

import torch

from hyperformer_fast.backends import serving
from hyperformer_fast.hypernetwork import HyperNetwork
from support.t5s import batch

MIXED = ["mnli", "cola", "mnli", "stsb"]


def count_generated(monkeypatch):
    """Return a list to which each stack whose weights are generated adds the name of the method."""
    counted = []

    def count(name):
        real = getattr(HyperNetwork, name)

        def counting(net, embeddings):
            counted.append(name)
            return real(net, embeddings)

        monkeypatch.setattr(HyperNetwork, name, counting)

    for name in ("forward", "forward_each"):
        count(name)
    return counted


def count_ops(monkeypatch):
    """Return the numbers of calls, from now on, of the ops that make adapters' weights, by their names."""
    counts = dict.fromkeys(("generate_weights", "fold"), 0)

    def count(op):
        backend = serving(op, "cpu", torch.float32)
        real = getattr(backend, op)

        def counting(*args):
            counts[op] += 1
            return real(*args)

        monkeypatch.setattr(backend, op, counting)

    for op in counts:
        count(op)
    return counts


@torch.no_grad()
def logits(model, task="stsb", **inputs):
    return model(**(inputs or batch()), task=task).logits


def truth(model, task="stsb"):
    """What the model answers where it keeps nothing."""
    with torch.enable_grad():
        return model(**batch(), task=task).logits.detach()


def prepared_bytes(model):
    return model.memory_footprint().prepared


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def add_one(parameter):
    return parameter.detach() + 1


def assigned(model):
    parameter = model.hypernetworks["decoder"].generator.weight
    parameter.data = add_one(parameter)


def within_data(model):
    for parameter in model.hypernetworks.parameters():
        parameter.data.mul_(2)
