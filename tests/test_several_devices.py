"""What autograd's own threads see, and a T5 that is spread over several GPUs. Neither needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from support.t5s import batch, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperformer_fast import task_choice
from hyperformer_fast.layout import AdapterLayout
from hyperformer_fast.sites import StackWeights

#: The engine runs a backward that is nested this deep on a thread of its own, as it does every backward on a GPU.
_ON_ANOTHER_THREAD = """
import os, threading, torch
from hyperformer_fast import backends
class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        if not ctx.depth:
            print(threading.get_ident() != main, backends.current_backend(), flush=True)
        else:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return g, None
main = threading.get_ident()
with backends.use_backend("reference"):
    Nested.apply(torch.ones(1, requires_grad=True), 80).sum().backward()
print(backends.current_backend(), flush=True)
os._exit(0)
"""


def test_use_backend_holds_on_autograds_threads():
    found = subprocess.run([sys.executable, "-c", _ON_ANOTHER_THREAD], capture_output=True, text=True, env=os.environ)
    assert found.stdout.split() == ["True", "reference", "auto"], found.stderr


def test_weights_follow_a_stack_over_devices():
    layout = AdapterLayout(16, 4)
    net = types.SimpleNamespace(layout=layout, num_layers=1)
    with FakeTensorMode():
        packed = torch.empty(2, 3, layout.numel, device="cpu", requires_grad=True)
        index = torch.empty(5, dtype=torch.long, device="cpu")
        weights = StackWeights(net, packed, "gelu_new")
        x = torch.empty(5, 7, 16, device="cpu", requires_grad=True)
        first = weights.adapt(x, 0, index)
        second = weights.adapt(first.to("meta"), 1, index)
        assert (first.device, second.device) == (torch.device("cpu"), torch.device("meta"))
        assert weights.first_not_run() is None
        dx, dpacked = torch.autograd.grad(second.sum(), (x, packed))
        assert dx.device == dpacked.device == torch.device("cpu") and dpacked.shape == packed.shape
        # A task index of the first device is copied to the second once, not at every site.
        moved = weights._moved[torch.device("meta")][1]
        weights.adapt(second, 0, index)
        assert weights._moved[torch.device("meta")][1] is moved and moved.device == torch.device("meta")


def test_names_become_numbers_on_the_device_once(monkeypatch):
    numbers = task_choice._Numbers()
    monkeypatch.setattr(task_choice, "_numbers", numbers)
    model = tiny_model(tasks=["a", "b", "c"])
    made = []
    real = task_choice._Numbers._make
    monkeypatch.setattr(numbers, "_make", lambda *arguments: made.append(arguments) or real(*arguments))
    task = ["b", "a", "a", "c"]
    first = model(**batch(), task=task).logits
    assert torch.equal(model(**batch(), task=task).logits, first) and len(made) == 1
    assert not torch.equal(model(**batch(), task=["a", "b", "a", "c"]).logits, first) and len(made) == 2


def test_numbers_made_in_inference_mode_serve_a_training_step(monkeypatch):
    monkeypatch.setattr(task_choice, "_numbers", task_choice._Numbers())
    model = tiny_model(tasks=["a", "b", "c"])
    task = ["b", "a", "a", "c"]
    with torch.inference_mode():
        expected = model(**batch(), task=task).loss
    loss = model(**batch(), task=task).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.task_embeddings.parameters())


def test_old_numbers_are_forgotten_but_not_those_of_a_graph(monkeypatch):
    numbers = task_choice._Numbers()
    monkeypatch.setattr(task_choice, "_KEPT", 2)
    cuda = torch.device("cuda")
    monkeypatch.setattr(numbers, "_make", lambda device, values: (torch.tensor(values), torch.tensor(values)))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    kept = numbers.on(cuda, [1, 2])
    stream.cuda_stream = 1
    assert numbers.on(cuda, [1, 2]) is not kept  # nothing orders another stream behind the first one's copy
    stream.cuda_stream = 0
    numbers._made.popitem()
    stream.cuda_stream = 2  # a capture's own
    capturing = True
    assert numbers.on(cuda, [1, 2]) is kept
    with pytest.raises(RuntimeError, match="run the model with it once before the capture"):
        numbers.on(cuda, [3])
    capturing = False
    stream.cuda_stream = 0
    for i in range(5):
        numbers.on(cuda, [i])
    assert len(numbers._made) == 2 and any(entry[1] is kept for entry in numbers._captured)


def test_numbers_of_fake_tensors_are_not_kept(monkeypatch):
    numbers = task_choice._Numbers()
    with FakeTensorMode():
        numbers.on(torch.device("cpu"), [0, 1])
    assert not numbers._made


@pytest.mark.parametrize("train_task_embeddings", [True, False])
def test_autocast_does_not_reach_the_task_embeddings(train_task_embeddings):
    model = tiny_model(tasks=["a", "b"], train_task_embeddings=train_task_embeddings).float()
    expected = model.task_embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.task_embeddings()
    assert found.dtype == torch.float32 and torch.equal(found, expected)
