"""HyperFormerTrainer as a Seq2SeqTrainer: any dataset with a task column, epochs, losses, metrics, stock callbacks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from support.runs import SMALL, losses, small_data, small_run, small_t5, small_trainer, trained
from transformers import ByT5Tokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model
from hyperformer_fast.data import TaskBatchSampler
from hyperformer_fast.training import HyperFormerTrainer
from hyperformer_fast.training.batches import EpochBatches, task_of_rows

TASKS = ["cola", "stsb"]
TOKENIZER = ByT5Tokenizer()


def own_rows(n: int = 24) -> Dataset:
    """A user's tokenised rows of two tasks, one after the other, with targets of different lengths."""
    texts = [f"row {i} of {TASKS[i % 2]}" for i in range(n)]
    labels = ["yes" if i % 4 else "certainly not" for i in range(n)]
    columns = {"task": [TASKS[i % 2] for i in range(n)], "input_ids": TOKENIZER(texts).input_ids}
    return Dataset.from_dict({**columns, "labels": TOKENIZER(labels).input_ids, "text": texts})


def own_trainer(folder, train=None, dropout=0.0, **changes) -> HyperFormerTrainer:
    named = {
        name: changes.pop(name) for name in ("compute_metrics", "eval_dataset", "callbacks", "tasks") if name in changes
    }
    fields = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "report_to": "none", "seed": 3}
    fields |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": not torch.accelerator.is_available()}
    torch.manual_seed(0)
    model = get_hyperformer_model(small_t5(dropout), HyperFormerConfig(tasks=TASKS, **SMALL))
    args = Seq2SeqTrainingArguments(str(folder), **{**fields, **changes})
    rows = own_rows() if train is None else train
    return HyperFormerTrainer(model, args, train_dataset=rows, processing_class=TOKENIZER, **named)


def test_tasks_are_read_from_any_column():
    names = Dataset.from_dict({"task": ["b", "a", "b"]})
    assert task_of_rows(names, ["a", "b"]).tolist() == [1, 0, 1]
    # A ClassLabel has an order of its own.
    assert task_of_rows(names.cast_column("task", ClassLabel(names=["b", "a"])), ["a", "b"]).tolist() == [1, 0, 1]
    assert task_of_rows(Dataset.from_dict({"task_index": [1, 0]}), ["a", "b"]).tolist() == [1, 0]
    assert task_of_rows([{"task": "a"}, {"task": "b"}], ["a", "b"]).tolist() == [0, 1]
    assert task_of_rows(Dataset.from_dict({"x": [1, 2]}), ["a"]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": [1]}, "no column 'task' or 'task_index', but the model has the tasks a, b; its columns are x"),
        ({"task": ["a", "c"]}, "column 'task' has 'c'; the model's tasks are a, b"),
        ({"task": [0, 1]}, "column 'task' has 0; .* call a column of indices 'task_index', or make it a ClassLabel"),
        ({"task_index": [0, 2]}, "column 'task_index' has 2; the model's 2 tasks are 0 to 1"),
    ],
)
def test_rows_of_unknown_tasks_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        task_of_rows(Dataset.from_dict(rows), ["a", "b"])


def test_a_users_rows_train_whatever_their_order_and_column(tmp_path):
    """The rows of both tasks alternate, and a batch is still of one; a ClassLabel, indices and a list do the same."""
    seen = []

    class Watching(HyperFormerTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs.get("task"))
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = own_trainer(tmp_path)
    trainer.__class__ = Watching
    trainer.train()
    assert set(seen) <= set(TASKS) and len(seen) == 3
    expected = trained(trainer.model)
    rows = own_rows()
    index = rows.map(lambda row: {"task_index": TASKS.index(row["task"])}, remove_columns="task")
    for other in (rows.cast_column("task", ClassLabel(names=TASKS)), index, list(rows)):
        again = own_trainer(tmp_path, other)
        again.train()
        assert all(torch.equal(value, expected[name]) for name, value in trained(again.model).items())


def test_a_dataset_without_rows_by_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset must have a length and rows by number"):
        own_trainer(tmp_path, IterableDataset.from_generator(lambda: iter([])))
    with pytest.raises(ValueError, match="training needs a train_dataset with rows"):
        own_trainer(tmp_path, own_rows().select([])).train()


