"""Whether parameters are what they were: what stamp.py notices of a change, apart from what a forward makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.t5s import VARIANTS, tiny_model, tiny_t5
from torch.optim.adamw import adamw
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


@pytest.mark.parametrize("shape", [(512, 64), (96, 128), (640, 24), (2, 256, 48)])
def test_each_column_of_a_large_parameter_is_compared(shape):
    """Also where a 64th of the parameter is a whole number of rows."""
    linear = torch.nn.Linear(1, 1)
    linear.weight = torch.nn.Parameter(torch.randn(shape))
    assert linear.weight.numel() > 4 * PROBES
    columns = min(shape[-1], PROBES)
    for column in range(0, shape[-1], -(-shape[-1] // columns)):
        stamp = Stamp([linear])
        linear.weight.data[..., column : column + shape[-1] // columns] += 1
        assert not stamp.holds(), column


def fused_by_hand(weight):
    zero = torch.zeros_like
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
    adamw([weight], [zero(weight) + 1], [zero(weight)], [zero(weight)], [], [torch.zeros(())],
          fused=True, amsgrad=False, **options)  # fmt: skip


def restoring_the_version(weight):
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight.add_(1)


#: Writes that leave a parameter's version as it is.
PAST_VERSIONS = {
    "within data": lambda weight: weight.data.add_(1),
    "foreach within data": lambda weight: torch._foreach_add_([weight.data], 1),
    "a master copy": lambda weight: weight.data.copy_(weight.detach().double() + 1),
    "NumPy": lambda weight: np.add(weight.detach().numpy(), 1, out=weight.detach().numpy()),
    "DLPack": lambda weight: torch.from_dlpack(weight.detach()).add_(1),
    "the storage": lambda weight: weight.untyped_storage().fill_(1),
    "fused by hand": fused_by_hand,
    "restoring the version": restoring_the_version,
}


@pytest.mark.parametrize("write", PAST_VERSIONS.values(), ids=PAST_VERSIONS)
def test_writes_past_the_versions_are_noticed_on_a_cpu(write):
    linear = torch.nn.Linear(64, 80)
    stamp, before = Stamp([linear]), linear.weight.detach().clone()
    with torch.no_grad():
        write(linear.weight)
    assert not torch.equal(linear.weight, before) and not stamp.holds()


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


@pytest.mark.parametrize("alias", ["a flat tensor", "a twin"])
def test_the_step_of_an_optimizer_that_has_the_memory_is_noticed(uncompared, alias):
    """Parameters may be parts of one flat tensor, which the optimizer has in their place."""
    flat = torch.cat([uncompared.weight.detach().t().reshape(-1), torch.zeros(8)])
    uncompared.weight = torch.nn.Parameter(flat[:48].view(6, 8).t())
    had = torch.nn.Parameter(flat if alias == "a flat tensor" else uncompared.weight.detach())
    had.grad = torch.ones_like(had)
    optimizer = torch.optim.AdamW([had], lr=0.5, fused=True)
    stamp, before = Stamp([uncompared]), uncompared.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(uncompared.weight, before) and not stamp.holds()


def test_the_steps_of_other_modules_are_no_change(uncompared):
    stamp, other = Stamp([uncompared]), torch.nn.Linear(6, 8)
    other(torch.ones(6)).sum().backward()
    torch.optim.AdamW(other.parameters(), fused=True).step()
    assert stamp.holds()
