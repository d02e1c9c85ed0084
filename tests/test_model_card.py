"""The README.md that is written on save, and whose it is."""

from __future__ import annotations

import pytest
import yaml
from support.t5s import TASKS, tiny_model

from hyperformer_fast import model_card


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path / "README.md"


def test_it_says_what_the_model_is(saved):
    model, card = saved
    model.card_metrics = {"mnli": {"accuracy": 81.25}, "stsb": {"pearson": 70.0, "spearman": 71.126}}
    model.save_pretrained(card.parent)
    text = card.read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "hyperformer_fast" and "hyperformer" in front["tags"]
    assert "| `mnli` | 81.25 |  |  |\n| `stsb` |  | 70.00 | 71.13 |\n| `cola` |  |  |  |\n" in text
    count = model.parameter_count()
    for number in (count.hypernetworks, count.task_embeddings, count.t5_trained, count.t5_total):
        assert f"{number:,}" in text
    assert 'HyperFormerModel.from_pretrained("...", t5=t5)' in text and "hyperformer++" in text


@pytest.mark.parametrize("variant", ["hyperformer++", "finetuning", "only embeddings"])
def test_a_frozen_model_says_what_was_trained(tmp_path, variant):
    alone = variant == "only embeddings"
    model = tiny_model(train_task_embeddings=True) if alone else tiny_model(variant)
    if alone:
        model.train_only_task_embeddings()
    model.save_pretrained(tmp_path / "trained")
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "frozen")
    assert (tmp_path / "frozen" / "README.md").read_text() == (tmp_path / "trained" / "README.md").read_text()


@pytest.mark.parametrize("edit", ["appended", "within", "another"])
def test_a_card_that_somebody_wrote_or_edited_stays(saved, edit):
    model, card = saved
    text = card.read_text()
    mine = {
        "appended": text + "\nMore of it.\n",
        "within": text.replace("## Tasks", "## My tasks"),
        "another": "# Mine\n",
    }[edit]
    card.write_bytes(mine.encode())
    model.card_metrics = {"mnli": {"accuracy": 1.0}}
    model.save_pretrained(card.parent)
    assert card.read_bytes() == mine.encode()


def test_its_own_is_renewed(saved):
    model, card = saved
    assert model_card.is_ours(card.read_text())
    model.add_task("rte")
    model.save_pretrained(card.parent)
    assert "`rte`" in card.read_text() and model_card.is_ours(card.read_text())


def test_any_task_name_fits_into_the_table(tmp_path):
    tasks = ["a|b", "two\nlines", "`code`", "{braces}", "x" * 300, *TASKS]
    tiny_model(tasks=tasks).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n| `") == len(tasks) and "| `a\\|b` |" in text and "| `two lines` |" in text
    assert model_card.is_ours(text)


def test_tags(tmp_path):
    model = tiny_model()
    model.add_model_tags("of the model")
    model.create_or_update_model_card(tmp_path, tags=["of the call"])
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert {"of the model", "of the call"} <= set(front["tags"])


def test_a_run_writes_its_metrics_into_the_card(tmp_path):
    pytest.importorskip("accelerate", reason="training needs accelerate")
    from support.runs import small_run

    from hyperformer_fast.training import train_run

    few = {"max_steps": 1, "max_train_samples": 16, "max_predict_samples": 4, "tasks": ["topic", "similarity"]}
    results = train_run(small_run(tmp_path / "run", **few))
    text = (tmp_path / "run" / "README.md").read_text()
    for task, part in results["tasks"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{task}`"))
        assert all(f" {value:.2f} " in row for metric, value in part["metrics"].items() if metric != "score")
    assert "| score |" not in text


def test_the_trainers_card_is_the_models(tmp_path):
    pytest.importorskip("accelerate", reason="training needs accelerate")
    from support.runs import small_trainer

    trainer = small_trainer(tmp_path)
    trainer.create_model_card(tags="mine")
    text = (tmp_path / "README.md").read_text()
    assert model_card.is_ours(text) and "- mine" in text
