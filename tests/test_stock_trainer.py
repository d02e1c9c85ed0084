"""Hugging Face's own Seq2SeqTrainer, with nothing of ours but the model: it saves, resumes, and loads the best."""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.t5s import TASKS, tiny_model, tiny_t5

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("datasets", reason="needs datasets")

from datasets import Dataset
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hyperformer_fast import HyperFormerModel, get_hyperformer_model
from hyperformer_fast.checkpoint import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*deprecated:FutureWarning")

GENERATION_4 = transformers.__version__.startswith("4.")


def rows(count=16, seed=3):
    """Examples of all tasks, in turn; the labels are of one length, so that a mean over tokens is one over rows."""
    draw = torch.Generator().manual_seed(seed)
    numbers = lambda n: torch.randint(2, 64, (n,), generator=draw).tolist()  # noqa: E731
    lengths = [4 + i % 3 for i in range(count)]
    return Dataset.from_list(
        [
            {"input_ids": numbers(n), "attention_mask": [1] * n, "labels": numbers(3), "task_index": i % len(TASKS)}
            for i, n in enumerate(lengths)
        ]
    )


def small_trainer(folder, model=None, metrics=None, data=None, **changes):
    model = tiny_model(t5=tiny_t5(dtype=torch.float32, dropout=0.1)).train() if model is None else model
    fields = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps" if metrics else "no",
        "eval_steps": 2,
        "save_steps": 2,
        "predict_with_generate": True,
        "generation_max_length": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    tokenizer = ByT5Tokenizer()  # pads what are numbers already
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**{**fields, **changes}),
        train_dataset=data or rows(),
        eval_dataset=rows(4, seed=4),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=metrics,
    )


