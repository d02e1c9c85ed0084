"""HyperFormerTrainer: Hugging Face's Seq2SeqTrainer with sampled tasks, scores per task and atomic checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data import HyperFormerDataCollator, TaskBatchSampler, TaskSpec
from ..loss import summed
from ..sharding import local
from . import ranks
from .batches import EpochBatches, class_names, task_of_rows
from .diagnostics import DiagnosingTrainer


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer finite. Earlier checkpoints are intact."""


class _RunContinues(TrainerCallback):
    """Makes a resumed training behave as if it had never stopped, where the stock Trainer would not."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ranks.expect_all_sharded(kwargs.get("model"))
        # The checkpoint's state has the intervals and, after a move, the folder of the run that wrote it.
        state.compute_steps(args, state.max_steps)
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)
        # The checkpoint was written while these were set.
        control.should_log = control.should_evaluate = control.should_save = False


class HyperFormerTrainer(DiagnosingTrainer):
    """Trains a :class:`~hyperformer_fast.HyperFormerModel` on several tasks.

    It takes the arguments of ``Seq2SeqTrainer``, and behaves like it except for this:

    - A batch has the examples of one task, which is drawn anew for each optimizer step with a probability
      proportional to n^(1/``temperature``); with ``mixed_batches`` each example's task is drawn. An epoch has as many
      steps as the rows fill batches.
    - Evaluation takes the tasks one by one. It reports ``eval_<task>_<metric>``, the mean of all of these numbers as
      ``eval_average_metrics`` (the paper's average), and the mean of the tasks' means as ``eval_average_tasks``.
    - The loss is the mean over all tokens of an optimizer step, whatever accumulation and processes divide it, or
      their sum with ``loss_reduction="sum"``. A gradient clipped to ``max_grad_norm`` is then nearly always clipped,
      because a sum is longer than a mean by the number of tokens.
    - Each part of the model has its own learning rate (``learning_rate_rule``, by default that of the model's recipe;
      :func:`~hyperformer_fast.parameter_groups`). ``learning_rate`` in the logs is the one that is set.
    - With ``max_task_grad_norm`` and ``gradient_surgery`` the gradients of the tasks in a batch are clipped one by one,
      and conflicts between them resolved. Every ``diagnostics_steps`` steps it logs how far apart the tasks are.
    - A checkpoint appears in one step, nothing that is not finite is saved, and a resumed run has the bits of one that
      was never interrupted.

    Args:
        model: the model. Only the parameters that its configuration trains are saved.
        args: the arguments. A plain ``Seq2SeqTrainingArguments`` has temperature 10, no mixed batches and the mean.
        data_collator: None for :class:`HyperFormerDataCollator`.
        train_dataset: tokenised rows, with a column ``task`` or ``task_index`` if the model has several tasks.
        eval_dataset: such rows, or a dictionary of them by task. A column ``label`` holds the label that a prediction
            is compared with; without it that is the decoded ``labels``.
        tasks: specifications of the tasks. Each decodes and scores its task's texts; a task without one has only the
            scores of ``compute_metrics``.
        kwargs: the other arguments of ``Seq2SeqTrainer``.

    Raises:
        ValueError: a row's task is unknown to the model, or the arguments contradict each other.
    """

    args: Seq2SeqTrainingArguments
    #: Rows by number; its declared type allows others.
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tasks: Mapping[str, TaskSpec] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        if args is not None and not isinstance(args, TrainingArguments):
            raise TypeError(
                f"args must be Seq2SeqTrainingArguments, got {type(args).__name__}: HyperFormerTrainer takes the "
                "arguments of Seq2SeqTrainer now, and train_run takes those of a whole run"
            )
        args = args or Seq2SeqTrainingArguments(output_dir="hyperformer-output", predict_with_generate=bool(tasks))
        if isinstance(train_dataset, IterableDataset | datasets.IterableDataset):
            raise ValueError(
                "train_dataset must have a length and rows by number: tasks are drawn from all of its rows"
            )
        by_parts = args.batch_eval_metrics or not args.eval_do_concat_batches
        if tasks and (not args.predict_with_generate or args.prediction_loss_only or by_parts):
            raise ValueError(
                "the tasks' metrics are those of all generated texts: set predict_with_generate=True and "
                "eval_do_concat_batches=True, and neither prediction_loss_only nor batch_eval_metrics"
            )
        if model is not None and not hasattr(model, "hyperformer_config"):
            raise TypeError(f"HyperFormerTrainer trains a HyperFormerModel, got {type(model).__name__}")
        by_length = getattr(args, "group_by_length", False) or getattr(args, "sortish_sampler", False)
        if by_length or getattr(args, "train_sampling_strategy", "random") != "random":
            warnings.warn("rows are not grouped by length: the tasks' sampler chooses them", stacklevel=2)
        if args.n_gpu > 1:
            # DataParallel would scatter a batch but not its task. Several GPUs need torchrun.
            args._n_gpu = 1
        # Otherwise a resumed run would forget how long early stopping has been patient.
        args.restore_callback_states_from_checkpoint = True
        # We stop at a loss that is not finite; the filter would hide it, and synchronise with the device at each step.
        args.logging_nan_inf_filter = False
        self.tasks: dict[str, TaskSpec] = dict(tasks or {})
        self._start_of(None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or HyperFormerDataCollator(processing_class, model=model, task_names=class_names(train_dataset)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_RunContinues(), *(callbacks or ())],
            compute_loss_func=compute_loss_func or self._loss,
            **kwargs,
        )

    def create_accelerator_and_postprocess(self) -> None:
        ranks.expect_one_run(self.args.world_size)
        ranks.expect_fsdp2(self.args)
        super().create_accelerator_and_postprocess()
        ranks.shard_on_cpus(self)

    # Batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of this process's share of the batches, which accelerate therefore does not prepare."""
        args, rows = self.args, self.train_dataset
        if rows is None or not len(rows):
            raise ValueError("training needs a train_dataset with rows")
        index = task_of_rows(rows, self.task_names, self.adapted._task_order)
        sizes = np.bincount(index)
        self._expect_conflicts(int((sizes > 0).sum()), self._batch_size)
        per_epoch, total = self._steps()
        sampler = TaskBatchSampler(
            sizes[sizes > 0].tolist(),
            self._batch_size,
            total,
            temperature=getattr(args, "temperature", 10.0),
            mixed=getattr(args, "mixed_batches", False),
            seed=args.seed if args.data_seed is None else args.data_seed,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
        )
        batches = EpochBatches(sampler, np.argsort(index, kind="stable"), per_epoch, self._next_step)
        collate = self.data_collator
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    @property
    def _batch_size(self) -> int:
        args = self.args
        return self._train_batch_size if args.auto_find_batch_size else args.per_device_train_batch_size

    def _steps(self) -> tuple[int, int]:
        """Return the optimizer steps (of an epoch, of the run)."""
        args = self.args
        step_size = self._batch_size * args.gradient_accumulation_steps * args.world_size
        per_epoch = math.ceil(len(self.train_dataset) / step_size)
        return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)

    def _next_step(self) -> int | None:
        # The Trainer would begin another step of a run that ended within an epoch.
        return None if self._ended_at == self.state.global_step else self.state.global_step

    # The loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "decoder_input_ids" not in inputs and "labels" in inputs:
            # The Trainer removes the labels, from which T5 would derive the decoder's input.
            inputs["decoder_input_ids"] = self.adapted.prepare_decoder_input_ids_from_labels(inputs["labels"])
        if self._needs_logits(inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)
        asked = {"labels": inputs["labels"], "smoothing": self.args.label_smoothing_factor, "output_logits": False}
        asked |= {"return_dict": True}

        def with_sum(**others: Any) -> Any:
            return model(**{**others, **asked, "num_items_in_batch": 1})

        return super().compute_loss(cast(nn.Module, with_sum), inputs, *args, **kwargs)

    def _needs_logits(self, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any) -> bool:
        """Whether anybody but the loss reads the logits, or the model cannot compute its loss without them."""
        model = self.adapted
        if return_outputs or self.compute_loss_func != self._loss or "labels" not in inputs:
            return True
        return not (model.training and model.loss_without_logits) or bool(model._forward_hooks)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the label-smoothed cross-entropy, of whose sum the model may have been asked (``compute_loss``)."""
        total = outputs.get("loss") if isinstance(outputs, dict) else None
        if total is None:
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            total = summed(logits, labels, self.args.label_smoothing_factor)
        if getattr(self.args, "loss_reduction", "mean") == "sum" and torch.is_grad_enabled():
            return total
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        task = inputs.get("task")
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if loss.device.type == "cpu":
            if not torch.isfinite(loss):
                on = f", on {task!r}" if isinstance(task, str) else ""
                raise TrainingDiverged(
                    self._advice(f"the loss is {loss.item()} at step {self.state.global_step + 1}{on}")
                )
        else:
            # Reading a value from a device synchronises: accumulate there, and read it before logging and saving.
            bad = ~torch.isfinite(loss)
            self._not_finite = bad if self._not_finite is None else self._not_finite | bad
        return loss

    def _check_finite(self, weights: bool) -> None:
        if self._not_finite is not None and self._not_finite.item():
            raise TrainingDiverged(self._advice(f"the loss was not finite at or before step {self.state.global_step}"))
        parameters = (local(p) for p in self.adapted.parameters() if p.requires_grad)
        if weights and not all(bool(p.isfinite().all()) for p in parameters):
            raise TrainingDiverged(self._advice(f"weights are not finite at step {self.state.global_step}"))

    def _advice(self, what: str) -> str:
        return (
            f"{what}: training stopped; earlier checkpoints are intact. Lower learning_rate (now "
            f"{self.args.learning_rate}), or look for unusual rows in the data"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._check_finite(weights=False)
        super().log(logs, *args, **kwargs)
