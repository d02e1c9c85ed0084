"""Metrics by hand, generation, the table, the notes and the picture."""

from __future__ import annotations

import io
import math

import pytest
from PIL import Image
from rich.console import Console
from support.runs import small_data, small_run, small_t5
from transformers import ByT5Tokenizer

from hyperformer_fast import get_hyperformer_model
from hyperformer_fast.data.tasks import KNOWN
from hyperformer_fast.training import generation
from hyperformer_fast.training.evaluate import evaluate_model
from hyperformer_fast.training.metrics import average, majority_score, score
from hyperformer_fast.training.report import notes, plot_curves, results_table, smoothed


def test_metrics_are_those_of_the_paper():
    labels, predictions = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    mrpc = score(KNOWN["mrpc"], predictions, labels)
    assert mrpc["accuracy"] == pytest.approx(60) and mrpc["f1"] == pytest.approx(100 * 2 / 3)
    assert mrpc["score"] == pytest.approx((60 + 200 / 3) / 2)
    # tp 2, tn 1, fp 1, fn 1
    assert score(KNOWN["cola"], predictions, labels)["matthews"] == pytest.approx(100 / math.sqrt(3 * 3 * 2 * 2))
    stsb = score(KNOWN["stsb"], [1.0, 2.0, 4.0], [0.0, 1.0, 1.1])
    assert stsb["spearman"] == pytest.approx(100) and 0 < stsb["pearson"] < 100
    assert average({"a": {"score": 10.0}, "b": {"score": 30.0}}) == 20.0


def test_texts_that_are_no_label_count_as_wrong():
    right = [0, 1, 1, 0]
    mnli, mrpc = (score(KNOWN[task], [0, 1, None, 0], right) for task in ("mnli", "mrpc"))
    assert mnli["accuracy"] == mrpc["accuracy"] == 75 and mrpc["f1"] == pytest.approx(100 * 2 / 3)
    assert score(KNOWN["mrpc"], [None, 1, 1, None], right) == {"accuracy": 50, "f1": 100, "score": 75}
    assert 0 < score(KNOWN["cola"], [0, 1, None, 0], right)["matthews"] < 100
    assert score(KNOWN["cola"], [None] * 4, right)["matthews"] == 0
    spoilt = score(KNOWN["stsb"], [1.0, 2.0, None], [1.0, 2.0, 3.0])
    assert spoilt["score"] == pytest.approx(score(KNOWN["stsb"], [1.0, 2.0, -1.0], [1.0, 2.0, 3.0])["score"])


def test_the_majority_class_is_that_of_train():
    assert majority_score(KNOWN["mrpc"], [1, 1, 0], [1, 0, 0, 0])["accuracy"] == 25
    assert majority_score(KNOWN["mrpc"], [1, 1, 0], [1, 0, 0, 0])["f1"] == pytest.approx(40)
    assert majority_score(KNOWN["cola"], [1, 1, 0], [1, 0])["matthews"] == 0
    assert majority_score(KNOWN["stsb"], [1.0, 4.0], [1.0, 2.0, 3.0]) == {"pearson": 0, "spearman": 0, "score": 0}
    assert majority_score(KNOWN["stsb"], [1.0], [1.0])["score"] == 0


def test_decoding_is_greedy_in_order_and_no_longer_than_a_label(monkeypatch):
    tokenizer, data = ByT5Tokenizer(), small_data()
    assert [generation.max_new_tokens(data[task].spec, tokenizer) for task in ("cola", "stsb")] == [2, 4]
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
    assert all(call == {"max_new_tokens": 4, "num_beams": 1, "do_sample": False} for call in seen)


def test_results_say_what_they_rest_on(monkeypatch):
    data = small_data()
    model = get_hyperformer_model(small_t5(), small_run("x").hyperformer_config(list(data)))
    answers = {"cola": ["0", "1", "0", "1", "0", "?"], "stsb": ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]}
    monkeypatch.setattr(generation, "generate_texts", lambda model, tokenizer, spec, *_: answers[spec.name])
    results = evaluate_model(model, ByT5Tokenizer(), data, small_run("x"))
    cola = results["tasks"]["cola"]
    assert (cola["split"], cola["rows"], cola["unparsed"]) == ("validation", 6, 1)
    assert results["tasks"]["stsb"]["metrics"]["pearson"] == pytest.approx(100)
    assert results["average"] == pytest.approx((cola["metrics"]["matthews"] + 100) / 2)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table(results))
    text = console.export_text()
    for part in ("majority class", "HyperFormer++", "matthews", "pearson", "spearman", "average", "validation"):
        assert part in text
    said = "\n".join(notes(results))
    assert "cola, stsb: reported on validation" in said and "cola: 1 of 6 generated texts are no label" in said
    with pytest.raises(ValueError, match="task 'cola' has no split 'test'; it has train, validation"):
        evaluate_model(model, ByT5Tokenizer(), data, small_run("x"), "test")


def test_curves_are_drawn(tmp_path):
    history = [{"step": step, "loss": 2.0 / step} for step in range(1, 31)]
    history += [
        {"step": step, "eval_cola": step, "eval_stsb": 50.0, "eval_average": 25.0 + step} for step in (10, 20, 30)
    ]
    plot_curves(history, {"cola": 0.0, "stsb": 10.0}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    plot_curves([], {}, tmp_path / "empty.png")
    plot_curves(history[:5], {"cola": 0.0}, tmp_path / "loss.png")
    assert (tmp_path / "empty.png").stat().st_size and (tmp_path / "loss.png").stat().st_size
    assert smoothed([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
