"""Any text is a name for a task: in the model, in its checkpoint, in the authors' names, in a state dict."""

from __future__ import annotations

import pytest
import torch
from support.t5s import batch, tiny_model, tiny_t5

from hyperformer_fast import HyperFormerConfig, HyperFormerModel, official
from hyperformer_fast.names import NamedParameters, attribute_of, name_of

ORDINARY = ["mnli", "a b", "a/b", "schön", "10", "task-1", "x%", "a\nb", "日本", "__x"]
ODD = ["training", "_keys", "keys", "forward", "_parameters", "a.b", ".", "..", "%", "%2E", "%a.b", "%training", "a%.b"]


def test_the_encoding_is_reversible_and_leaves_ordinary_names():
    names = ["", *ORDINARY, *ODD]
    assert [attribute_of(name) for name in ORDINARY] == ORDINARY
    assert [name_of(attribute_of(name)) for name in names] == names
    encoded = [attribute_of(name) for name in names]
    assert len(set(encoded)) == len(names) and not any("." in name for name in encoded)
    # what is encoded is a name like any other
    assert [name_of(name_of(attribute_of(attribute_of(name)))) for name in names] == names


def test_a_dictionary_of_parameters_under_any_name():
    made = NamedParameters({name: torch.full((1,), float(i)) for i, name in enumerate([*ORDINARY, *ODD])})
    assert set(made) == {*ORDINARY, *ODD} and made["training"].item() == len(ORDINARY)
    assert made.training is True and "forward" in made and "a.c" not in made
    del made["a.b"]
    assert "a.b" not in made and len(list(made.parameters())) == len(ORDINARY) + len(ODD) - 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_of_odd_names(shared, tmp_path):
    tasks = ODD[:6]
    mapping = {"task_to_embeddings": {task: ODD[-1 - i % 2] for i, task in enumerate(tasks)}} if shared else {}
    model = tiny_model(tasks=tasks, **mapping)
    model.add_task("new.one", "training")
    model.add_task("a/b")
    expected = model(**batch(), task=["training", "a.b", "new.one", "_keys"]).logits
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5())
    assert loaded.hyperformer_config.tasks == [*tasks, "new.one", "a/b"]
    assert torch.equal(loaded(**batch(), task=["training", "a.b", "new.one", "_keys"]).logits, expected)
    loaded.train(False)
    state = model.state_dict()
    assert loaded.load_state_dict(state).missing_keys == []
    exported = official.export(model)
    for name in model.task_embeddings.task_to_embeddings:
        assert f"task_embedding_controller.task_to_embeddings.{name}" in exported
    with torch.no_grad():
        for parameter in loaded.task_embeddings.parameters():
            parameter.zero_()
    official.load_state_dict(loaded, exported)
    assert torch.equal(loaded(**batch(), task=["training", "a.b", "new.one", "_keys"]).logits, expected)


def test_ordinary_names_are_those_of_before():
    model = tiny_model(tasks=ORDINARY)
    names = [name for name, _ in model.task_embeddings.named_parameters()]
    assert set(names) == {f"task_to_embeddings.{name}" for name in ORDINARY}


def test_what_is_no_text_is_refused():
    for tasks, error, message in (
        (["\udc80"], ValueError, "half of a surrogate pair"),
        ([""], TypeError, "non-empty"),
        ([None], TypeError, "non-empty string, got None"),
    ):
        with pytest.raises(error, match=message):
            HyperFormerConfig(tasks=tasks)
    with pytest.raises(ValueError, match="exists already"):
        tiny_model(tasks=["a.b"]).add_task("a.b")
