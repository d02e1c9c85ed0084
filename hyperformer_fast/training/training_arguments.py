"""HyperFormerTrainingArguments: Hugging Face's training arguments with our defaults and what several tasks need."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import Seq2SeqTrainingArguments

from .field_checks import RunConfigError, check_field


def argument(default: Any, text: str, **more: Any) -> Any:
    """Make a field of a dataclass of arguments. Its help ``text`` and ``more`` are for HfArgumentParser."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


_OF_TRANSFORMERS = {field.name: field for field in dataclasses.fields(Seq2SeqTrainingArguments)}


def _default(name: str, value: Any) -> Any:
    """A field of Seq2SeqTrainingArguments with another default."""
    return dataclasses.field(default=value, metadata=_OF_TRANSFORMERS[name].metadata)


@contextlib.contextmanager
def refusals_named() -> Iterator[None]:
    """Raise RunConfigError where transformers or accelerate refuses what a run's arguments ask for."""
    try:
        yield
    except (RunConfigError, dist.DistError):
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        raise RunConfigError(f"the Trainer refuses these arguments here: {error}") from error


@dataclasses.dataclass
class HyperFormerTrainingArguments(Seq2SeqTrainingArguments):
    """Hugging Face's Seq2SeqTrainingArguments with our defaults and what only multi-task training needs.

    On a machine without an accelerator it runs on the CPU, and with gloo under torchrun.
    """

    _argument_group_name = "training"

    output_dir: str | None = _default("output_dir", "hyperformer-output")
    learning_rate: float = argument(
        3e-4,
        "The highest learning rate of the schedule. Left out, `hyperformer-fast train` takes 3e-3 in its place where "
        'learning_rate_rule comes to "fan_in", as with the default recipe, but for full fine-tuning, and where '
        "init_from is on the Hub or a run that is not finished.",
    )
    predict_with_generate: bool = _default("predict_with_generate", True)
    report_to: None | str | list[str] = _default("report_to", "none")
    logging_first_step: bool = _default("logging_first_step", True)
    ddp_find_unused_parameters: bool | None = _default("ddp_find_unused_parameters", False)
    per_device_train_batch_size: int = _default("per_device_train_batch_size", 32)
    per_device_eval_batch_size: int = _default("per_device_eval_batch_size", 64)
    save_total_limit: int | None = _default("save_total_limit", 2)
    gradient_checkpointing: bool | None = argument(
        None, "Recompute activations in the backward pass, which saves memory and takes more time."
    )
    metric_for_best_model: str | None = argument(
        None,
        'Metric that load_best_model_at_end and early stopping compare: "average_metrics" (where nothing is given), '
        '"average_tasks", or "<task>_<metric>".',
    )
    resume_from_checkpoint: str | None = argument(
        None, 'Continue the run in the output folder: "true" from its newest checkpoint, or the path of a checkpoint.'
    )
    temperature: float = argument(
        10.0, "A task of n rows is sampled with probability proportional to n^(1/temperature)."
    )
    mixed_batches: bool = argument(False, "Draw the task of each example instead of one task for each batch.")
    loss_reduction: str = argument(
        "mean",
        'How the loss of tokens is reduced: "mean", or "sum" as in the authors\' code, where clipping at max_grad_norm '
        "then acts in nearly every step.",
    )
    learning_rate_rule: str | None = argument(
        None,
        'How the rate of each part of the model follows from learning_rate: "uniform" gives all the same; "fan_in" '
        "divides that of what makes the adapters' weights by the root of the numbers that each layer reads. Left out: "
        "as the model's recipe says.",
    )
    embedding_warmup_steps: int = argument(
        0,
        "Raise the learning rate of the task, layer and position embeddings from 0 over this many steps (times what "
        "lr_scheduler_type makes of it), so that they stay apart until the generators have learned something.",
    )
    max_task_grad_norm: float | None = argument(
        None,
        "Scale the gradient of each task in a batch, with respect to the generators' weights, down to this norm where "
        "it is longer, before they are added; left out: not. A micro-batch's is measured as if it were a whole batch. "
        "max_grad_norm (1.0 by default) clips the sum again.",
    )
    gradient_surgery: str = argument(
        "none",
        'What is done where the gradients of tasks in a batch conflict: "none", or "pcgrad", which takes from each its '
        "projections on those that it conflicts with (Yu et al. 2020). It needs mixed_batches.",
    )
    diagnostics_steps: int = argument(
        100,
        "Log every N steps and at the end how far apart the tasks' embeddings and adapters are, and each task's share "
        "of the gradient, and warn where tasks have collapsed onto each other; 0: not.",
    )
    overwrite_output_dir: bool = argument(False, "Replace the run in the output folder.")
    early_stopping_patience: int | None = argument(
        None, "Stop after N evaluations without a better metric_for_best_model."
    )
    early_stopping_threshold: float = argument(0.0, "How much better a metric must be to count for early stopping.")

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # Without use_cpu the Trainer refuses bf16 and treats each process of torchrun as a separate run.
            self.use_cpu = True
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and self.ddp_backend is None:
                self.ddp_backend = "gloo"
        if getattr(self, "activation_checkpointing", True) is None and self.gradient_checkpointing is not None:
            self.activation_checkpointing = self.gradient_checkpointing  # its name since transformers 5.23
        selects = self.load_best_model_at_end or self.early_stopping_patience or self.save_strategy == "best"
        if self.metric_for_best_model is None and selects:
            self.metric_for_best_model = "average_metrics"
        check_field("learning_rate_rule", self.learning_rate_rule, str | None)
        check_field("embedding_warmup_steps", self.embedding_warmup_steps, int)
        check_field("max_task_grad_norm", self.max_task_grad_norm, float | None)
        check_field("gradient_surgery", self.gradient_surgery, str)
        check_field("diagnostics_steps", self.diagnostics_steps, int)
        super().__post_init__()
        if self.n_gpu > 1:
            # DataParallel would scatter a batch but not its task. Several GPUs need torchrun.
            self._n_gpu = 1
