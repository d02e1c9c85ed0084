"""Summarisation, translation and question answering as the command trains and scores them."""

from __future__ import annotations

import json
import statistics

from support.runs import SMALL, saved_t5

from hyperformer_fast.cli import main
from hyperformer_fast.training import evaluate_run, predict_run

TASKS = """
headline:
  source: "summarize: {article}"
  target: text
  label_columns: highlights
  metrics: [rouge1, rougeLsum]
  train_file: headline.csv
  validation_file: headline.csv
german:
  source: "{translation.en}"
  target: text
  label_columns: translation.de
  metrics: bleu
  generation: {num_beams: 2, max_length: 6}
  train_file: german.json
  validation_file: german.json
answers:
  source: "question: {question} context: {context}"
  target: text
  label_columns: answers.text
  metrics: [exact_match, squad_f1]
  max_target_length: 5
  train_file: answers.jsonl
  validation_file: answers_validation.jsonl
"""


def question(i: int, answers: list[str]) -> dict:
    return {
        "id": i,
        "question": f"q{i}?",
        "context": "c",
        "answers": {"text": answers, "answer_start": [0] * len(answers)},
    }


def write_rows(folder, answers: list[list[str]]) -> None:
    lines = [json.dumps(question(i, found)) + "\n" for i, found in enumerate(answers)]
    (folder / "answers_validation.jsonl").write_text("".join(lines))


def test_generative_tasks_are_trained_and_scored_by_every_acceptable_answer(tmp_path, capsys):
    (tmp_path / "tasks.yaml").write_text(TASKS)
    (tmp_path / "headline.csv").write_text("article,highlights,n\n" + "".join(f"text {i},t{i},1\n" for i in range(8)))
    german = [{"translation": {"en": f"hello {i}", "de": f"hallo {i}"}} for i in range(8)]
    (tmp_path / "german.json").write_text(json.dumps(german))
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(question(i, [f"a{i}"])) + "\n" for i in range(8)))
    write_rows(tmp_path, [["x"], ["y", "z"], ["x", "y", "z"]])
    flags = {"task_file": tmp_path / "tasks.yaml", "output_dir": tmp_path / "run", "max_steps": 2}
    flags |= {"model_name_or_path": saved_t5(tmp_path / "t5"), "cache_dir": tmp_path / "cache", **SMALL}
    assert (
        main(["train", *(f"--{name}={value}" for name, value in flags.items()), "--per_device_train_batch_size=4"]) == 0
    )

    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = {name: task["metrics"] for name, task in found["tasks"].items()}
    assert {name: list(values) for name, values in scores.items()} == {
        "headline": ["rouge1", "rougeLsum", "score"],
        "german": ["bleu", "score"],
        "answers": ["exact_match", "squad_f1", "score"],
    }
    assert found["tasks"]["answers"]["rows"] == 3 and scores["answers"]["exact_match"] == 0
    numbers = [value for values in scores.values() for name, value in values.items() if name != "score"]
    assert abs(found["average_metrics"] - statistics.mean(numbers)) < 1e-9 and len(numbers) == 5

    # What the model writes becomes the second of the acceptable answers: then every row is right.
    rows = [question(i, ["x"]) for i in range(3)]
    written = [row["prediction_text"] for row in predict_run(tmp_path / "run", rows, "answers")]
    write_rows(tmp_path, [["x", text] for text in written])
    again = evaluate_run(tmp_path / "run", tasks=["answers"])["tasks"]["answers"]["metrics"]
    assert again == {"exact_match": 100, "squad_f1": 100, "score": 100}
