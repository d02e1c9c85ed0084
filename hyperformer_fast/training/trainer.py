"""HyperFormerTrainer: Hugging Face's Trainer with task sampling, our weight files and atomic checkpoints."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..atomic import explain_full_disk
from ..checkpoint import CheckpointError, write_directory
from ..data import Collator, EncodedExamples, TaskBatchSampler, TaskData
from ..model import HyperFormerModel
from .arguments import SCHEDULES, RunConfig, RunConfigError
from .folder import BEST, STAGING, remove, rotate
from .generation import evaluate_examples
from .metrics import average
from .resume import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    check_rng_states,
    check_trainer_state,
    read_optimizer,
    read_scheduler,
)


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer finite. Earlier checkpoints are intact."""


def training_arguments(run: RunConfig, **changes: Any) -> TrainingArguments:
    """Make the TrainingArguments of a run, using only names that transformers 4.57 and 5 share.

    Under torchrun this starts the process group; without an accelerator it runs on the CPU with gloo.

    Args:
        run: the configuration of the run.
        changes: TrainingArguments that override those of the run.

    Raises:
        RunConfigError: the Trainer refuses a setting on this machine.
    """
    fields = {
        "output_dir": run.output_dir,
        "max_steps": run.steps,
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": run.eval_batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation,
        "learning_rate": run.learning_rate,
        "warmup_steps": run.warmup_steps,
        "lr_scheduler_type": SCHEDULES[run.schedule],
        "weight_decay": run.weight_decay,
        "max_grad_norm": run.max_grad_norm,
        "label_smoothing_factor": run.label_smoothing,
        "logging_steps": run.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if run.eval_steps else "no",
        "eval_steps": run.eval_steps or None,
        "save_strategy": "steps" if run.save_steps else "no",
        "save_steps": run.save_steps or 500,
        "seed": run.seed,
        "bf16": run.bf16,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    if run.gradient_checkpointing:
        # transformers 5.23 renamed the argument.
        new = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
        fields["activation_checkpointing" if new else "gradient_checkpointing"] = True
    if not torch.accelerator.is_available():
        # Without use_cpu the Trainer refuses bf16 and treats each process of torchrun as a separate run.
        fields["use_cpu"] = True
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            fields["ddp_backend"] = "gloo"
    try:
        arguments = TrainingArguments(**{**fields, **changes})
    except ValueError as error:
        raise RunConfigError(f"the Trainer refuses these settings here: {error}") from error
    if arguments.n_gpu > 1:
        # DataParallel would scatter a batch but not its task. Several GPUs need torchrun.
        arguments._n_gpu = 1
    return arguments


class _ArgumentsHold(TrainerCallback):
    """Makes a resumed Trainer log, evaluate and save at the arguments' intervals, not at the checkpoint's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class HyperFormerTrainer(Trainer):
    """Trains a :class:`HyperFormerModel` on temperature-sampled tasks, one per optimizer step.

    Args:
        model: the HyperFormerModel. Only the parameters that its configuration trains are saved.
        run: the configuration of the run.
        data: the tasks of the run.
        tokenizer: the T5's tokenizer.
        args: the Trainer's arguments; None for :func:`training_arguments` of the run.
        callbacks: further callbacks of the Trainer.
    """

    def __init__(
        self,
        model: HyperFormerModel,
        run: RunConfig,
        data: dict[str, TaskData],
        tokenizer: PreTrainedTokenizerBase,
        args: TrainingArguments | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
    ):
        self.run, self.data, self.text_tokenizer = run, data, tokenizer
        self._staging: Path | None = None
        self._not_finite: torch.Tensor | None = None
        train = [example for task in data.values() for example in task.splits["train"]]
        super().__init__(
            model=model,
            args=args or training_arguments(run),
            train_dataset=EncodedExamples(train, tokenizer, run.max_source_length),
            eval_dataset=[],
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=[_ArgumentsHold(), *(callbacks or ())],
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader whose single pass is the whole run, so that a resumed run only has to skip batches.

        Each rank samples its own share of a batch, so accelerate does not prepare the loader.
        """
        sampler = TaskBatchSampler(
            [len(task.splits["train"]) for task in self.data.values()],
            self.args.per_device_train_batch_size,
            self.args.max_steps,
            temperature=self.run.temperature,
            seed=self.args.seed,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        pin = self.args.device.type == "cuda"
        examples: Any = self.train_dataset  # declared as optional, but __init__ always sets it
        return DataLoader(examples, batch_sampler=sampler, collate_fn=self.data_collator, pin_memory=pin)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.label_smoother is not None:
            # The label smoother removes the labels, from which T5 would derive the decoder's input.
            inner = self.accelerator.unwrap_model(model)
            inputs["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(inputs["labels"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        task = inputs["task"]
        loss = super().training_step(model, inputs, *args, **kwargs)
        if loss.device.type == "cpu":
            if not torch.isfinite(loss):
                raise TrainingDiverged(
                    self._advice(f"the loss is {loss.item()} at step {self.state.global_step + 1}, on {task!r}")
                )
        else:
            # Reading a value from a device synchronises: accumulate there, and read it before logging and saving.
            bad = ~torch.isfinite(loss)
            self._not_finite = bad if self._not_finite is None else self._not_finite | bad
        return loss

    @property
    def _adapted(self) -> HyperFormerModel:
        """The model, without the wrappers of accelerate."""
        model: HyperFormerModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def _folder(self) -> Path:
        """The run folder."""
        assert self.args.output_dir is not None  # its type allows None; TrainingArguments replaces it by a default
        return Path(self.args.output_dir)

    def _check_finite(self, weights: bool) -> None:
        if self._not_finite is not None and self._not_finite.item():
            raise TrainingDiverged(self._advice(f"the loss was not finite at or before step {self.state.global_step}"))
        if weights and not all(bool(p.isfinite().all()) for p in self._adapted.parameters() if p.requires_grad):
            raise TrainingDiverged(self._advice(f"weights are not finite at step {self.state.global_step}"))

    def _advice(self, what: str) -> str:
        return (
            f"{what}: training stopped; earlier checkpoints are intact. Lower learning_rate (now "
            f"{self.run.learning_rate}), or look for unusual rows in the data"
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the scores of all tasks on the first ``eval_rows`` rows of validation, and their average."""
        model = self._adapted
        scores = {}
        for name, task in self.data.items():
            rows = task.splits["validation"][: self.run.eval_rows]
            scores[name], _ = evaluate_examples(
                model, self.text_tokenizer, task.spec, rows, self.run.eval_batch_size, self.run.max_source_length
            )
        results = {f"{metric_key_prefix}_{name}": values["score"] for name, values in scores.items()}
        results[f"{metric_key_prefix}_average"] = average(scores)
        if self.run.keep_best and self.args.should_save:
            self._keep_best(model, results[f"{metric_key_prefix}_average"], f"{metric_key_prefix}_average")
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def _keep_best(self, model: HyperFormerModel, value: float, name: str) -> None:
        if all(value > entry[name] for entry in self.state.log_history if name in entry):
            self._check_finite(weights=True)
            model.save_pretrained(self._folder / BEST)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._check_finite(weights=False)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self._adapted.save_pretrained(output_dir or self._folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        check_trainer_state(checkpoint, self.args.max_steps)
        check_rng_states(checkpoint, self.args.process_index, self.args.world_size)
        self.accelerator.unwrap_model(model or self.model).load_weights(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Check and load the states. The Trainer's own method does not check, and fails on several CPUs in 4.57."""
        if checkpoint is None:
            return
        folder, optimizer, scheduler = Path(checkpoint), self.optimizer, self.lr_scheduler
        assert optimizer is not None and scheduler is not None
        # accelerate wraps the optimizer, which the check has to see itself.
        moments = read_optimizer(folder / OPTIMIZER_NAME, getattr(optimizer, "optimizer", optimizer))
        step = check_trainer_state(folder, self.args.max_steps)
        scaled = self.accelerator.scaler is not None
        schedule = read_scheduler(folder / SCHEDULER_NAME, scheduler, moments, step, may_lag=scaled)
        optimizer.load_state_dict(moments)
        scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # Python, NumPy and torch raise different classes
            raise CheckpointError(f"{checkpoint}: the RNG states cannot be set: {error}") from error

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Save the Trainer's files and ours in a staging folder, which is renamed once it is complete."""
        self._check_finite(weights=True)
        name = f"checkpoint-{self.state.global_step}"
        folder = self._folder
        staging = folder / STAGING
        if self.args.should_save:
            remove(staging)
            (staging / name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            with explain_full_disk(folder / name):
                super()._save_checkpoint(model, trial, *args, **kwargs)
        except Exception:
            if self.args.should_save:
                remove(staging)
            raise
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if (folder / name).is_symlink():
                # The link's target does not belong to the run and may be on another file system.
                (folder / name).unlink()
            with write_directory(folder / name) as whole:
                for path in sorted((staging / name).iterdir()):
                    os.rename(path, Path(whole) / path.name)
            remove(staging)
            rotate(folder, self.run.save_total_limit)