def trained_values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def example(monkeypatch):
    """The user's script in examples/, on fewer rows."""
    path = Path(__file__).parents[1] / "examples" / "stock_trainer.py"
    if not path.is_file():
        pytest.skip("needs examples/, which an installed package lacks")
    spec = importlib.util.spec_from_file_location("stock_trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    load = module.load_rows
    monkeypatch.setattr(module, "load_rows", lambda split: load(split).select(range(24)))
    return module


def test_the_example_resumed_is_the_example_uninterrupted(example, tmp_path, caplog, capsys):
    steps = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--use_cpu", "true"]
    steps += ["--per_device_train_batch_size", "8", "--disable_tqdm", "true"]
    whole = example.main([*steps, "--output_dir", str(tmp_path / "whole")])
    assert "test_accuracy" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        again = example.main([*steps, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "true"])
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert len(losses(whole)) == 4 and losses(again) == losses(whole)
    for step in (2, 4):
        mine, theirs = (
            load_file(tmp_path / run / f"checkpoint-{step}/model.safetensors") for run in ("whole", "again")
        )
        assert same(mine, theirs)
    evaluated = [[e for e in t.state.log_history if "eval_accuracy" in e] for t in (whole, again)]
    assert [e["eval_loss"] for e in evaluated[0]] == [e["eval_loss"] for e in evaluated[1]]
    alone = HyperFormerModel.from_pretrained(tmp_path / "again")
    assert same(dict(alone.named_parameters()), dict(again.model.named_parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_the_best_is_loaded_at_the_end_and_ties_stay(tmp_path, tied, caplog):
    t5 = tiny_t5(dtype=torch.float32, tied=tied)
    model = tiny_model(t5=t5, unfreeze_lm_head=True)
    scores = iter([3.0, 1.0])  # the first evaluation is the best
    trainer = small_trainer(
        tmp_path,
        model,
        lambda evaluation: {"score": next(scores)},
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "missing keys" not in caplog.text and "Could not locate" not in caplog.text
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best, last = (load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in (2, 4))
    found = trained_values(model)
    assert all(torch.equal(value, best[name]) for name, value in found.items())
    assert any(not torch.equal(value, last[name]) for name, value in found.items())
    assert (t5.lm_head.weight is t5.shared.weight) is tied and t5.encoder.embed_tokens.weight is t5.shared.weight


@pytest.mark.parametrize("variant", ["adapters", "finetuning", "hyperformer"])
def test_other_variants_resume_too(tmp_path, variant):
    fresh = lambda: tiny_model(variant, t5=tiny_t5(dtype=torch.float32, dropout=0.1)).train()  # noqa: E731
    whole = small_trainer(tmp_path / "whole", fresh())
    whole.train()
    again = small_trainer(tmp_path / "again", fresh())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again) == losses(whole) and same(trained_values(again.model), trained_values(whole.model))
    alone = HyperFormerModel.from_pretrained(tmp_path / "again" / "checkpoint-4", t5=tiny_t5(dtype=torch.float32))
    assert same(trained_values(alone), trained_values(whole.model))
    assert alone.t5.lm_head.weight is alone.t5.shared.weight


def checkpoint_of(folder, **changes):
    small_trainer(folder, tiny_model(t5=tiny_t5(dtype=torch.float32), **changes), max_steps=2).train()
    return str(folder / "checkpoint-2")


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    saved = checkpoint_of(tmp_path / "saved")
    for model, message in (
        (tiny_model(t5=tiny_t5(dtype=torch.float32), non_linearity="relu"), "non_linearity is 'gelu_new' in"),
        (tiny_model(t5=tiny_t5(dtype=torch.float32), tasks=["mnli", "stsb", "rte"]), "tasks is"),
        (tiny_model(t5=tiny_t5(dtype=torch.float32, seed=7)), "was trained on another T5"),
    ):
        before = trained_values(model)
        with pytest.raises(CheckpointError, match=message):
            small_trainer(tmp_path / "other", model).train(resume_from_checkpoint=saved)
        assert same(trained_values(model), before)


def test_a_plain_t5s_checkpoint_is_refused(tmp_path):
    tiny_t5(dtype=torch.float32).save_pretrained(tmp_path / "plain" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="none of the .* tensors .* is one that this model trains"):
        small_trainer(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


def test_a_flipped_bit_is_refused(tmp_path):
    saved = Path(checkpoint_of(tmp_path / "saved"))
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="bit rot"):
        small_trainer(tmp_path / "other", tiny_model(t5=tiny_t5(dtype=torch.float32))).train(
            resume_from_checkpoint=str(saved)
        )


OPTIONS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing" if GENERATION_4 else "activation_checkpointing": True},
    "bf16": {"bf16": True},
    "by length": {"group_by_length": True} if GENERATION_4 else {"train_sampling_strategy": "group_by_length"},
    "batch size found": {"auto_find_batch_size": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "no generation": {"predict_with_generate": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_its_options_work(tmp_path, option):
    model = tiny_model(t5=tiny_t5(dtype=torch.float32, num_layers=1, num_decoder_layers=1))
    before = trained_values(model)
    trainer = small_trainer(tmp_path, model, max_steps=2, metrics=lambda evaluation: {"rows": 4}, **OPTIONS[option])
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2
    after = trained_values(model)
    assert all(not torch.equal(after[name], value) for name, value in before.items() if "task_embeddings" in name)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_an_accumulated_batch_is_the_whole_batch(tmp_path):
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = tiny_model(t5=tiny_t5())
        trainer = small_trainer(
            tmp_path / str(size),
            model,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        trainer.train()
        runs.append((losses(trainer), trained_values(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)  # as printed
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not GENERATION_4, reason="transformers 5 writes nothing but safetensors")
def test_pickled_weights_are_refused(tmp_path):
    trainer = small_trainer(tmp_path, save_safetensors=False)
    with pytest.raises(ValueError, match="saved as safetensors only"):
        trainer.save_model()


def test_a_state_dict_that_is_whole_still_loads():
    model, other = tiny_model(), get_hyperformer_model(tiny_t5(), tiny_model().hyperformer_config)
    assert not any(other.load_state_dict(model.state_dict()))
    assert same(trained_values(other), trained_values(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(model.state_dict().items())[1:]))
