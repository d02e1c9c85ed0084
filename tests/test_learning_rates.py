"""Parameter groups, the rates that a rule gives them, and the Trainer's optimizer and schedule."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from support import runs, t5s
from support.runs import losses, small_run, trained
from support.t5s import batch, tiny_t5
from torch import nn
from transformers import Seq2SeqTrainer, T5ForSequenceClassification

from hyperformer_fast import get_hyperformer_model, parameter_groups
from hyperformer_fast.checkpoint import CheckpointError
from hyperformer_fast.training import RunArguments

RATE = 1e-3
VARIANTS = ("hyperformer++", "hyperformer-shared", "hyperformer", "adapters", "finetuning")


def tiny_config(**changes):
    return t5s.tiny_config(**{"recipe": "default", **changes})


def tiny_model(variant="hyperformer++", **changes):
    return t5s.tiny_model(variant, **{"recipe": "default", **changes})


def small_trainer(folder, **changes):
    return runs.small_trainer(folder, **{"recipe": "default", **changes})


def rates(groups) -> dict[str, set[float]]:
    """The rates of the groups of each name, as multiples of RATE."""
    found: dict[str, set[float]] = {}
    for group in groups:
        found.setdefault(group["name"].removesuffix(" (no decay)"), set()).add(round(group["lr"] / RATE, 9))
    return found


# Where none is given


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({}, 3e-3),
        ({"variant": "adapters"}, 3e-3),
        ({"recipe": "authors"}, 3e-4),
        ({"learning_rate_rule": "uniform"}, 3e-4),
        ({"recipe": "authors", "learning_rate_rule": "fan_in"}, 3e-3),
        ({"variant": "finetuning"}, 3e-4),
        ({"init_from": "earlier"}, 3e-4),
        ({"learning_rate": 3e-4}, 3e-4),
    ],
)
def test_a_run_has_the_rate_of_its_rule(given, rate):
    run = RunArguments.from_dict(given)
    assert run.training.learning_rate == rate
    assert RunArguments.from_dict(run.to_dict()).training.learning_rate == rate


def test_a_rate_that_is_too_low_for_the_rule_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="learning_rate=0.0003 over 6 steps may be too low for generated adapters"):
        small_trainer(tmp_path / "low", learning_rate=3e-4).train()
    for fields in ({"learning_rate": 3e-3}, {"learning_rate": 3e-4, "recipe": "authors"}, {"variant": "adapters"}):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "learning_rate")
            small_trainer(tmp_path / str(len(fields)), **{"learning_rate": 3e-4, **fields}).train()


def test_nobody_is_warned_whose_own_optimizer_has_the_rates(tmp_path):
    trainer = small_trainer(tmp_path, learning_rate=3e-4)
    trainer.optimizer = torch.optim.AdamW(parameter_groups(trainer.model, learning_rate=1e-2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "learning_rate")
        trainer.train()


# Every trained parameter is in one group


@pytest.mark.parametrize("rule", ["uniform", "fan_in"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "fields",
    [
        *({"variant": variant} for variant in VARIANTS),
        {"unfreeze_lm_head": True},  # tied to the embeddings: one parameter with several names
        {"variant": "hyperformer", "conditional_layer_norm": False, "train_task_embeddings": True},
        {"task_projector": False, "add_layer_norm_before_adapter": True},
        {"train_adapters_blocks": False},
        {"freeze_model_but_task_embeddings": True},
        {"unfreeze_layer_norms": False},
    ],
)
def test_each_trained_parameter_is_in_one_group(fields, weight_decay, rule):
    model = tiny_model(**fields)
    groups = parameter_groups(model, RATE, rule, weight_decay)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    assert groups[0]["lr"] == RATE
    optimizer = torch.optim.AdamW(groups)
    model(**batch(), task=["mnli", "stsb", "cola", "mnli"]).loss.backward()
    before = trained(model)
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in trained(model).items())


def test_the_names_and_rates_of_the_groups():
    parts = ("norms", "projectors", "projector biases", "embeddings", "generators", "generator biases")
    by_fan_in = {"generators": {round(6**-0.5, 9)}, "projectors": {round(18**-0.5, 9), round(8**-0.5, 9)}}
    assert rates(parameter_groups(tiny_model(), RATE)) == {name: {1.0} for name in parts} | by_fan_in
    assert rates(parameter_groups(tiny_model(), RATE, "uniform")) == {name: {1.0} for name in parts}
    assert rates(parameter_groups(tiny_model(recipe="authors"), RATE)) == {name: {1.0} for name in parts}
    adapters = tiny_model("adapters", unfreeze_lm_head=True)
    assert rates(parameter_groups(adapters, RATE)) == {"adapters": {1.0}, "norms": {1.0}, "head": {1.0}}
    assert rates(parameter_groups(tiny_model("finetuning"), RATE)) == {"t5": {1.0}, "norms": {1.0}}


def test_the_authors_small_projectors_move_by_the_same_fraction_under_fan_in():
    sizes = {"task_embedding_dim": 64, "projected_task_embedding_dim": 64, "task_hidden_dim": 128}
    found = rates(parameter_groups(tiny_model(recipe="authors", **sizes), RATE, "fan_in"))
    sizes = 1e-2 * (192 / 2) ** 0.5, 1e-2 * 128**0.5
    assert found["projectors"] == {round(sizes[0] / 192**0.5, 9), round(sizes[1] / 128**0.5, 9)}
    assert found["projector biases"] == {round(sizes[0], 9), round(sizes[0] * sizes[1], 9)}


def test_a_new_head_has_its_own_group():
    t5 = T5ForSequenceClassification(tiny_t5().config)
    model = get_hyperformer_model(t5, tiny_config())
    assert rates(parameter_groups(model, RATE))["head"] == {1.0}


def test_decay_is_the_trainers(tmp_path):
    trainer = small_trainer(tmp_path, recipe="authors", weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    theirs = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    groups = parameter_groups(trainer.model, RATE, weight_decay=0.1)
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == theirs
    assert len({group["name"] for group in groups}) == len(groups) and set(theirs.values()) == {0.1, 0.0}


def test_wrapped_models_and_other_ones():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner
            self.more = nn.Linear(2, 2)

    model = tiny_model()
    groups = parameter_groups(Around(model), RATE)
    assert rates(groups) == rates(parameter_groups(model, RATE)) | {"other": {1.0}}
    with pytest.raises(TypeError, match="those of a HyperFormerModel, and T5ForConditionalGeneration"):
        parameter_groups(tiny_t5(), RATE)
    with pytest.raises(ValueError, match="learning_rate_rule must be one of uniform, fan_in.*'fanin'"):
        parameter_groups(model, RATE, "fanin")


@pytest.mark.parametrize("rule", ["uniform", "fan_in"])
def test_a_step_moves_generated_weights_as_far_as_the_rate_says(rule):
    """By up to the root of k times the rate from the generator's weight, and by the rate from its bias; under "uniform"
    by up to k times it."""
    torch.manual_seed(0)
    k = 64
    config = tiny_config(task_embedding_dim=k, projected_task_embedding_dim=k, task_hidden_dim=128)
    model = get_hyperformer_model(tiny_t5(dtype=torch.float32), config)
    net = model.hypernetworks["encoder"]
    e = net.embeddings(model.task_embeddings()).detach()
    optimizer = torch.optim.Adam(parameter_groups(model, RATE, rule))

    def generated():
        return net.generator(e.flatten(0, 1).unsqueeze(0)).detach()

    before = generated()
    model(**batch(), task="mnli").loss.backward()
    optimizer.step()
    moved = (generated() - before).abs().max().item() / RATE
    assert (k**0.5 / 2 < moved < k**0.5 + 1) if rule == "fan_in" else k / 2 < moved < k + 1


# The Trainer


@pytest.mark.parametrize("fields", [{"recipe": "authors"}, {"learning_rate_rule": "uniform"}, {"variant": "adapters"}])
def test_uniform_rates_leave_the_stock_optimizer(tmp_path, fields):
    """Two groups in the stock order, so that checkpoints of earlier versions resume, and the same bits."""
    trainer = small_trainer(tmp_path, weight_decay=0.1, **fields)
    optimizer = trainer.create_optimizer()
    assert [sorted(group) for group in optimizer.param_groups] == [sorted({*optimizer.defaults, "params"})] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    stock = Seq2SeqTrainer.create_optimizer(small_trainer(tmp_path, weight_decay=0.1, **fields))
    shapes = [[[p.shape for p in group["params"]] for group in each.param_groups] for each in (optimizer, stock)]
    assert shapes[0] == shapes[1]


def test_groups_of_one_rate_train_to_the_same_bits(tmp_path):
    one, other = (small_trainer(tmp_path, recipe="authors", weight_decay=0.1) for _ in range(2))
    other.optimizer = torch.optim.AdamW(
        parameter_groups(other.model, 0.01, weight_decay=0.1), betas=(0.9, 0.999), eps=1e-8, fused=True
    )
    for trainer in (one, other):
        trainer.train()
    assert losses(one) == losses(other)
    assert all(torch.equal(value, trained(other.model)[name]) for name, value in trained(one.model).items())


def test_the_recipes_rule_is_the_trainers_and_the_log_has_the_rate_that_was_set(tmp_path):
    trainer = small_trainer(tmp_path, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.1)
    trainer.train()
    groups = trainer._plain_optimizer.param_groups
    assert rates([{**group, "lr": group["lr"] * RATE / 0.01} for group in groups])["generators"] == {0.5}
    assert {group["weight_decay"] for group in groups if group["name"] == "generators"} == {0.1}
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged and set(logged) == {0.01}


def test_a_schedule_scales_every_rate(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=4, warmup_steps=2)
    trainer.create_optimizer_and_scheduler(4)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    for factor in (0.0, 0.5, 1.0, 0.5):
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found["norms"] == pytest.approx(0.01 * factor) and found["generators"] == pytest.approx(0.005 * factor)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("optim", "args"), [("adafactor", None), ("sgd", "momentum=0.5"), ("adamw_torch", None), ("rmsprop", None)]
)
def test_other_optimizers_have_the_rates(tmp_path, optim, args):
    trainer = small_trainer(tmp_path, optim=optim, **({"optim_args": args} if args else {}))
    trainer.train()
    groups = trainer._plain_optimizer.param_groups
    assert {group["name"] for group in groups} >= {"generators", "projectors", "embeddings"}
    assert all(value.isfinite().all() for value in trained(trainer.model).values())


def test_an_optimizer_of_ones_own_is_left_alone(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.optimizer = own = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=0.5)
    assert trainer.create_optimizer() is own and len(own.param_groups) == 1 and own.param_groups[0]["lr"] == 0.5


def test_an_optimizer_without_groups_is_refused(tmp_path):
    trainer = small_trainer(tmp_path)

    class OneGroup(torch.optim.SGD):
        def __init__(self, params, **kwargs):
            super().__init__([torch.nn.Parameter(torch.zeros(1))], **kwargs)

    trainer.optimizer_cls_and_kwargs = OneGroup, {"lr": 0.1}
    with pytest.raises(ValueError, match="learning_rate_rule='fan_in'.*which OneGroup is not.*\"uniform\""):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate_rule": "fan-in"}, "learning_rate_rule must be one of uniform, fan_in, got 'fan-in'"),
        ({"embedding_warmup_steps": -1}, "embedding_warmup_steps must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        type(RunArguments().training)(**fields)


def test_the_stock_trainer_takes_the_groups(tmp_path):
    """As the docstring of parameter_groups says."""
    ours = small_trainer(tmp_path)
    groups = parameter_groups(ours.model, learning_rate=0.01, weight_decay=0.01)
    args = ours.args
    trainer = Seq2SeqTrainer(
        ours.model,
        args,
        optimizers=(torch.optim.AdamW(groups), None),
        train_dataset=ours.train_dataset.select(range(4)).remove_columns("task_index"),
        data_collator=lambda rows: {**ours.data_collator(rows), "task": "cola"},
    )
    before = trained(ours.model)
    trainer.train()
    assert trainer.state.log_history[2]["learning_rate"] == pytest.approx(0.01)
    assert all(
        not torch.equal(value, before[name]) for name, value in trained(ours.model).items() if "stsb" not in name
    )


# Resuming, and the warm-up of the embeddings


def embedding_rates(trainer):
    return [group["lr"] for group in trainer._plain_optimizer.param_groups if group["name"] == "embeddings"]


def test_embeddings_warm_up_by_themselves(tmp_path):
    trainer = small_trainer(tmp_path, embedding_warmup_steps=4, warmup_steps=0, lr_scheduler_type="constant")
    trainer.create_optimizer_and_scheduler(6)
    for factor in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        assert embedding_rates(trainer) == pytest.approx([0.01 * factor])
        assert trainer.optimizer.param_groups[0]["lr"] == 0.01 and trainer._get_learning_rate() == 0.01
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_embeddings_do_not_move_in_the_first_step_of_their_warm_up(tmp_path):
    trainer = small_trainer(
        tmp_path, embedding_warmup_steps=2, warmup_steps=0, max_steps=1, learning_rate_rule="uniform", weight_decay=0.1
    )
    before = trained(trainer.model)
    trainer.train()
    for name, value in trained(trainer.model).items():
        assert torch.equal(value, before[name]) == ("embeddings" in name), name


@pytest.mark.parametrize("changes", [{}, {"embedding_warmup_steps": 5}])
def test_a_resumed_run_has_the_bits_of_one_that_went_through(tmp_path, changes):
    fields = {"save_steps": 2, "weight_decay": 0.1, "save_total_limit": 5, **changes}
    whole = small_trainer(tmp_path / "whole", dropout=0.1, **fields)
    whole.train()
    again = small_trainer(tmp_path / "whole", dropout=0.1, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    assert all(torch.equal(value, trained(whole.model)[name]) for name, value in trained(again.model).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate_rule": "uniform", "embedding_warmup_steps": 0}, "parameter groups"),
        ({"embedding_warmup_steps": 3}, "embedding_warmup_steps"),
    ],
)
def test_other_rates_do_not_resume(tmp_path, changes, message):
    fields = {"save_steps": 3, "embedding_warmup_steps": 5}
    small_trainer(tmp_path, **fields).train()
    with pytest.raises(CheckpointError, match=message):
        small_trainer(tmp_path, **{**fields, **changes}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "adapters"}, "embedding_warmup_steps=2 needs embeddings.*'adapters'"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 2, "metric_for_best_model": "loss"},
            "embedding_warmup_steps=2 needs a schedule.*ReduceLROnPlateau is not",
        ),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(tmp_path, changes, message):
    trainer = small_trainer(tmp_path, embedding_warmup_steps=2, **changes)
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer_and_scheduler(6)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_rates_that_deepspeed_would_not_have_are_refused(section, tmp_path, monkeypatch):
    """DeepSpeed itself is not needed to see what its configuration asks for."""
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}, section: {"type": "AdamW", "params": {}}})
    plain = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}})

    def ask(plugin, **fields):
        trainer = small_trainer(tmp_path, max_steps=1, **fields)
        monkeypatch.setattr(trainer.accelerator, "state", types.SimpleNamespace(deepspeed_plugin=plugin))
        trainer._expect_own_rates()

    own = types.SimpleNamespace(hf_ds_config=config)
    message = f"learning_rate_rule='fan_in' and .* DeepSpeed's configuration has '{section}' of its own.*remove that"
    with pytest.raises(ValueError, match=message):
        ask(own, recipe="default")
    with pytest.raises(ValueError, match="embedding_warmup_steps=3 need"):
        ask(own, recipe="authors", embedding_warmup_steps=3)
    ask(own, recipe="default", learning_rate_rule="uniform")
    ask(own, recipe="authors")
    ask(types.SimpleNamespace(hf_ds_config=plain), recipe="default")


def test_a_training_asks_whether_its_rates_are_its_own(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, max_steps=1, recipe="default")
    config = HfDeepSpeedConfig({"optimizer": {"type": "AdamW"}})
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", types.SimpleNamespace(hf_ds_config=config))
    with pytest.raises(ValueError, match="DeepSpeed's configuration has 'optimizer' of its own"):
        trainer.train()
    assert trainer.optimizer is None and trainer.state.global_step == 0
