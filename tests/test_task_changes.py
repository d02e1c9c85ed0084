"""Tasks that come and go while a model is in use: no other task's answer changes, and no old index is misread."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from datasets import Dataset
from support.prepared import logits, prepared_bytes
from support.runs import small_trainer
from support.t5s import TASKS, VARIANTS, batch, tiny_model, tiny_t5
from transformers import ByT5Tokenizer

from hyperformer_fast import HyperFormerModel, TaskGradients, task_changes
from hyperformer_fast.data import HyperFormerDataCollator
from hyperformer_fast.task_choice import TaskChoice, select
from hyperformer_fast.training.batches import task_of_rows


@pytest.fixture
def model():
    return tiny_model(t5=tiny_t5(dtype=torch.float32)).eval()


@torch.no_grad()
def by_index(model, *index):
    return model(**batch(), task_index=torch.tensor(index)).logits


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [*VARIANTS, "finetuning"])
def test_removal_changes_no_other_task(variant):
    model = tiny_model(variant, tiny_t5(dtype=torch.float32)).eval()
    before = {task: logits(model, task) for task in TASKS}
    mixed = logits(model, ["cola", "mnli", "mnli", "cola"])
    parameters = dict(model.named_parameters())
    model.remove_task("stsb")
    for task in ("mnli", "cola"):
        close(logits(model, task), before[task])
    close(logits(model, ["cola", "mnli", "mnli", "cola"]), mixed)
    now = dict(model.named_parameters())
    gone = parameters.keys() - now.keys()
    assert all(now[name] is parameters[name] for name in now) and all(name.endswith(".stsb") for name in gone)
    assert len(gone) == {"adapters": 2, "finetuning": 0}.get(variant, 1)
    with pytest.raises(ValueError, match="unknown task 'stsb'; this model has mnli, cola"):
        logits(model, "stsb")


@pytest.mark.parametrize("change", ["remove", "rename", "import"])
def test_weights_that_are_kept_are_made_anew(model, change, tmp_path):
    model.export_task("stsb", tmp_path / "task")
    model.prepare()
    before = {task: logits(model, task) for task in TASKS}
    if change == "remove":
        model.remove_task("mnli")
    elif change == "rename":
        model.rename_task("mnli", "new")
        close(logits(model, "new"), before["mnli"])
    else:
        model.import_task(tmp_path / "task", "new")
        close(logits(model, "new"), before["stsb"])
    for task in ("stsb", "cola"):
        close(logits(model, task), before[task])
        close(logits(model, [task] * 4), before[task])
    assert prepared_bytes(model) > 0


def test_an_index_that_stands_for_another_task_is_refused(model):
    of_mnli, of_cola = by_index(model, 0, 0, -1, 0), by_index(model, 2, 2, 2, 2)
    model.remove_task("stsb")
    message = r"task_index 1 stood for 'stsb' before.*'cola' now: name the tasks \(task=\), or call renumber_tasks\(\)"
    with pytest.raises(ValueError, match=message):
        by_index(model, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="out of range|must be"):
        by_index(model, 2, 2, 2, 2)
    close(by_index(model, 0, 0, -1, 0), of_mnli)
    close(logits(model, ["cola"] * 4), of_cola)
    with pytest.raises(ValueError, match="task_index 1 stood for"):
        model.generate(batch()["input_ids"], task_index=torch.tensor([1, 1, 1, 1]), max_new_tokens=2)
    model.renumber_tasks()
    close(by_index(model, 1, 1, 1, 1), of_cola)


def test_an_index_that_is_given_anew_is_refused(model):
    model.remove_task("cola")
    model.add_task("new")
    with pytest.raises(ValueError, match="task_index 2 stood for 'cola' before.*'new' now"):
        by_index(model, 2, 0, 0, 0)
    model.remove_task("new")
    model.add_task("cola")
    by_index(model, 2, 0, 0, 0)
    model.add_task("more")
    by_index(model, 3, 0, 0, 0)


def test_an_index_stays_with_its_task_when_that_is_renamed(model):
    expected = by_index(model, 1, 1, 1, 1)
    order = list(model.parameters())
    model.rename_task("stsb", "a.b")
    close(by_index(model, 1, 1, 1, 1), expected)
    close(logits(model, "a.b"), expected)
    assert all(a is b for a, b in zip(order, model.parameters(), strict=True))
    assert model.hyperformer_config.tasks == ["mnli", "a.b", "cola"]


def test_a_task_that_gets_the_name_of_a_removed_one_does_not_get_its_index(model):
    model.remove_task("stsb")
    model.rename_task("cola", "stsb")
    with pytest.raises(ValueError, match="task_index 1 stood for another task before"):
        by_index(model, 1, 1, 1, 1)


def test_copies_refuse_what_the_model_refuses(model):
    model.remove_task("stsb")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="task_index 1 stood for 'stsb'"):
            by_index(other, 1, 1, 1, 1)
        other.renumber_tasks()
        by_index(other, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="task_index 1 stood for 'stsb'"):
        by_index(model, 1, 1, 1, 1)


def test_a_graph_which_cannot_look_at_indices_gets_none_that_is_stale(model):
    model.remove_task("stsb")
    order, tasks = model._task_order, model.hyperformer_config.tasks
    compiled = torch.compile(lambda index: order.checked(index, tasks), backend="eager", fullgraph=True)
    assert compiled(torch.tensor([1, 0, -1, 1])).tolist() == [2, 0, -1, 2]  # out of range


def rows(*tasks, index=True, name=True):
    found = []
    for i, task in enumerate(tasks):
        row = {"input_ids": [5 + i, 1], "labels": [7, 1]}
        found.append(row | ({"task": task} if name else {}) | ({"task_index": TASKS.index(task)} if index else {}))
    return found


def test_a_collator_holds_no_old_index(model):
    collate = HyperFormerDataCollator(ByT5Tokenizer(), model=model)
    assert collate(rows("mnli", "cola"))["task_index"].tolist() == [0, 2]
    model.remove_task("stsb")
    assert collate(rows("mnli", "cola"))["task"] == ["mnli", "cola"]
    assert collate(rows("cola", "cola", index=False))["task"] == "cola"
    with pytest.raises(ValueError, match="task_index 1 stood for 'stsb' before"):
        collate(rows("stsb", "stsb", name=False))
    with pytest.raises(ValueError, match="unknown task 'stsb'"):
        collate(rows("stsb", "cola"))
    model.renumber_tasks()
    assert collate(rows("mnli", "cola"))["task_index"].tolist() == [0, 1]


def test_rows_of_a_training_are_of_the_tasks_that_they_name(model):
    found = Dataset.from_list(rows("mnli", "cola", "mnli"))
    model.remove_task("stsb")
    order, tasks = model._task_order, model.hyperformer_config.tasks
    assert task_of_rows(found, tasks, order).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="task_index 1 stood for 'stsb'"):
        task_of_rows(Dataset.from_list(rows("stsb", "mnli", name=False)), tasks, order)
    with pytest.raises(ValueError, match="'stsb'; the model's tasks are mnli, cola"):
        task_of_rows(Dataset.from_list(rows("stsb", "mnli")), tasks, order)


def test_a_trainer_scores_each_row_as_the_task_that_it_names(tmp_path):
    trainer = small_trainer(tmp_path, tasks=("cola", "stsb", "rte"))
    everything = trainer.eval_dataset["rte"]
    trainer.model.remove_task("cola")
    assert [name for name, _ in trainer.parts(everything).values()] == ["rte"]


def test_a_forward_sees_the_tasks_before_or_after_a_change(model, monkeypatch):
    expected, found = logits(model, "cola"), []
    forward = threading.Thread(target=lambda: found.append(logits(model, "cola")))
    real = task_changes._take

    def with_a_forward_meanwhile(*args):
        forward.start()
        forward.join(0.2)  # as far as it comes; the change is half done
        real(*args)

    monkeypatch.setattr(task_changes, "_take", with_a_forward_meanwhile)
    model.remove_task("mnli")
    forward.join()
    close(found[0], expected)


def test_names_that_were_chosen_before_a_change_are_chosen_again(model):
    device = torch.device("cpu")
    single, several = (TaskChoice(model.hyperformer_config, task, device) for task in ("cola", ["cola", "mnli"]))
    model.remove_task("stsb")
    config, order = model.hyperformer_config, model._task_order
    assert select(config, single, None, device, order).rows.tolist() == [1]
    assert select(config, several, None, device, order).rows.tolist() == [1, 0]


def test_what_cannot_be_changed(model):
    with pytest.raises(ValueError, match="unknown task 'rte'"):
        model.remove_task("rte")
    with pytest.raises(ValueError, match="'cola' exists already"):
        model.rename_task("mnli", "cola")
    with pytest.raises(ValueError, match="unknown task 'rte'"):
        model.rename_task("rte", "new")
    with pytest.raises(TypeError, match="non-empty string"):
        model.rename_task("mnli", "")
    with (
        TaskGradients(model).attached(),
        pytest.raises(RuntimeError, match="gradients of this model"),
    ):
        model.remove_task("mnli")
    assert model.hyperformer_config.tasks == TASKS
    model.remove_task("mnli")
    model.remove_task("stsb")
    with pytest.raises(ValueError, match="'cola' is the only one"):
        model.remove_task("cola")
    logits(model, "cola")


def test_tasks_that_share_an_embedding():
    mapping = {"mnli": "both", "stsb": "both", "cola": "cola"}
    model = tiny_model(t5=tiny_t5(dtype=torch.float32), task_to_embeddings=mapping).eval()
    before = logits(model, "stsb")
    model.rename_task("mnli", "other")
    model.rename_task("cola", "third")
    assert model.hyperformer_config.task_to_embeddings == {"other": "both", "stsb": "both", "third": "third"}
    model.remove_task("other")
    close(logits(model, "stsb"), before)
    model.remove_task("stsb")
    assert list(model.task_embeddings.task_to_embeddings) == ["third"]
    logits(model, "third")


def test_a_changed_model_is_saved_and_loaded(model, tmp_path):
    model.card_metrics = {"mnli": {"accuracy": 80.0}, "stsb": {"pearson": 70.0}}
    model.remove_task("stsb")
    model.rename_task("mnli", "new name")
    expected = logits(model, "new name")
    model.save_pretrained(tmp_path)
    loaded = HyperFormerModel.from_pretrained(tmp_path, t5=tiny_t5(dtype=torch.float32)).eval()
    assert loaded.hyperformer_config.tasks == ["new name", "cola"]
    close(logits(loaded, "new name"), expected)
    by_index(loaded, 1, 0, 1, 0)
    assert "80.0" in (tmp_path / "README.md").read_text()


def test_training_goes_on_with_a_new_optimizer(model):
    model.remove_task("stsb")
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.task_embeddings.task_to_embeddings["cola"].detach().clone()
    model(**batch(), task=["cola", "mnli", "cola", "mnli"]).loss.backward()
    optimizer.step()
    assert not torch.equal(model.task_embeddings.task_to_embeddings["cola"], before)
