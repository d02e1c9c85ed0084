"""Small trainings by HyperFormerTrainer that one process and two must end alike."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hyperformer_fast.training import HyperFormerTrainer
from support.runs import losses, small_trainer

FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["T5Block"]},
}

#: Arguments of the trainings. Targets are of unequal length, so that processes have unequal numbers of labels.
CASES = {
    "one task": {"gradient_accumulation_steps": 2, "recipe": "default"},
    "mixed": {
        "mixed_batches": True,
        "gradient_accumulation_steps": 2,
        "label_smoothing_factor": 0.1,
        "diagnostics_steps": 2,
    },
    # A sum has a larger gradient, by the number of tokens.
    "sum": {"mixed_batches": True, "loss_reduction": "sum", "learning_rate": 1e-3},
    "bf16": {"mixed_batches": True, "bf16": True},
    "fsdp bf16": {"mixed_batches": True, "bf16": True},
    "fsdp": {
        "mixed_batches": True,
        "learning_rate": 1e-3,
        "unfreeze_lm_head": True,
        "save_steps": 2,
        "save_total_limit": None,
        "recipe": "default",
        "embedding_warmup_steps": 3,
        "diagnostics_steps": 2,
    },
}


def forget_accelerator() -> None:
    """Let the next Trainer of this process have another kind of distribution, and another precision, than the last."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def run_case(folder: Path, name: str, processes: int, resume: str | None = None) -> HyperFormerTrainer:
    """Train one of CASES in ``folder``, with as many examples per step whatever the number of processes."""
    forget_accelerator()
    fields = {
        "max_steps": 4, "optim": "adamw_torch" if name == "fsdp" else "sgd", "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes, **CASES[name],
    }  # fmt: skip
    if name.startswith("fsdp") and processes > 1:
        fields |= FSDP
    trainer = small_trainer(folder, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def result(trainer: HyperFormerTrainer) -> dict:
    """What must be the same: losses, figures of the tasks, trained parameters, and the texts for a number of rows that
    two do not divide."""
    from hyperformer_fast.sharding import whole

    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
    texts = {
        task: trainer.evaluate_task(task, rows.select(range(5))).texts for task, rows in trainer.eval_dataset.items()
    }
    log = {"losses": torch.tensor(losses(trainer)), "figures": similarities(trainer)}
    return {**log, "weights": found, "texts": texts}


def similarities(trainer: HyperFormerTrainer) -> dict[str, torch.Tensor]:
    """The logged figures that are those of the weights, by step and name. Each process has gradients of its own."""
    return {
        f"{entry['step']} {name}": torch.tensor(value)
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name.startswith("diagnostics/") and "/gradient_" not in name
    }
