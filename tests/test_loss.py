"""The loss is the mean over all labels of an optimizer step, however unequally micro-batches divide them."""

from __future__ import annotations

import pytest
import torch
from support.t5s import batch, tiny_model, tiny_t5
from torch.utils.data import SequentialSampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments


def unequal(B=4):
    """A batch whose first half has many labels, and whose second half has few."""
    inputs = batch(B=B, M=6)
    inputs["labels"][B // 2 :, 1:] = -100
    return inputs


def part(inputs, rows):
    return {name: value[rows] for name, value in inputs.items()}


@pytest.mark.parametrize("return_dict", [True, False])
def test_shares_of_micro_batches_add_up_to_the_mean_over_all_labels(return_dict):
    model, inputs = tiny_model(), unequal()
    tasks = ["mnli", "stsb", "mnli", "cola"]
    whole = model(**inputs, task=tasks).loss
    count = (inputs["labels"] != -100).sum()
    for items in (count, int(count), count.float()):
        halves = [
            model(**part(inputs, rows), task=tasks[rows], num_items_in_batch=items, return_dict=return_dict)[0]
            for rows in (slice(2), slice(2, 4))
        ]
        torch.testing.assert_close(sum(halves), whole)


def test_a_micro_batch_without_labels_adds_nothing():
    model, inputs = tiny_model().train(), batch()
    inputs["labels"][:] = -100
    loss = model(**inputs, task="cola", num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


class InOrder(Seq2SeqTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def trained(folder, batch_size, accumulation, smoothing):
    model, inputs = tiny_model(t5=tiny_t5(dtype=torch.float32)), unequal()
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    rows = [part(inputs, i) | {"task_index": i % 3} for i in range(4)]
    arguments = Seq2SeqTrainingArguments(
        folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=2,
        optim="sgd", learning_rate=0.5, label_smoothing_factor=smoothing, report_to=[], save_strategy="no",
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_stock_trainer_accumulates_to_the_same_step(tmp_path, smoothing):
    if not tiny_model().accepts_loss_kwargs:
        pytest.skip("this transformers smooths labels per micro-batch, so the model asks it for the old way")
    one, two = trained(tmp_path, 4, 1, smoothing), trained(tmp_path, 2, 2, smoothing)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
