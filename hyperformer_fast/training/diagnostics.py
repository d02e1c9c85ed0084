"""Trains with an eye on the tasks: how far apart they are, whose gradient is how long, and which of them conflict.

Gradients are watched in the last steps of each interval of ``diagnostics_steps`` steps, and the figures are logged at
its end, under names that begin with "diagnostics/". The end of the training ends an interval, too.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..task_gradients import TaskGradients, why_no_conflicts, why_no_gradients
from ..task_similarity import collapse_explained, copied_tasks, task_similarity
from ..task_statistics import TaskStatistics
from .optimizer import OptimizingTrainer

#: What the names of all figures begin with.
PREFIX = "diagnostics/"

#: How many steps of each interval are watched: with mixed batches; for each task, where a batch is of one.
WATCHED_STEPS, WATCHED_STEPS_OF_TASK = 8, 4

#: At most one step of so many is watched, but one in each interval. Watching adds some 4 % to a step, so that a whole
#: interval of no fewer steps costs under 1 %.
_WATCHED_OF = 5


class TaskDiagnostics(TrainerCallback, ExportableState):
    """What a resumed training has to know: the statistics of the steps watched so far, of which collapses it has warned
    (stack and pair of tasks), and the pairs of tasks that began as copies, which have not collapsed."""

    def __init__(self) -> None:
        self.begin([])

    def begin(self, copies: list[list[str]]) -> None:
        """Forget an earlier training of the same Trainer."""
        self.sums: dict[str, Any] = {}
        self.collapses: list[list[str]] = []
        self.copies = copies
        self.statistics: TaskStatistics | None = None

    def statistics_of(self, tasks: int) -> TaskStatistics:
        """The statistics, which those of the checkpoint are part of, where a training is resumed."""
        if self.statistics is None:
            self.statistics = TaskStatistics(tasks)
            self.statistics.load(self.sums)
        return self.statistics

    def state(self) -> dict[str, Any]:
        sums = self.sums if self.statistics is None else self.statistics.state()
        return {"args": {}, "attributes": {"sums": sums, "collapses": self.collapses, "copies": self.copies}}


class DiagnosingTrainer(OptimizingTrainer):
    """Clips the gradient of each task, resolves conflicts between them, and logs what tasks do to each other.

    It reads ``max_task_grad_norm``, ``gradient_surgery`` and ``diagnostics_steps`` of the arguments; arguments without
    these fields ask for nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._watch: TaskGradients | None = None
        self._watched_model: Any = None
        self._step_begun: int | None = None
        self._micro_batch = 0
        self._said_unseen = False
        kwargs["callbacks"] = [TaskDiagnostics(), *(kwargs.get("callbacks") or ())]
        super().__init__(*args, **kwargs)
        if self._changes_gradients:
            self._expect_changeable()

    @property
    def _max_task_norm(self) -> float | None:
        norm: float | None = getattr(self.args, "max_task_grad_norm", None)
        return norm

    @property
    def _surgery(self) -> str:
        surgery: str = getattr(self.args, "gradient_surgery", "none")
        return surgery

    @property
    def _interval(self) -> int:
        interval: int = getattr(self.args, "diagnostics_steps", 0)
        return interval

    @property
    def _mixed(self) -> bool:
        mixed: bool = getattr(self.args, "mixed_batches", False)
        return mixed

    @property
    def _changes_gradients(self) -> bool:
        return self._max_task_norm is not None or self._surgery != "none"

    def _expect_changeable(self) -> None:
        """Raise ValueError if the tasks' gradients cannot be changed as the arguments ask."""
        if self._surgery != "none" and not self._mixed:
            raise ValueError(
                f"gradient_surgery {self._surgery!r} compares the gradients of the tasks in one batch, but a batch has "
                "one task only: set mixed_batches=True"
            )
        if self._max_task_norm is not None and self.is_deepspeed_enabled:
            raise ValueError("max_task_grad_norm does not work with DeepSpeed, which scales losses by itself")
        if self.model is None:
            return  # model_init makes it when a training begins
        if self.args.torch_compile or is_compiled(self.model):
            raise ValueError(
                "max_task_grad_norm and gradient_surgery act between the backward passes of the T5 and of the "
                "hypernetworks, which torch.compile makes one: leave torch_compile off"
            )
        self._watcher()

    def _expect_conflicts(self, tasks: int, rows: int) -> None:
        """Raise ValueError if batches of so many rows, of so many tasks, can never have two tasks that conflict."""
        if self._surgery != "none" and min(tasks, rows) < 2:
            what = "the training rows are of one task" if tasks < 2 else "per_device_train_batch_size is 1"
            raise ValueError(
                f"gradient_surgery {self._surgery!r} compares the gradients of the tasks in one batch, but {what}: it "
                "would do nothing"
            )

    def _watcher(self) -> TaskGradients:
        """What watches the gradients of the model that is trained now."""
        model = self.adapted
        model = getattr(model, "_orig_mod", model)
        if self._watch is None or self._watched_model is not model:
            self._watch = TaskGradients(model, self._max_task_norm, self._surgery, self._order_seed)
            self._watched_model = model
        return self._watch

    @property
    def _order_seed(self) -> list[int]:
        return [self.args.seed, self.args.process_index]

    @property
    def _diagnostics(self) -> TaskDiagnostics:
        # The Trainer replaces it by one that has the checkpoint's state.
        return next(each for each in self.callback_handler.callbacks if isinstance(each, TaskDiagnostics))

    @property
    def collapsed_pairs(self) -> list[tuple[str, str]]:
        """The pairs of tasks that a warning of this training said have collapsed onto each other."""
        return list(dict.fromkeys((first, second) for _, first, second in self._diagnostics.collapses))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._step_begun, self._micro_batch = None, 0
        # Before anything is loaded, for a run that is resumed began with the model that it is given again.
        self._diagnostics.begin(sorted(map(list, copied_tasks(self.adapted))) if self._interval else [])
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if step == self._step_begun else 0
        self._step_begun = step
        recorded = self._records(step + 1)
        if not recorded and not self._changes_gradients:
            return super().training_step(model, inputs, *args, **kwargs)
        watch = self._watcher()
        watch.records, watch.draw = recorded, (step, self._micro_batch)
        scaler = self.accelerator.scaler
        # A micro-batch is a share of the step. Clipped as such, the sum is no longer than the argument says.
        watch.scale = (1.0 if scaler is None else scaler.get_scale()) / self.args.gradient_accumulation_steps
        watch.statistics = self._diagnostics.statistics_of(len(self.task_names))
        before = watch.seen
        with watch.attached():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if watch.seen == before:
            self._nothing_seen(watch)
        return loss

    def _nothing_seen(self, watch: TaskGradients) -> None:
        """Raise where the gradients were to be changed, and say once that there will be no figures of them."""
        why = why_no_gradients(watch.model) or (
            "no gradient of the adapters was seen: leave torch_compile off, and let training_step run the backward"
        )
        if self._changes_gradients:
            raise RuntimeError(f"max_task_grad_norm and gradient_surgery had no effect, because {why}")
        if not self._said_unseen and self.is_world_process_zero():
            warnings.warn(f"the diagnostics have no figures of gradients, because {why}", stacklevel=3)
        self._said_unseen = True

    def _records(self, step: int) -> bool:
        """Whether the gradients of this step are part of the next figures."""
        if not self._interval:
            return False
        last = self._last_of_interval(step)
        length = (last - 1) % self._interval + 1  # of the interval so far, where the training ends within it
        watched = WATCHED_STEPS if self._mixed else WATCHED_STEPS_OF_TASK * len(self.task_names)
        if last - step >= min(watched, max(1, length // _WATCHED_OF)):
            return False
        return why_no_gradients(self._watcher().model) is None

    def _last_of_interval(self, step: int) -> int:
        """The step that ends the interval which this one is in: the training's last step ends one, too."""
        last = step + -step % self._interval
        # Out of a training there is no last step.
        return min(last, self.state.max_steps) if self.state.max_steps >= step else last

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._log_figures_if_due()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._log_figures_if_due()  # the evaluation may have stopped the training

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # The evaluation may have stopped the training, and one that is resumed from here stays stopped.
        self._log_figures_if_due()
        super()._save_checkpoint(*args, **kwargs)

    def _log_figures_if_due(self) -> None:
        """Log the figures after the last step of an interval, or of a training that is stopped early."""
        step = self.state.global_step
        # At the end of an epoch the Trainer comes here again, and a resumed one without a step of its own.
        if not self._interval or self._step_begun != step - 1:
            return
        if step != self._last_of_interval(step) and not self.control.should_training_stop:
            return
        self._step_begun = None
        logs, figures = self.control.should_log, self._diagnose()
        if figures:
            self.log(figures)
        self.control.should_log = logs  # logging takes it for answered, but the Trainer has its own yet to log

    def _diagnose(self) -> dict[str, float]:
        """The figures of the interval that ends. It warns of the tasks that have collapsed and had not before."""
        model, record = self._watcher().model, self._diagnostics
        similarity = task_similarity(model)
        statistics = record.statistics_of(len(self.task_names))
        record.statistics = TaskStatistics(statistics.tasks)
        found = {**similarity.figures(), **statistics.figures(self.task_names, why_no_conflicts(model) is None)}
        collapsed = similarity.collapsed({(first, second) for first, second in record.copies})
        if len(similarity.names) > 1 and similarity.stacks:
            found["collapsed_pairs"] = float(len({pair for pairs in collapsed.values() for pair in pairs}))
        warned = {tuple(each) for each in record.collapses}
        new = {stack: [pair for pair in pairs if (stack, *pair) not in warned] for stack, pairs in collapsed.items()}
        new = {stack: pairs for stack, pairs in new.items() if pairs}
        if new:
            record.collapses += [[stack, *pair] for stack, pairs in new.items() for pair in pairs]
            if self.is_world_process_zero():
                why = collapse_explained(similarity, self.args.learning_rate, model.hyperformer_config.recipe, new)
                warnings.warn(f"at step {self.state.global_step} {why}", stacklevel=2)
        return {PREFIX + name: value for name, value in found.items() if math.isfinite(value)}


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model, to its forward or to its call."""
    return hasattr(model, "_orig_mod") or "_compiled_forward" in vars(model) or model._compiled_call_impl is not None
