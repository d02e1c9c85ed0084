"""The Trainer's optimizer and schedule: a learning rate for each part of the model, and the embeddings' warm-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..learning_rates import EMBEDDINGS, place_parameters, split_groups
from ..recipes import learning_rate_rule
from .checkpointing import CheckpointingTrainer

#: A sum of rates below which generators whose rate is divided may have learned too little, and the highest rate that is
#: warned of. A rate of 3e-4 over 300 steps, a tenth of that sum, is 9 points behind 3e-3 in docs/choosing.md.
_TOO_SHORT, _LOW = 1.0, 1e-3

#: The sections of DeepSpeed's configuration that take the place of the Trainer's optimizer and schedule.
_OF_DEEPSPEED = ("optimizer", "scheduler")


class _WarmedUp:
    """A schedule whose first ``steps`` steps rise linearly from 0 to what it is."""

    # A scheduler saves the __dict__ of such an object: the length, and not the schedule, which is no plain value.
    __slots__ = ("__dict__", "_schedule")

    def __init__(self, schedule: Callable[[int], float], steps: int):
        self._schedule, self.embedding_warmup_steps = schedule, steps

    def __call__(self, step: int) -> float:
        return self._schedule(step) * min(1.0, step / self.embedding_warmup_steps)


class OptimizingTrainer(CheckpointingTrainer):
    """Makes the optimizer and its schedule; :class:`HyperFormerTrainer` says how."""

    _divides_rates = False  # whether the optimizer is made here, and parts of the model have others than the rate set

    @property
    def _embedding_warmup_steps(self) -> int:
        steps: int = getattr(self.args, "embedding_warmup_steps", 0)
        return steps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments ask for, with the rates of ``learning_rate_rule``.

        One that was passed to the Trainer is left as it is. Where all parts have one rate the groups are the stock
        Trainer's, so that checkpoints of earlier versions are resumed.
        """
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if given:
            return optimizer
        rule, several = self._rates()
        self._divides_rates = several
        if several or self._embedding_warmup_steps:
            split_groups(optimizer, self.adapted, rule)
        return optimizer

    def _rates(self) -> tuple[str, bool]:
        """Return the rule of learning rates, and whether parts of the model have others than the one that is set."""
        rule = learning_rate_rule(self.adapted.hyperformer_config, getattr(self.args, "learning_rate_rule", None))
        places = place_parameters(self.adapted, rule)
        return rule, any(places[id(p)].scale != 1 for p in self.adapted.parameters() if p.requires_grad)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._expect_own_rates()
        inner: Any = super()._inner_training_loop
        return inner(*args, **kwargs)

    def _expect_own_rates(self) -> None:
        """Raise ValueError where DeepSpeed would make an optimizer or a schedule that has one rate for everything."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        taken = [] if plugin is None else [name for name in _OF_DEEPSPEED if name in plugin.hf_ds_config.config]
        if not taken:
            return
        rule, several = self._rates()
        if several or self._embedding_warmup_steps:
            raise ValueError(
                f"learning_rate_rule={rule!r} and embedding_warmup_steps={self._embedding_warmup_steps} need the "
                f"Trainer's optimizer and schedule, but DeepSpeed's configuration has {' and '.join(map(repr, taken))} "
                "of its own, where all parameters have one learning rate: remove that from DeepSpeed's configuration, "
                'or set learning_rate_rule="uniform" and embedding_warmup_steps=0'
            )

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        new = self.lr_scheduler is None
        if new:
            self._warn_of_a_low_rate(num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if new and self._embedding_warmup_steps:
            self._warm_up_embeddings(scheduler, self._embedding_warmup_steps)
        return scheduler

    def _warn_of_a_low_rate(self, steps: int) -> None:
        rate = self.args.learning_rate
        if rate < _LOW and rate * steps < _TOO_SHORT and self._divides_rates:
            warnings.warn(
                f"learning_rate={rate:g} over {steps} steps may be too low for generated adapters: the model's rule of "
                'learning rates, "fan_in", divides that of the generators, and wants some 3e-3 to 1e-2 '
                "(docs/choosing.md)",
                stacklevel=2,
            )

    def _warm_up_embeddings(self, scheduler: Any, steps: int) -> None:
        groups = [i for i, g in enumerate(scheduler.optimizer.param_groups) if g.get("name", "").startswith(EMBEDDINGS)]
        if not groups:
            raise ValueError(
                f"embedding_warmup_steps={steps} needs embeddings in a parameter group of their own: there are none in "
                f"variant {self.adapted.hyperformer_config.variant!r}, or in an optimizer whose groups are not those "
                "of hyperformer_fast.parameter_groups"
            )
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"embedding_warmup_steps={steps} needs a schedule that is a function of the step, which "
                f"{type(scheduler).__name__} is not: choose another lr_scheduler_type"
            )
        for i in groups:
            scheduler.lr_lambdas[i] = _WarmedUp(scheduler.lr_lambdas[i], steps)
            scheduler.optimizer.param_groups[i]["lr"] = 0.0  # what the schedule now says of step 0
            scheduler._last_lr[i] = 0.0
