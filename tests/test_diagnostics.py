"""Diagnostics, clipping of each task and PCGrad in a training: through the Trainer and through the command."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import SMALL, data_folder, losses, saved_t5, small_trainer, trained
from support.task_gradients import on_generators, stated_pcgrad
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from hyperformer_fast import task_gradients
from hyperformer_fast.cli import main
from hyperformer_fast.task_gradients import TaskGradients, pcgrad_order
from hyperformer_fast.task_similarity import COLLAPSED, task_similarity
from hyperformer_fast.training import HyperFormerTrainer, RunArguments, diagnostics
from hyperformer_fast.training.diagnostics_plot import has_diagnostics, plot_diagnostics

THREE = ("cola", "stsb", "mrpc")
BOTH = {"max_task_grad_norm": 0.5, "gradient_surgery": "pcgrad", "mixed_batches": True}


def figures(trainer) -> list[dict]:
    """The logged figures, without their prefix, with their steps."""
    found = [e for e in trainer.state.log_history if any(name.startswith("diagnostics/") for name in e)]
    return [{name.removeprefix("diagnostics/"): value for name, value in entry.items()} for entry in found]


def test_figures_are_logged_every_so_many_steps(tmp_path):
    fields = {"mixed_batches": True, "tasks": THREE, "per_device_train_batch_size": 12}
    trainer = small_trainer(tmp_path, diagnostics_steps=3, **fields)
    trainer.train()
    first, last = figures(trainer)
    assert (first["step"], last["step"]) == (3, 6)
    shares = [last[f"gradient_share/{task}"] for task in THREE]
    assert sum(shares) == pytest.approx(1) and all(0 < share < 1 for share in shares)
    pairs = [last[f"gradient_cosine/{pair}"] for pair in ("cola/stsb", "cola/mrpc", "stsb/mrpc")]
    assert last["gradient_cosine_min"] == min(pairs)
    assert 0 <= last["gradient_conflicts"] <= 1 and last["collapsed_pairs"] >= 0
    now = task_similarity(trainer.model).figures()
    assert {name: last[name] for name in now} == pytest.approx(now)
    assert "clipped/cola" not in last
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_a_reporter_gets_them(tmp_path):
    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            got.append((state.global_step, {name: v for name, v in logs.items() if name.startswith("diagnostics/")}))

    got = []
    trainer = small_trainer(tmp_path, diagnostics_steps=2, max_steps=3, mixed_batches=True, callbacks=[Reporter()])
    trainer.train()
    got = [(step, logs) for step, logs in got if logs]
    assert [step for step, _ in got] == [2, 3]
    assert all({"diagnostics/encoder/weight_variation", "diagnostics/collapsed_pairs"} <= set(logs) for _, logs in got)
    assert any(name.startswith("diagnostics/gradient_share/") for name in got[0][1])


def test_a_batch_of_one_task_has_no_conflicts_but_norms(tmp_path):
    trainer = small_trainer(tmp_path, diagnostics_steps=20, max_steps=20)
    trainer.train()
    (only,) = figures(trainer)
    assert {"gradient_norm/cola", "gradient_norm/stsb"} <= set(only)  # seen in different steps
    assert not any(name.startswith("gradient_co") for name in only)


@pytest.mark.parametrize("changes", [{}, BOTH], ids=["off", "on"])
def test_diagnostics_change_no_bit_of_the_training(tmp_path, changes):
    found = []
    for steps in (0, 1):
        trainer = small_trainer(tmp_path, 0.1, max_steps=3, diagnostics_steps=steps, **{**changes})
        trainer.train()
        found.append((losses(trainer), trained(trainer.model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def watched_steps(trainer, monkeypatch) -> list[int]:
    """The steps of a training in which gradients are watched, once for each micro-batch."""
    watched = []
    original = TaskGradients.generate

    def generate(self, *arguments):
        watched.append(trainer.state.global_step + 1)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TaskGradients, "generate", generate)
        trainer.train()
    return watched


def test_only_the_last_steps_of_an_interval_are_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "WATCHED_STEPS", 2)
    fields = {"diagnostics_steps": 15, "max_steps": 15, "mixed_batches": True, "gradient_accumulation_steps": 2}
    assert watched_steps(small_trainer(tmp_path, **fields), monkeypatch) == [14, 14, 15, 15]


@pytest.mark.parametrize("mixed", [False, True])
def test_at_most_a_fifth_of_the_steps_is_watched(tmp_path, monkeypatch, mixed):
    """However many tasks there are. A watched step costs some 4 % more, and all steps together less than 1 %."""
    trainer = small_trainer(tmp_path, diagnostics_steps=10, max_steps=10, tasks=THREE, mixed_batches=mixed)
    assert watched_steps(trainer, monkeypatch) == [9, 10]
    trainer = small_trainer(tmp_path, diagnostics_steps=2, max_steps=4, tasks=THREE, mixed_batches=mixed)
    assert watched_steps(trainer, monkeypatch) == [2, 4]


def test_the_end_of_a_training_ends_an_interval(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, diagnostics_steps=5, max_steps=8)
    assert watched_steps(trainer, monkeypatch) == [5, 8]
    assert [each["step"] for each in figures(trainer)] == [5, 8]
    assert any(name.startswith("gradient_norm") for name in figures(trainer)[1])
    first = figures(trainer)
    trainer.train()  # another training is one of its own
    assert [each["step"] for each in figures(trainer)] == [5, 8] and figures(trainer) != first


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_a_training_that_is_stopped_early_has_its_figures_once(tmp_path, event):
    """In its checkpoint, too, from which a run that is resumed stays stopped."""

    def stop(args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3

    callback = TrainerCallback()
    setattr(callback, event, stop)
    fields = {"diagnostics_steps": 4, "save_steps": 3, "eval_steps": 3, "mixed_batches": True}
    trainer = small_trainer(tmp_path, callbacks=[callback], **fields)
    trainer.train()
    assert [each["step"] for each in figures(trainer)] == [3] and trainer.state.global_step == 3
    again = small_trainer(tmp_path, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert figures(again) == figures(trainer)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_pcgrad_and_clipping_is_that_of_naive_gradients(tmp_path, accumulation):
    """Each micro-batch again, with a backward for each task, in the order that the run drew."""
    limit, kept = 0.05, []

    class Naive(HyperFormerTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            index, names = inputs["task_index"], [n for n, p in model.named_parameters() if p.requires_grad]
            vectors = []
            for task in range(len(THREE)):
                labels = torch.where((index == task).unsqueeze(1), inputs["labels"], -100)
                logits = model(**inputs).logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
                wanted = [p for p in model.parameters() if p.requires_grad]
                found = torch.autograd.grad(loss / num_items_in_batch, wanted, allow_unused=True)
                vector = on_generators({n: g for n, g in zip(names, found, strict=True) if g is not None})
                vectors.append(vector * min(1.0, limit / accumulation / max(float(vector.norm()), 1e-30)))
            draw = [self.args.seed, 0, 0, len(kept)]
            kept.append(stated_pcgrad(vectors, pcgrad_order(len(vectors), draw)))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = small_trainer(
        tmp_path, max_steps=1, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, learning_rate=1.0,
        gradient_accumulation_steps=accumulation, max_grad_norm=0.0, **{**BOTH, "max_task_grad_norm": limit},
        tasks=THREE, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.__class__ = Naive
    before = trained(trainer.model)
    trainer.train()
    moved = on_generators({name: before[name] - value for name, value in trained(trainer.model).items()})
    assert len(kept) == accumulation
    torch.testing.assert_close(moved, sum(kept), rtol=1e-4, atol=1e-7)
    assert moved.norm() > 1e-3


def test_a_run_with_pcgrad_resumes_to_the_same_bits_and_figures(tmp_path, monkeypatch):
    """Saved within the steps that are watched."""
    drawn = []
    monkeypatch.setattr(task_gradients, "pcgrad_order", lambda T, draw: drawn.append(draw) or pcgrad_order(T, draw))
    changes = {"dropout": 0.1, "tasks": THREE, "max_steps": 12, "save_steps": 9, "diagnostics_steps": 10, **BOTH}
    changes |= {"save_total_limit": None}
    whole = small_trainer(tmp_path / "whole", **changes)
    whole.train()
    orders = list(drawn)
    drawn.clear()
    again = small_trainer(tmp_path / "whole", **changes)
    torch.manual_seed(77)
    np.random.seed(77)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    expected = trained(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in trained(again.model).items())
    assert losses(again) == losses(whole)
    assert figures(again) == figures(whole) and [each["step"] for each in figures(whole)] == [10, 12]
    assert drawn == [draw for draw in orders if draw[-2] >= 9] and len(drawn) > 1


def test_a_collapse_is_warned_of_once(tmp_path):
    trainer = small_trainer(tmp_path, diagnostics_steps=2, tasks=THREE)
    with torch.no_grad():
        for net in trainer.model.hypernetworks.values():
            net.projector[0].bias.fill_(-100.0)
    with pytest.warns(UserWarning, match="at step 2 tasks have collapsed onto each other: in the encoder") as caught:
        trainer.train()
    said = [str(each.message) for each in caught if "collapsed" in str(each.message)]
    assert len(said) == 1 and "'cola' and 'stsb' and 2 more of 3 pairs" in said[0]
    assert "projector makes the same of their different embeddings" in said[0]
    assert [each["collapsed_pairs"] for each in figures(trainer)] == [3, 3, 3]


def test_a_healthy_run_is_not_warned_of_a_collapse(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*collapsed")
        # widths at which embeddings that are drawn at random are far apart, and the recipe that leaves them there
        wide = {"task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 128}
        wide |= {"recipe": "default"}
        trainer = small_trainer(tmp_path, diagnostics_steps=1, tasks=THREE, max_steps=12, learning_rate=3e-4, **wide)
        trainer.train()
    assert all(each["encoder/weight_variation"] > 10 * COLLAPSED for each in figures(trainer))


def test_a_second_training_of_a_trainer_begins_anew(tmp_path, monkeypatch):
    class Passes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer._diagnostics.state()["attributes"]["sums"]["passes"])

    seen, drawn = [], []
    trainer = small_trainer(tmp_path, diagnostics_steps=4, max_steps=1, tasks=THREE, callbacks=[Passes()], **BOTH)
    monkeypatch.setattr(task_gradients, "pcgrad_order", lambda T, draw: drawn.append(draw) or pcgrad_order(T, draw))
    trainer.train()
    trainer.train()
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    assert seen == [[1, 1, 1]] * 2


@pytest.mark.parametrize("variant", ["hyperformer++", "adapters"])
def test_a_task_that_begins_as_anothers_copy_has_not_collapsed(tmp_path, variant):
    fields = {"diagnostics_steps": 2, "tasks": THREE, "variant": variant, "save_steps": 2, "learning_rate": 1e-6}
    trainer, resumed = small_trainer(tmp_path, **fields), small_trainer(tmp_path, **fields)
    copy(trainer.model, "cola", "mrpc")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*collapsed")
        trainer.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [each["collapsed_pairs"] for each in figures(trainer)] == [0, 0, 0]
    assert figures(resumed) == figures(trainer)


def test_other_pairs_than_copies_are_warned_of(tmp_path):
    trainer = small_trainer(tmp_path, diagnostics_steps=2, max_steps=2, tasks=THREE)
    copy(trainer.model, "cola", "mrpc")
    with torch.no_grad():
        for net in trainer.model.hypernetworks.values():
            net.projector[0].bias.fill_(-100.0)
    with pytest.warns(UserWarning, match="'cola' and 'stsb' and 1 more of 3 pairs"):
        trainer.train()


def copy(model, source, task):
    """Let a task begin as ``add_task`` lets it that is given the task to begin from."""
    tables = [net.adapters for net in model.hypernetworks.values() if hasattr(net, "adapters")]
    with torch.no_grad():
        for table in tables or [model.task_embeddings.task_to_embeddings]:
            table[task].copy_(table[source])


@pytest.mark.parametrize("variant", ["hyperformer-shared", "hyperformer", "adapters", "finetuning"])
def test_every_method_has_the_figures_that_make_sense(tmp_path, variant):
    fields = {"mixed_batches": True, "per_device_train_batch_size": 12}
    trainer = small_trainer(tmp_path, diagnostics_steps=2, max_steps=2, variant=variant, **fields)
    trainer.train()
    found = figures(trainer)
    if variant == "finetuning":
        assert found == [] and all(len(entry) > 2 for entry in trainer.state.log_history)
        return
    assert ("encoder/input_cosine_mean" in found[0]) == (variant != "adapters")
    assert ("gradient_cosine_mean" in found[0]) == (variant != "adapters")
    assert "gradient_share/cola" in found[0]


def test_tasks_that_share_adapters_have_cosines_and_pcgrad(tmp_path):
    sharing = {"cola": "both", "stsb": "own", "mrpc": "both"}
    fields = {"variant": "adapters", "tasks": THREE, "per_device_train_batch_size": 12, "max_steps": 2}
    trainer = small_trainer(tmp_path, diagnostics_steps=2, task_to_embeddings=sharing, **fields, **BOTH)
    trainer.train()
    (only,) = figures(trainer)
    assert abs(only["gradient_cosine/cola/mrpc"]) > 10 * abs(only["gradient_cosine/cola/stsb"])
    assert "clipped/mrpc" in only


def test_frozen_generators_have_no_gradient_figures(tmp_path):
    trainer = small_trainer(tmp_path, diagnostics_steps=2, max_steps=2, freeze_model_but_task_embeddings=True)
    trainer.train()
    (only,) = figures(trainer)
    assert "task_embedding_cosine_mean" in only and not any(name.startswith("gradient") for name in only)


def test_plain_arguments_ask_for_nothing(tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    small = small_trainer(tmp_path)
    rows, tokenizer = small.train_dataset, small.processing_class
    trainer = HyperFormerTrainer(small.model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert figures(trainer) == []
    assert RunArguments.from_dict({}).training.diagnostics_steps == 100


def test_the_command_logs_and_plots_them(tmp_path, capsys):
    fields = {"model_name_or_path": saved_t5(tmp_path / "t5"), "data_dir": data_folder(tmp_path / "data"), **SMALL}
    fields |= {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "diagnostics_steps": 2, **BOTH}
    fields |= {"output_dir": tmp_path / "run"}
    assert main(["train", *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [each["step"] for each in history if "diagnostics/gradient_cosine/cola/stsb" in each] == [2, 4]
    assert "curves.png and diagnostics.png are in" in capsys.readouterr().out.replace("\n", " ")
    with Image.open(tmp_path / "run" / "diagnostics.png") as image:
        assert image.size[0] > 1000


def test_a_short_run_has_its_figures_in_its_history(tmp_path):
    fields = {"model_name_or_path": saved_t5(tmp_path / "t5"), "data_dir": data_folder(tmp_path / "data"), **SMALL}
    fields |= {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "output_dir": tmp_path / "run"}
    assert main(["train", *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [each["step"] for each in history if "diagnostics/encoder/weight_variation" in each] == [3]
    assert any("diagnostics/gradient_share/" in name for name in history[-2] | history[-1])
    assert (tmp_path / "run" / "diagnostics.png").exists()


def test_any_history_is_plotted(tmp_path):
    many = {f"diagnostics/gradient_share/_task{i}": 1 / 31 for i in range(31)}
    odd = {"diagnostics/encoder/weight_variation": 0.0, "diagnostics/gradient_cosine_mean": math.pi / 9, "step": 5}
    for name, history in {"none": [], "one": [{"step": 3, **many}], "odd": [{"loss": 1.0, "step": 1}, odd]}.items():
        plot_diagnostics(history, tmp_path / f"{name}.png", "$x_1")
        assert Path(tmp_path / f"{name}.png").stat().st_size
        assert has_diagnostics(history) == (name != "none")


def test_a_collapse_that_follows_another_is_warned_of_when_it_is_found(tmp_path):
    """Once for each stack and pair, also in a run that is resumed."""
    collapse = {2: ("encoder",), 6: ("encoder", "decoder")}

    class Collapse(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for stack in collapse.get(state.global_step, ()):
                with torch.no_grad():
                    model.hypernetworks[stack].projector[0].bias.fill_(-100.0)
            seen.append((state.global_step, len(caught)))

    fields = {"diagnostics_steps": 2, "tasks": THREE, "max_steps": 8, "save_steps": 4, "callbacks": [Collapse()]}
    fields |= {"recipe": "default", "learning_rate": 1e-6, "task_embedding_dim": 64, "task_hidden_dim": 128}
    fields |= {"projected_task_embedding_dim": 64}
    found = []
    for start in (None, str(tmp_path / "checkpoint-4")):
        seen: list[tuple[int, int]] = []
        trainer = small_trainer(tmp_path, **fields)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=start)
        said = [str(each.message) for each in caught if "collapsed" in str(each.message)]
        found.append([(text.split(" tasks")[0], "in the encoder" in text, "in the decoder" in text) for text in said])
        assert trainer.collapsed_pairs == [("cola", "stsb"), ("cola", "mrpc"), ("stsb", "mrpc")]
        if start is None:
            counts = dict(seen)
            assert counts[2] < counts[3] == counts[6] < counts[7], "each is said in the step after which it was found"
    assert found == [[("at step 2", True, False), ("at step 6", False, True)], [("at step 6", False, True)]]


def test_the_command_says_at_once_and_at_the_end_that_tasks_have_collapsed(tmp_path, capsys):
    fields = {"model_name_or_path": saved_t5(tmp_path / "t5"), "data_dir": data_folder(tmp_path / "data"), **SMALL}
    fields |= {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "diagnostics_steps": 2}
    fields |= {"output_dir": tmp_path / "run", "init_weights": "authors", "learning_rate": 10.0, "warmup_steps": 0}
    with pytest.warns(UserWarning, match=r"at step \d tasks have collapsed onto each other") as caught:
        assert main(["train", *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]) == 0
    stacks = [stack for each in caught for stack in ("encoder", "decoder") if f"in the {stack}" in str(each.message)]
    assert len(stacks) == len(set(stacks))
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "warning: 'cola' and 'stsb' collapsed onto each other while training (see above)"
