"""A training that changes the gradients of tasks does so in the units that it logs, or is refused."""

from __future__ import annotations

import pytest
from rich.console import Console
from support.runs import data_folder, saved_t5, small_run, small_trainer

from hyperformer_fast.training import HyperFormerTrainer, RunError, train_run
from hyperformer_fast.training.arguments import HyperFormerTrainingArguments, RunConfigError

BOTH = {"max_task_grad_norm": 0.5, "gradient_surgery": "pcgrad", "mixed_batches": True}


class Deaf(HyperFormerTrainer):
    """Whose forwards the watch does not hear of, as those of a compiled model."""

    def compute_loss(self, model, *args, **kwargs):
        watch, model._task_gradients = model._task_gradients, None
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            model._task_gradients = watch


def figures(trainer):
    """The logged figures of the only interval."""
    (found,) = [e for e in trainer.state.log_history if any(name.startswith("diagnostics/") for name in e)]
    return {name.removeprefix("diagnostics/"): value for name, value in found.items()}


def test_clipping_bounds_the_step_of_a_task(tmp_path):
    trainer = small_trainer(tmp_path, diagnostics_steps=3, max_task_grad_norm=1e-4, max_steps=3, mixed_batches=True)
    trainer.train()
    found = figures(trainer)
    assert found["clipped/cola"] == found["clipped/stsb"] == 1 and found["gradient_norm/cola"] > 1e-4


def test_what_is_logged_is_what_the_norm_is_compared_with(tmp_path):
    """Also where the gradients of three micro-batches make a step's: each is a third as long as it is logged."""

    def logged(name, **changes):
        accumulated = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "max_steps": 1}
        trainer = small_trainer(tmp_path / name, tasks=["cola"], diagnostics_steps=1, **accumulated, **changes)
        trainer.train()
        return figures(trainer)

    norm = logged("plain")["gradient_norm/cola"]
    for name, part, cut in (("above", 1.5, 0.0), ("below", 0.5, 1.0)):
        found = logged(name, max_task_grad_norm=part * norm)
        assert found["clipped/cola"] == cut and found["gradient_norm/cola"] == pytest.approx(norm)


@pytest.mark.parametrize(
    ("tasks", "rows", "said"),
    [(("cola",), 4, "the training rows are of one task"), (("cola", "stsb"), 1, "per_device_train_batch_size is 1")],
)
def test_pcgrad_that_could_do_nothing_is_refused(tmp_path, tasks, rows, said):
    trainer = small_trainer(tmp_path, **BOTH, per_device_train_batch_size=rows, gradient_accumulation_steps=4)
    of_tasks = [row["task"] in tasks for row in trainer.train_dataset]
    trainer.train_dataset = trainer.train_dataset.select([i for i, kept in enumerate(of_tasks) if kept])
    with pytest.raises(ValueError, match=f"gradient_surgery 'pcgrad' compares .*, but {said}: it would do nothing"):
        trainer.train()


@pytest.mark.parametrize(
    "changes", [{"gradient_surgery": "pcgrad", "mixed_batches": True}, {"max_task_grad_norm": 0.5}]
)
def test_a_run_resumes_with_the_micro_batches_that_its_gradients_are_changed_in(tmp_path, changes):
    fields = {"model_name_or_path": saved_t5(tmp_path / "t5"), "data_dir": data_folder(tmp_path / "data")}
    fields |= {"tasks": ["cola", "stsb"], "max_steps": 2, "save_steps": 2, **changes}
    begun = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}

    def run(**more):
        return train_run(small_run(tmp_path / "run", **{**fields, **more}), Console(quiet=True))

    run(**begun)
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "resume_from_checkpoint": "true"}
    with pytest.raises(
        RunError, match="set per_device_train_batch_size to 4 and gradient_accumulation_steps to 2, in 1"
    ):
        run(**other, max_steps=3)
    run(**{**other, **begun}, max_steps=3)


def test_diagnostics_that_see_no_gradient_say_so_once(tmp_path):
    trainer = small_trainer(tmp_path, diagnostics_steps=2)
    trainer.__class__ = Deaf
    with pytest.warns(UserWarning, match="the diagnostics have no figures of gradients, because no gradient") as caught:
        trainer.train()
    assert sum("no figures of gradients" in str(each.message) for each in caught) == 1


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(RunConfigError, match="gradient_surgery 'pcgrad' compares .* set mixed_batches"):
        small_run(tmp_path, gradient_surgery="pcgrad")
    for name, value, message in [
        ("gradient_surgery", "pc", "gradient_surgery must be one of none, pcgrad, got 'pc'"),
        ("max_task_grad_norm", 0, "max_task_grad_norm must be above 0"),
        ("diagnostics_steps", -1, "diagnostics_steps must be at least 0"),
    ]:
        with pytest.raises(RunConfigError, match=message):
            small_run(tmp_path, **{name: value})
        with pytest.raises(RunConfigError, match=message):
            HyperFormerTrainingArguments(str(tmp_path), **{name: value})
    trainer = small_trainer(tmp_path)
    trainer.args.gradient_surgery = "pcgrad"
    again = {"model": trainer.model, "args": trainer.args, "train_dataset": trainer.train_dataset}
    again |= {"processing_class": trainer.processing_class, "tasks": trainer.tasks}
    with pytest.raises(ValueError, match="a batch has one task only: set mixed_batches=True"):
        HyperFormerTrainer(**again)
    trainer.args.mixed_batches = True
    HyperFormerTrainer(**again)
    trainer.model.compile()
    with pytest.raises(ValueError, match="leave torch_compile off"):
        HyperFormerTrainer(**again)
    with pytest.raises(ValueError, match="each task has adapters of its own"):
        small_trainer(tmp_path, variant="adapters", **{**BOTH, "max_task_grad_norm": None})


def test_a_gradient_that_is_not_seen_is_an_error(tmp_path):
    trainer = small_trainer(tmp_path, **BOTH)
    trainer.__class__ = Deaf
    with pytest.raises(RuntimeError, match="had no effect, because no gradient of the adapters was seen"):
        trainer.train()
