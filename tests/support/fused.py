"""T5s with fused twins, for the tests of the fusion."""

from __future__ import annotations

import copy

import torch

from hyperformer_fast import explain_fusion, fuse_t5, ops
from support.t5s import tiny_t5


def tiny(**changes):
    return tiny_t5(dtype=torch.float32, **changes)


def pair(**changes):
    """A T5 and its fused twin."""
    plain = tiny(**changes)
    return plain, fuse_t5(copy.deepcopy(plain))


def classes(t5):
    return [type(module) for module in t5.modules()]


def reasons(t5):
    return {(report.name, report.piece): report.reason for report in explain_fusion(t5)}


def count_norms(monkeypatch):
    """Return a list that grows with each norm that is computed by itself."""
    calls = []
    plain = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda *args: calls.append(args) or plain(*args))
    return calls
