"""Parameters have one order, whatever came before: an optimizer's state is kept by index."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.old_files import as_version_0_1_0
from support.t5s import VARIANTS, batch, bits, tiny_config, tiny_model, tiny_t5

from hyperformer_fast import HyperFormerModel, get_hyperformer_model

PREFIX = {True: "task_embeddings.task_to_embeddings.", False: "hypernetworks.encoder.adapters."}


def embeddings(model) -> list[str]:
    """The tasks' embeddings (or their adapters, where these are learned) in the order of the parameters."""
    prefix = PREFIX[model.hyperformer_config.has_hypernetworks]
    return [name.removeprefix(prefix) for name, _ in model.named_parameters() if name.startswith(prefix)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_is_the_configurations_whatever_the_history(tmp_path, variant):
    model = tiny_model(variant, tasks=["stsb", "mnli"])
    for name in ("cola", "10", "boolq"):
        model.add_task(name)
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    fresh = get_hyperformer_model(tiny_t5(), model.hyperformer_config)
    assert embeddings(model) == ["stsb", "mnli", "cola", "10", "boolq"] == model.hyperformer_config.embedding_names
    names = [name for name, _ in model.named_parameters()]
    for other in (loaded, fresh):
        assert [name for name, _ in other.named_parameters()] == names
        assert list(other.state_dict()) == list(model.state_dict())


def test_shared_embeddings_come_in_the_order_of_their_first_task(tmp_path):
    shared = {"stsb": "z", "mnli": "a", "cola": "z"}
    model = tiny_model(tasks=list(shared), task_to_embeddings=shared)
    model.add_task("boolq", "cola")
    model.save_pretrained(tmp_path)
    assert embeddings(model) == ["z", "a", "boolq"]
    assert embeddings(HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())) == ["z", "a", "boolq"]


def test_an_optimizers_state_goes_on_after_add_task_and_a_reload(tmp_path):
    """Two steps, then a third in the same model, or in a reloaded one with the optimizer's saved state."""
    model = tiny_model(tasks=["stsb", "mnli"])
    model.add_task("cola", "mnli")

    def optimizer_of(model):
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(**batch(seed=seed), task=["cola", "stsb", "stsb", "cola"]).loss.backward()
        optimizer.step()

    optimizer = optimizer_of(model)
    for seed in (0, 1):
        step(model, optimizer, seed)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    step(model, optimizer, 2)
    step(again, resumed, 2)
    assert all(torch.equal(p, bits(again)[name]) for name, p in bits(model).items())


def test_a_model_without_a_reload_has_that_order_too():
    assert embeddings(get_hyperformer_model(tiny_t5(), tiny_config(tasks=["b", "c", "a"]))) == ["b", "c", "a"]


@pytest.mark.parametrize(("tasks", "warns"), [(["stsb", "mnli"], True), (["mnli", "stsb"], False)])
def test_an_old_optimizer_state_that_counts_in_another_order_is_named(tmp_path, tasks, warns):
    """As files of version 0.1.0 lie in a run's checkpoints: without a digest, beside an optimizer's state."""
    model = tiny_model(tasks=tasks)
    model.save_pretrained(tmp_path)
    as_version_0_1_0(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.load_weights(tmp_path)
        assert not said
        (tmp_path / "optimizer.pt").touch()
        model.load_weights(tmp_path)
    assert ["would give tasks each other's state" in str(w.message) for w in said] == [True] * warns
