"""Generation, the table, the notes and the picture."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from rich.console import Console
from support.runs import small_data, small_run, small_t5, small_trainer
from torch.nn.utils.rnn import pad_sequence
from transformers import ByT5Tokenizer

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.training import generation
from hyperformer_fast.training.evaluate import evaluate_tasks
from hyperformer_fast.training.report import notes, plot_curves, results_table, smoothed


def test_texts_are_decoded_in_order_and_are_no_longer_than_a_label(monkeypatch):
    tokenizer, data = ByT5Tokenizer(), small_data()
    # the larger weights make it write other texts to other sources
    t5 = small_t5(initializer_factor=3.0)
    model = get_hyperformer_model(t5, small_run("x").hyperformer_config(list(data)))
    seen, plain = [], model.t5.generate

    def generate(**inputs):
        seen.append({name: value for name, value in inputs.items() if not hasattr(value, "shape")})
        return plain(**inputs)

    monkeypatch.setattr(model.t5, "generate", generate)
    sources = ["sentence: a", "sentence: a much longer one", "sentence: bb", "sentence: a"]
    done = []
    model.train()
    texts = generation.generate_texts(model, tokenizer, data["stsb"].spec, sources, 3, 64, done.append)
    assert model.training and texts[0] == texts[3] and len(set(texts)) > 1 and done == [3, 1]
    alone = [generation.generate_texts(model, tokenizer, data["stsb"].spec, [source], 1, 64)[0] for source in sources]
    assert texts == alone
    assert all(call["max_new_tokens"] == 4 for call in seen)


def test_results_say_what_they_rest_on(tmp_path, monkeypatch):
    data, run = small_data(), small_run(tmp_path)
    trainer = small_trainer(tmp_path)
    answers = {"cola": ["0", "1", "0", "1", "0", "?"], "stsb": ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]}
    plain, task = trainer.evaluate_task, []

    def evaluate_task(name, *arguments, **named):
        task[:] = [name]
        return plain(name, *arguments, **named)

    monkeypatch.setattr(trainer, "evaluate_task", evaluate_task)
    monkeypatch.setattr(trainer, "_decode", lambda tokens: answers[task[0]])
    results = evaluate_tasks(trainer, data, run)
    cola = results["tasks"]["cola"]
    assert (cola["split"], cola["rows"], cola["unparsed"]) == ("validation", 6, 1)
    assert results["tasks"]["stsb"]["metrics"]["pearson"] == pytest.approx(100)
    assert results["average_metrics"] == pytest.approx((cola["metrics"]["matthews"] + 200) / 3)
    assert results["average_tasks"] == pytest.approx((cola["metrics"]["matthews"] + 100) / 2)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table(results))
    text = console.export_text()
    for part in ("majority class", "HyperFormer++", "matthews", "pearson", "spearman", "of metrics", "of tasks"):
        assert part in text
    said = "\n".join(notes(results))
    assert "cola, stsb: reported on validation" in said and "cola: 1 of 6 generated texts are no label" in said
    assert cola["distinct"] == 3 and "one text was generated" not in said
    answers["stsb"] = ["0.2"] * 6
    assert "stsb: one text was generated for all 6 rows" in "\n".join(notes(evaluate_tasks(trainer, data, run)))
    with pytest.raises(ValueError, match="task 'cola' has no split 'test'; it has train, validation"):
        evaluate_tasks(trainer, data, run, "test")


def test_the_loss_is_that_of_tokens_and_of_batches_by_their_rows(tmp_path):
    """Without the smoothing that a run trains with, because a saved run is evaluated without."""
    changes = {"per_device_eval_batch_size": 4, "label_smoothing_factor": 0.1}
    run, trainer = small_run(tmp_path, **changes), small_trainer(tmp_path, **changes)
    rows = trainer.eval_dataset["stsb"]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    assert len(rows) == 6
    total, model = 0.0, trainer.model.eval()
    for part in (order[:4], order[4:]):
        tokens, labels = ([rows[i][name] for i in part] for name in ("input_ids", "labels"))
        source, target = (pad_sequence([torch.tensor(row) for row in each], True, -1) for each in (tokens, labels))
        with torch.no_grad():
            logits = model(
                input_ids=source.clamp_min(0), attention_mask=source.ge(0).long(),
                decoder_input_ids=torch.cat([torch.zeros(len(part), 1).long(), target[:, :-1].clamp_min(0)], 1),
                task="stsb",
            ).logits  # fmt: skip
        logs = logits.log_softmax(-1).gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        total -= len(part) * logs[target >= 0].mean().item()
    data = small_data(("stsb",))
    assert evaluate_tasks(trainer, data, run)["tasks"]["stsb"]["loss"] == pytest.approx(total / 6, rel=1e-5)
    assert trainer.label_smoother is not None


def test_curves_are_drawn(tmp_path):
    history = [{"step": step, "loss": 2.0 / step} for step in range(1, 31)]
    history += [
        {"step": step, "eval_cola_score": step, "eval_stsb_score": 50.0, "eval_average_metrics": 25.0 + step}
        for step in (10, 20, 30)
    ]
    plot_curves(history, {"cola": 0.0, "stsb": 10.0}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    plot_curves([], {}, tmp_path / "empty.png")
    plot_curves(history[:5], {"cola": 0.0}, tmp_path / "loss.png")
    assert (tmp_path / "empty.png").stat().st_size and (tmp_path / "loss.png").stat().st_size
    assert smoothed([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
