"""Checkpoints that appear in one step, and trainings that go on from them as if they had never stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from ..atomic import explain_full_disk
from ..checkpoint import CheckpointError, write_directory
from ..sharding import is_fsdp2, spread_optimizer_state, whole_optimizer_state, whole_state
from .folder import STAGING, newest_checkpoint, remove, rotate
from .resume import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    check_rng_states,
    check_trainer_state,
    read_optimizer,
    read_scheduler,
)
from .task_evaluation import TaskEvaluatingTrainer


class CheckpointingTrainer(TaskEvaluatingTrainer):
    """Saves and resumes; :class:`HyperFormerTrainer` says how."""

    #: Where a checkpoint is written until it is complete.
    _staging: Path | None = None

    def _steps(self) -> tuple[int, int]:
        """Return the optimizer steps (of an epoch, of the run)."""
        raise NotImplementedError

    def _check_finite(self, weights: bool) -> None:
        """Raise TrainingDiverged if the loss was not finite, or with ``weights`` a weight is not."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # The Trainer's own way leaves out the model, or has a file of each process.
        self._save(output_dir, whole_state(self.adapted))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self._plain_optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, without accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # It is pickled, and run.json or the user's script has the arguments.
            (Path(output_dir or self._folder) / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write the model's own card (:meth:`HyperFormerModel.create_or_update_model_card`) for the Hub."""
        if self.is_world_process_zero():
            self.adapted.create_or_update_model_card(self._folder, [tags] if isinstance(tags, str) else tags)

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None  # its type allows None; TrainingArguments replaces it by a default
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Let the Trainer write a checkpoint in a staging folder, which is renamed once it is complete."""
        self._check_finite(weights=True)
        folder = Path(super()._get_output_dir(trial))
        name, staging = f"checkpoint-{self.state.global_step}", folder / STAGING
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
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
            if (folder / name).is_symlink():
                # The link's target does not belong to the run and may be on another file system.
                (folder / name).unlink()
            with write_directory(folder / name) as whole:
                for path in sorted((staging / name).iterdir()):
                    os.rename(path, Path(whole) / path.name)
            remove(staging)
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as Seq2SeqTrainer does. ``True`` resumes from the newest complete checkpoint in ``output_dir``."""
        if resume_from_checkpoint is True:
            newest, passed = newest_checkpoint(self._folder)
            if newest is None:
                raise CheckpointError("; ".join([f"{self._folder} has no complete checkpoint", *passed]))
            resume_from_checkpoint = str(newest)
        self._start_of(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _start_of(self, checkpoint: Path | None) -> None:
        """Prepare for a training from ``checkpoint``, whose state is checked, or from the beginning."""
        self._not_finite: torch.Tensor | None = None
        self._ended_at: int | None = None
        self._resumed: dict[str, Any] = {}
        self._same_processes = True
        if checkpoint is None:
            return
        self._resumed = state = check_trainer_state(checkpoint)
        step, total, before = state["global_step"], self._steps()[1], state.get("max_steps") or 0
        if step > total:
            raise CheckpointError(f"{checkpoint}: saved at step {step}, beyond the run's {total} steps")
        control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
        stopped_early = control.get("should_training_stop", False) and step < before and total <= before
        self._ended_at = step if step == total or stopped_early else None
        self._same_processes = check_rng_states(checkpoint, self.args.process_index, self.args.world_size)

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and resume_from_checkpoint is not None:
            # Before the T5 is sharded, so that it is compared with the checkpoint's without being gathered again.
            self._load_from_checkpoint(resume_from_checkpoint)
        inner: Any = super()._inner_training_loop
        return inner(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self.adapted.load_weights(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not is_fsdp2(self.adapted):
            self.adapted.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Check and load the states. The Trainer's own method does not check, and fails on several CPUs in 4.57."""
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, optimizer, scheduler = Path(checkpoint), self.optimizer, self.lr_scheduler
        assert optimizer is not None and scheduler is not None
        # accelerate wraps the optimizer, which the check has to see itself.
        moments = read_optimizer(folder / OPTIMIZER_NAME, self._plain_optimizer)
        schedule = read_scheduler(
            folder / SCHEDULER_NAME,
            scheduler,
            moments,
            self._resumed["global_step"],
            may_lag=self.accelerator.scaler is not None,
            other_length=self._steps()[1] != self._resumed.get("max_steps"),
        )
        optimizer.load_state_dict(spread_optimizer_state(moments, self._plain_optimizer))
        scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self._same_processes:
            set_seed(self.args.seed + self._resumed["global_step"])
            return
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # Python, NumPy and torch raise different classes
            raise CheckpointError(f"{checkpoint}: the RNG states cannot be set: {error}") from error
