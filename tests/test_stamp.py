"""Whether parameters are what they were: what stamp.py notices of a change, apart from what a forward makes of it."""

from __future__ import annotations

import pytest
import torch
from support.t5s import VARIANTS, tiny_model, tiny_t5
from transformers.optimization import Adafactor

from hyperformer_fast.hypernetwork import AdapterSource
from hyperformer_fast.stamp import PROBES, Stamp


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()


def test_every_parameter_of_every_variant_is_watched():
    for variant in VARIANTS:
        model = tiny_model(variant).eval()
        parts = (model.task_embeddings, model.hypernetworks)
        for part in parts:
            for parameter in part.parameters():
                stamp = Stamp(parts)
                assert stamp.holds()
                parameter.data.view(-1)[0] += 1
                assert not stamp.holds()


def test_a_single_number_of_a_large_parameter_is_noticed(model):
    weight = model.hypernetworks["encoder"].generator.weight
    assert weight.numel() // PROBES > 1  # or the number below would be among those that are compared
    stamp = Stamp([model.hypernetworks])
    with torch.no_grad():
        weight.view(-1)[1] += 1
    assert not stamp.holds()


def test_all_numbers_of_a_small_parameter_are_compared(model):
    embedding = model.task_embeddings.task_to_embeddings["mnli"]
    assert embedding.numel() <= PROBES
    for place in range(embedding.numel()):
        stamp = Stamp([model.task_embeddings])
        embedding.data[place] += 1
        assert not stamp.holds()


def test_the_classes_of_all_parts_are_known():
    for variant in VARIANTS:
        model = tiny_model(variant, train_task_embeddings=variant != "adapters")
        assert all(isinstance(net, AdapterSource) for net in model.hypernetworks.values())
        Stamp([model.task_embeddings, model.hypernetworks])


class PastVersions(torch.optim.Optimizer):
    """An optimizer whose kernel writes past autograd, as those of other libraries do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1)


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.5, foreach=False),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, lr=0.5, foreach=True),
    "SGD fused": lambda ps: torch.optim.SGD(ps, lr=0.5, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.5),
    "Adam fused": lambda ps: torch.optim.Adam(ps, lr=0.5, fused=True),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=0.5, foreach=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=0.5, fused=True),
    "Adagrad fused": lambda ps: torch.optim.Adagrad(ps, lr=0.5, fused=True),
    "Adafactor of transformers": lambda ps: Adafactor(ps, lr=0.5, relative_step=False),
    "past the versions": PastVersions,
}


@pytest.fixture
def uncompared():
    """A module whose weight's numbers no stamp compares, as those of every parameter on a GPU."""
    linear = torch.nn.Linear(6, 8)
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t())
    linear.weight.grad = torch.ones_like(linear.weight)
    return linear


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizers_step_is_noticed(uncompared, make):
    """PyTorch's fused optimizers do not count the versions of what they write."""
    stamp, before = Stamp([uncompared]), uncompared.weight.detach().clone()
    optimizer = make([uncompared.weight])
    assert stamp.holds()
    optimizer.step()
    assert not torch.equal(uncompared.weight, before) and not stamp.holds()
    again = Stamp([uncompared])
    assert again.holds()
    torch._dynamo.reset()
    torch.compile(optimizer.step, backend="eager")()
    assert not again.holds()
    torch._dynamo.reset()


def test_a_scaled_step_is_noticed(uncompared):
    optimizer, scaler = torch.optim.AdamW([uncompared.weight], fused=True), torch.amp.GradScaler("cpu")
    stamp = Stamp([uncompared])
    scaler.scale(uncompared(torch.ones(6)).sum()).backward()
    scaler.step(optimizer)
    assert not stamp.holds()


def test_the_steps_of_other_modules_are_no_change(uncompared):
    stamp, other = Stamp([uncompared]), torch.nn.Linear(6, 8)
    other(torch.ones(6)).sum().backward()
    torch.optim.AdamW(other.parameters(), fused=True).step()
    assert stamp.holds()
