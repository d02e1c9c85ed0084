"""A stack's adapters together, with the Triton kernels: one launch finishes the gradients of all sites."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from support.watch import watch
from test_stack import *  # noqa: F403
from test_stack import SITES, Case, chain, loss_of
from test_stack import test_compiled_autograd as plain_test_of_compiled_autograd
from triton.runtime import interpreter

from hyperformer_fast.kernels import stack


@pytest.fixture(autouse=True)
def _one_launch_at_a_time(monkeypatch):
    """The interpreter changes Triton's language while a kernel runs."""
    run, lock = interpreter.InterpretedFunction.run, threading.RLock()

    def locked(self, *args, **kwargs):
        with lock:
            return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", locked)


def test_compiled_autograd():
    """With one task: Dynamo traces Triton's interpreter, too, and fails in it where tasks are read."""
    plain_test_of_compiled_autograd(Case(mixed=False))


@pytest.mark.parametrize("mixed", [False, True])
def test_launches_of_a_step(mixed):
    """Everything that can be done once for all sites is."""
    case = Case(mixed)
    whole, x = case.leaves()
    with watch() as seen:
        torch.autograd.grad(loss_of(chain(case.together(whole), x)), (whole, x))
    counts = Counter(launch.kernel.removesuffix("_kernel") for launch in seen.launches)
    counts.pop("_products", None)  # the check of the interpreter, at the first launch of a process
    expected = {"gram": 1, "fold": 1, "adapter_forward": SITES, "rows": SITES, "weights": SITES, "finish": 1}
    assert counts == expected | ({"schedule": 1} if mixed else {})


def test_partial_sums_that_take_too_much_memory(monkeypatch):
    monkeypatch.setattr(stack, "MOST_PART_BYTES", 0)
    for mixed in (False, True):
        Case(mixed).both(lambda adapt, *leaves: torch.autograd.grad(loss_of(chain(adapt, leaves[1])), leaves))