@pytest.mark.parametrize("mixed", [False, True])
def test_epochs_are_one_stream_of_batches(mixed):
    sampler = TaskBatchSampler([10, 5], 2, 9, seed=1, accumulation=2, mixed=mixed)
    order = np.arange(15)[::-1]
    whole = [[14 - i for i in batch] for batch in sampler]
    step = itertools.count(0, 4)
    batches = EpochBatches(sampler, order, 4, lambda: next(step))
    assert len(batches) == 8
    assert [batch for _ in range(3) for batch in batches] == whole
    # In the middle of the second epoch: the Trainer skips the batches of the epoch that it has trained on.
    resumed = EpochBatches(sampler, order, 4, lambda: 6)
    assert list(resumed) == whole[8:16]
    assert list(EpochBatches(sampler, order, 4, lambda: None)) == []


def test_an_epoch_has_as_many_steps_as_the_rows_fill_batches(tmp_path):
    trainer = own_trainer(tmp_path, own_rows(26), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=3)
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.epoch == 2  # ceil(26 / 12) steps in each
    rows = own_trainer(tmp_path, own_rows(26), max_steps=6, gradient_accumulation_steps=3)
    rows.train()
    assert losses(trainer) == pytest.approx(losses(rows), rel=0.2)  # another schedule, the same batches


@pytest.mark.parametrize(
    ("reduction", "changes"),
    [("mean", {}), ("mean", {"label_smoothing_factor": 0.1, "mixed_batches": True}), ("sum", {"mixed_batches": True})],
)
def test_how_a_batch_is_divided_changes_nothing(tmp_path, changes, reduction):
    """The targets have different lengths, so that the mean of the parts' means is another number."""
    results = []
    for accumulation, batch_size in ((4, 2), (1, 8)):
        trainer = small_trainer(
            tmp_path, max_steps=2, loss_reduction=reduction, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, **changes,
        )  # fmt: skip
        rows = own_rows()
        trainer.train_dataset = rows
        trainer.train()
        results.append((trained(trainer.model), losses(trainer)))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert (results[0][1][0] > 50) == (reduction == "sum")
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_is_transformers_and_the_sum_the_authors(tmp_path, smoothing):
    trainer = small_trainer(tmp_path, label_smoothing_factor=smoothing)
    logits, labels = torch.randn(3, 5, 11, requires_grad=True), torch.randint(0, 11, (3, 5))
    labels[0, 3:] = labels[1, 1:] = -100
    tokens = int((labels != -100).sum())
    mean = trainer._loss({"logits": logits}, labels)
    torch.testing.assert_close(mean, LabelSmoother(smoothing)({"logits": logits}, labels))
    trainer.args.loss_reduction = "sum"
    logp, kept = logits.log_softmax(-1), labels != -100
    right = -logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[kept].sum()
    expected = (1 - smoothing) * right + smoothing / 11 * -logp[kept].sum()
    torch.testing.assert_close(trainer._loss({"logits": logits}, labels), expected)
    torch.testing.assert_close(trainer._loss({"logits": logits}, labels), mean * tokens)
    with torch.no_grad():  # an evaluation's loss is a mean
        torch.testing.assert_close(trainer._loss({"logits": logits}, labels), mean)


def test_evaluation_scores_each_task_and_averages_both_ways(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path)
    right = {"cola": ["0", "1", "0", "1", "0", "1"], "stsb": ["0.0", "0.2", "0.4", "0.6", "0.8", "?"]}

    def decode(self, tokens):
        return right[trainer._decoded]

    plain = HyperFormerTrainer.evaluate_task

    def evaluate_task(self, task, *args, **kwargs):
        self._decoded = task
        return plain(self, task, *args, **kwargs)

    monkeypatch.setattr(HyperFormerTrainer, "_decode", decode)
    monkeypatch.setattr(HyperFormerTrainer, "evaluate_task", evaluate_task)
    monkeypatch.setattr("hyperformer_fast.training.task_evaluation.longest_first", lambda rows: np.arange(len(rows)))
    found = trainer.evaluate()
    assert found["eval_cola_matthews"] == found["eval_cola_score"] == 100
    pearson, spearman = found["eval_stsb_pearson"], found["eval_stsb_spearman"]
    assert found["eval_average_metrics"] == pytest.approx((100 + pearson + spearman) / 3)
    assert found["eval_average_tasks"] == pytest.approx((100 + (pearson + spearman) / 2) / 2)
    assert found["eval_cola_loss"] > 0 and found["eval_samples_per_second"] > 0
    one = trainer.evaluate({"cola": trainer.eval_dataset["cola"]}, metric_key_prefix="test")
    assert one["test_average_metrics"] == 100 and "test_stsb_score" not in one


