"""Weights that are kept between forwards in evaluation are never stale: every change of what they are made of is
noticed."""

from __future__ import annotations

import pytest
import torch
from support.prepared import (
    MIXED,
    add_one,
    assigned,
    close,
    count_generated,
    logits,
    prepared_bytes,
    truth,
    within_data,
)
from support.t5s import TASKS, batch, tiny_model, tiny_t5
from torch.func import functional_call

from hyperformer_fast.hypernetwork import HyperNetwork


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()


@pytest.fixture
def generated(monkeypatch):
    """Counts the stacks whose weights were generated."""
    return count_generated(monkeypatch)


def step_of(optimizer):
    def step(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer(trained).step()

    return step


def fused_step_of_uncompared_numbers(model):
    """As on a GPU, where no numbers are compared, and fused optimizers do not count versions."""
    weight = model.hypernetworks["encoder"].generator.weight
    weight.data = weight.data.mT.contiguous().mT
    logits(model)
    assert prepared_bytes(model) > 0
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()


def assigned_twice(model):
    """The allocator may give the third tensor the first one's address."""
    parameter = model.hypernetworks["decoder"].generator.weight
    old = parameter.detach().clone()
    parameter.data = torch.zeros(3)
    parameter.data = old + 1


def through_numpy(model):
    model.hypernetworks["encoder"].generator.weight.detach().numpy()[:] *= 2


def in_place(model):
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["stsb"][3].add_(1)


def replaced_parameter(model):
    generator = model.hypernetworks["encoder"].generator
    generator.weight = torch.nn.Parameter(add_one(generator.weight))


def replaced_module(model):
    net = model.hypernetworks["decoder"]
    net.projector = type(net.projector)(18, 8, 6)


def replaced_net(model):
    torch.manual_seed(5)
    net = model.hypernetworks["encoder"]
    model.hypernetworks["encoder"] = HyperNetwork(net.config, net.layout.d, net.num_layers).eval()
    torch.nn.init.normal_(model.hypernetworks["encoder"].generator.weight)


def loaded(model, **options):
    state = {name: value + 1 if name.startswith("hyper") else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, **options)


def moved_and_back(model):
    model.to(torch.float64)
    in_place(model)
    model.to(torch.float32)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        within_data(model)
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def activation(model):
    model.hyperformer_config.non_linearity = "relu"


def shared_embedding(model):
    config = model.hyperformer_config
    config.task_to_embeddings = {**{task: task for task in TASKS}, "stsb": "mnli"}


def set_storage(model):
    parameter = model.hypernetworks["decoder"].generator.weight
    with torch.no_grad():
        parameter.set_(add_one(parameter))


CHANGES = [
    step_of(lambda ps: torch.optim.SGD(ps, lr=0.5, foreach=False)),
    step_of(lambda ps: torch.optim.AdamW(ps, lr=0.5, foreach=True)),
    step_of(lambda ps: torch.optim.AdamW(ps, lr=0.5, fused=True)),
    fused_step_of_uncompared_numbers,
    assigned,
    assigned_twice,
    within_data,
    through_numpy,
    in_place,
    replaced_parameter,
    replaced_module,
    replaced_net,
    loaded,
    lambda model: loaded(model, assign=True),
    moved_and_back,
    swapped,
    activation,
    shared_embedding,
    set_storage,
]
NAMES = ["SGD", "AdamW foreach", "AdamW fused", *(change.__name__ for change in CHANGES[3:13]), "loaded by assignment"]
NAMES += [change.__name__ for change in CHANGES[14:]]


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_a_change_is_noticed(model, change):
    before = logits(model)
    assert prepared_bytes(model) > 0
    change(model)
    after = logits(model)
    assert not torch.allclose(after, before)
    close(after, truth(model))
    assert torch.equal(logits(model), after)


def test_another_order_of_the_tasks_is_noticed(model):
    before = logits(model, "mnli")
    model.prepare()
    model.hyperformer_config.tasks[:] = ["stsb", "mnli", "cola"]
    with torch.no_grad():
        close(model(**batch(), task_index=torch.tensor([1] * 4)).logits, before)
    close(logits(model, "mnli"), before)


def test_a_new_task_is_noticed(model):
    logits(model, MIXED)
    model.add_task("new", init_from="mnli")
    with torch.no_grad():
        model.task_embeddings.task_to_embeddings["new"].add_(1)
    for task in ("new", ["new", *MIXED[1:]]):
        close(logits(model, task), truth(model, task))


def test_a_change_within_inference_mode_is_noticed(model):
    before = logits(model)
    with torch.inference_mode():
        for parameter in model.hypernetworks.parameters():
            parameter.add_(1)
        after = model(**batch(), task="stsb").logits
    assert not torch.allclose(after, before)
    close(after.clone(), truth(model))


def test_parameters_made_in_inference_mode_are_not_relied_on(generated):
    with torch.inference_mode():
        model = tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()
        model(**batch(), task="stsb")
        generated.clear()
        model(**batch(), task="stsb")
        assert len(generated) == 2 and prepared_bytes(model) == 0
        with pytest.raises(RuntimeError, match="made in inference mode"):
            model.prepare()


def test_parameters_that_a_call_brings_along(model):
    inputs = {**batch(), "task": "stsb"}
    before = logits(model)
    others = {name: p + 1 for name, p in model.named_parameters() if name.startswith("hypernetworks")}
    with torch.no_grad():
        with_others = functional_call(model, others, (), inputs).logits
    assert not torch.allclose(with_others, before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("interferes", ["hook", "pre-hook", "forward", "class", "parametrisation"])
def test_somebody_elses_code_in_a_hypernetwork_runs_every_time(model, generated, interferes):
    net = model.hypernetworks["decoder"]
    logits(model)
    if interferes == "hook":
        net.projector.register_forward_hook(lambda module, args, out: out + 1)
    elif interferes == "pre-hook":
        net.register_forward_pre_hook(lambda module, args: None)
    elif interferes == "forward":
        net.projector.forward = lambda x: type(net.projector).forward(net.projector, x) + 1
    elif interferes == "class":
        net.generator.__class__ = type("Other", (type(net.generator),), {})
    else:
        torch.nn.utils.parametrizations.weight_norm(net.projector[0])
    generated.clear()
    for _ in range(2):
        close(logits(model), truth(model))
    assert len(generated) == 8
    with pytest.raises(RuntimeError, match=r"cannot keep .* up to date: (somebody's hook|\w+ is not a class)"):
        model.prepare()


def test_transforms_and_modes_generate_anew(model, generated):
    logits(model)
    generated.clear()
    inputs = {**batch(), "task": "stsb"}
    trained = dict(model.hypernetworks.named_parameters())

    def loss(parameters):
        named = {f"hypernetworks.{name}": p for name, p in parameters.items()}
        return functional_call(model, named, (), inputs).loss

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    assert len(generated) == 2 and all(g.abs().sum() > 0 for g in gradients.values())