def test_texts_come_back_in_the_order_of_the_rows(tmp_path):
    """The rows are decoded longest first; larger weights make the model write other texts to other sources."""
    trainer = small_trainer(tmp_path)
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        parameter.data.mul_(6)
    texts = [f"{'long ' * (i * 5 % 7)}{i}" for i in range(11)]
    rows = Dataset.from_dict({"input_ids": TOKENIZER(texts).input_ids, "labels": [[49, 1]] * 11, "label": [1] * 11})
    together = trainer.evaluate_task("cola", rows.add_column("task", ["cola"] * 11)).texts
    alone = [
        trainer.evaluate_task("cola", rows.select([i]).add_column("task", ["cola"])).texts[0] for i in range(len(rows))
    ]
    assert together == alone and len(set(alone)) > 1


def test_a_users_metrics_are_averaged_without_specifications(tmp_path):
    def compute(prediction):
        assert len(prediction.predictions) == len(prediction.label_ids)
        return {"rows": len(prediction.predictions), "zero": 0.0}

    trainer = own_trainer(
        tmp_path, eval_dataset=own_rows(10).select(range(9)), compute_metrics=compute, predict_with_generate=True,
        generation_max_length=4, per_device_eval_batch_size=4,
    )  # fmt: skip
    found = trainer.evaluate()
    assert (found["eval_cola_rows"], found["eval_stsb_rows"]) == (5, 4)
    assert found["eval_average_metrics"] == pytest.approx(9 / 4)
    assert "eval_cola_loss" in found
    with pytest.raises(ValueError, match="eval_dataset.'cola'. has rows of stsb"):
        trainer.evaluate({"cola": own_rows(4)})
    # A ClassLabel of an evaluation may have another order than that of the training rows.
    other = own_rows(10).select(range(9)).cast_column("task", ClassLabel(names=TASKS[::-1]))
    again = trainer.evaluate({"cola": own_rows(10).select(range(0, 10, 2)).remove_columns("task"), "all": other})
    assert again["eval_cola_loss"] == again["eval_all_cola_loss"] == found["eval_cola_loss"]
    found = own_trainer(tmp_path, eval_dataset={"valid": own_rows(4)}).evaluate()
    assert {"eval_valid_cola_loss", "eval_valid_stsb_loss"} <= found.keys() and "eval_average_metrics" not in found


def test_a_text_is_as_long_as_the_task_the_arguments_or_the_run_says(tmp_path):
    from hyperformer_fast.data import TaskSpec

    trainer = small_trainer(tmp_path)
    title = TaskSpec(name="title", columns=["text"], target="text", metrics=["rouge1"])
    length = lambda: trainer._decoding(title)["max_length"]  # noqa: E731
    assert trainer._decoding(trainer.tasks["stsb"]) == {"max_length": 5}  # three characters, the end and the start
    trainer.max_target_length = 40
    assert length() == 41
    trainer.args.generation_max_length, trainer.args.generation_num_beams = 30, 2
    assert trainer._decoding(title) == {"max_length": 31, "num_beams": 2}
    trainer.tasks["title"] = title = TaskSpec(**{**title.to_dict(), "max_target_length": 20})
    assert length() == 21


def test_specifications_need_generated_texts(tmp_path):
    specs = {name: task.spec for name, task in small_data().items()}
    with pytest.raises(ValueError, match="set predict_with_generate=True"):
        own_trainer(tmp_path, tasks=specs, predict_with_generate=False)
    # Without a column "label" the decoded targets are the labels, whatever the specification makes of them.
    trainer = own_trainer(tmp_path, tasks=specs, predict_with_generate=True, eval_dataset=own_rows(8))
    with pytest.raises(ValueError, match="the labels of task 'cola' .* 'certainly not'"):
        trainer.evaluate()


def test_what_it_cannot_train_is_refused(tmp_path):
    run = small_run(tmp_path)
    model = get_hyperformer_model(small_t5(), run.hyperformer_config(TASKS))
    with pytest.raises(TypeError, match="args must be Seq2SeqTrainingArguments, got RunArguments: .* train_run takes"):
        HyperFormerTrainer(model, run)
    with pytest.raises(TypeError, match="trains a HyperFormerModel, got T5ForConditionalGeneration"):
        HyperFormerTrainer(small_t5(), run.training)


def test_it_is_a_seq2seq_trainer(tmp_path):
    trainer = small_trainer(tmp_path)
    assert isinstance(trainer, Seq2SeqTrainer)
    predictions = trainer.predict(trainer.eval_dataset["cola"].remove_columns("label"), max_length=3)
    assert len(predictions.predictions) == 6
    assert small_run(tmp_path).training.temperature == 10
