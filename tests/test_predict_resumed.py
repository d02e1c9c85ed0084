"""``hyperformer-fast predict`` on many rows: batches of several tasks, an output that grows, interruptions."""

from __future__ import annotations

import json
import types

import pytest
import torch
from rich.console import Console
from support.runs import saved_t5
from transformers import ByT5Tokenizer

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.cli import INTERRUPTED, main
from hyperformer_fast.training import RunError, predict_run
from hyperformer_fast.training import predict as predict_module
from hyperformer_fast.training.folder import read_run
from hyperformer_fast.training.partial import PartialFile
from hyperformer_fast.training.predict import predict_file
from hyperformer_fast.training.tables import read_table

LABELS = {"rte": [0, 1], "trec": [0, 5], "stsb": [0.4, 4.2]}
SIZE = 6  # rows that are read at once, below


def row(i):
    task = list(LABELS)[i % 3]
    texts = {"text": f"who {i} ?"} if task == "trec" else {"sentence1": "it rains " * (i % 4), "sentence2": f"wet {i}"}
    return {"task": task, **texts, "note": f'{i},"ä"\n'}


ROWS = [row(i) for i in range(20)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("resumed")
    for t, (task, labels) in enumerate(LABELS.items()):
        (root / "data" / task).mkdir(parents=True)
        found = [{**row(3 * i + t), "label": labels[i % 2]} for i in range(4)]
        for split in ("train", "validation"):
            (root / "data" / task / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    base = saved_t5(root / "t5", initializer_factor=3.0)
    train = ["train", "--model_name_or_path", base, "--data_dir", str(root / "data"), "--max_steps", "1"]
    train += ["--reduction_factor", "4", "--eval_strategy", "no", "--save_strategy", "no"]
    assert main([*train, "--per_device_train_batch_size", "2", "--output_dir", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    return path


class Answers:
    """In the place of the model. It is interrupted before the stretch of rows whose number is ``stop``."""

    def __init__(self, monkeypatch):
        self.asked: list[list[str]] = []
        self.stop: int | None = None
        model = types.SimpleNamespace(to=lambda device: None)
        monkeypatch.setattr(predict_module, "BATCHES_READ", 2)
        monkeypatch.setattr(predict_module, "load_model", lambda *_: (model, ByT5Tokenizer()))
        monkeypatch.setattr(predict_module, "generate_mixed", self)

    def __call__(self, model, tokenizer, tasks, sources, *_):
        if len(self.asked) == self.stop:
            self.stop = None
            raise KeyboardInterrupt
        self.asked.append(list(sources))
        return [str(len(each) % 2) for each in sources]


@pytest.fixture
def answers(monkeypatch):
    return Answers(monkeypatch)


def test_mixed_tasks_are_answered_as_each_row_by_itself(run, monkeypatch):
    """In the input's order, in batches of several tasks, of some rows at a time."""
    model, tokenizer = predict_module.load_model(run, read_run(run)[0], None, Console(quiet=True))
    torch.manual_seed(0)
    with torch.no_grad():  # adapters that let it write other texts to other rows
        for parameter in (*model.task_embeddings.parameters(), *model.hypernetworks.parameters()):
            parameter.copy_(torch.randn_like(parameter))
    monkeypatch.setattr(predict_module, "load_model", lambda *_: (model, tokenizer))
    alone = [predict_run(run, [each])[0] for each in ROWS]
    batches, generate = [], HyperFormerModel.generate

    def watched(model, **inputs):
        batches.append((inputs["task"], inputs["input_ids"].shape[0]))
        return generate(model, **inputs)

    monkeypatch.setattr(HyperFormerModel, "generate", watched)
    monkeypatch.setattr(predict_module, "BATCHES_READ", 3)
    together = predict_run(run, ROWS, batch_size=3)
    assert together == alone and len({each["prediction_text"] for each in together}) > 4
    assert [rows for _, rows in batches] == [3, 3, 3] * 2 + [2]
    assert all(len(set(tasks)) > 1 for tasks, _ in batches)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_an_interrupted_output_goes_on(run, source, tmp_path, answers, kind, capsys):
    whole, resumed = tmp_path / f"whole.{kind}", tmp_path / f"resumed.{kind}"
    call = ["predict", str(run), "--input", str(source), "--batch_size", "3", "--output"]
    assert main([*call, str(whole)]) == 0
    assert [len(each) for each in answers.asked] == [SIZE, SIZE, SIZE, 2]
    first, answers.asked, answers.stop = answers.asked, [], 2
    assert main([*call, str(resumed)]) == INTERRUPTED
    assert "interrupted; the same command goes on behind row 12 of 20" in capsys.readouterr().err
    partial = tmp_path / f"resumed.{kind}.partial"
    assert partial.exists() and not resumed.exists()
    with open(partial, "ab") as file:
        file.write(b'{"half a li')  # what a kill leaves
    answers.asked = []
    assert main([*call, str(resumed)]) == 0
    assert answers.asked == first[2:] and "going on behind row 12 of 20" in capsys.readouterr().err
    assert resumed.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", whole.name, resumed.name}
    expected = [{**each, "prediction_text": str(len(text) % 2)} for each, text in zip(ROWS, sum(first, []))]
    for each, row in zip(read_table(resumed).rows, expected, strict=True):
        assert {name: value for name, value in each.items() if value and name != "prediction"} == {
            name: value for name, value in row.items() if value
        }


def test_the_end_alone_may_be_missing(run, source, tmp_path, answers, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(PartialFile, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_file(run, source, out, batch_size=3)
    monkeypatch.undo()
    Answers(monkeypatch).stop = 0
    predict_file(run, source, out, batch_size=3)
    assert len(json.loads(out.read_text())) == 20


def test_another_call_does_not_go_on(run, source, tmp_path, answers):
    out = tmp_path / "out.jsonl"
    answers.stop = 1
    with pytest.raises(KeyboardInterrupt):
        predict_file(run, source, out, batch_size=3)
    for what, change in {
        "batch_size was 3 and is 4": {"batch_size": 4},
        "rows was 20 and is 19": {"source": ROWS[:19]},
        "content of the rows was": {"source": [*ROWS[:19], {**ROWS[19], "note": "new"}]},
    }.items():
        arguments = {"source": ROWS, "batch_size": 3, **change}
        rows = arguments.pop("source")
        source.write_text("".join(json.dumps(each) + "\n" for each in rows))
        with pytest.raises(RunError, match=f"output of another prediction: {what}.*to start anew"):
            predict_file(run, source, out, **arguments)
    source.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    before = (run / "run.json").read_text()
    (run / "run.json").write_text(before + "\n")
    try:
        with pytest.raises(RunError, match=r"output of another prediction: run\.json was"):
            predict_file(run, source, out, batch_size=3)
    finally:
        (run / "run.json").write_text(before)
    predict_file(run, source, out, batch_size=3)
    assert len(out.read_text().splitlines()) == 20


def test_somebody_elses_files_are_left_alone(run, source, tmp_path, answers):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    partial.write_text("mine")
    with pytest.raises(RunError, match="is in the way: it is not the unfinished output"):
        predict_file(run, source, out)
    source.rename(partial)
    rows = partial.read_text()
    state = tmp_path / "out.jsonl.partial.json"
    with pytest.raises(RunError, match=r"in\.jsonl|is the input: give another name"):
        predict_file(run, partial.rename(tmp_path / "out.jsonl.partial.json"), out)
    assert state.read_text() == rows
    state.rename(source)
    with PartialFile(out, {}), pytest.raises(RunError, match="another process writes"):
        predict_file(run, source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
    before = (run / "run.json").read_text()
    with pytest.raises(RunError, match=r"run\.json is a file of the run: give another name"):
        predict_file(run, source, run / "run.json")
    assert (run / "run.json").read_text() == before
    assert not answers.asked


def test_a_failure_before_the_first_rows_leaves_nothing(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module, "load_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_file(run, source, tmp_path / "out.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


def test_rows_that_change_while_they_are_read_are_noticed(run, source, tmp_path, answers, monkeypatch):
    def change(*_):
        source.write_text(source.read_text().replace("who 19 ?", "who 20 ?"))
        return types.SimpleNamespace(to=lambda device: None), ByT5Tokenizer()

    source.write_text(source.read_text().replace(ROWS[1]["text"], "who 19 ?"))
    monkeypatch.setattr(predict_module, "load_model", change)
    with pytest.raises(RunError, match="the rows changed while they were read"):
        predict_file(run, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_were_another_ones_meanwhile_are_not_in_the_output(run, source, tmp_path, answers):
    """They are changed while they are read and back again, and the same call goes on behind what is written."""
    out, before = tmp_path / "out.jsonl", source.read_text()

    def change(*_):
        source.write_text(before.replace("wet 9", "wet 99"))
        return types.SimpleNamespace(to=lambda device: None), ByT5Tokenizer()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "load_model", change)
        with pytest.raises(RunError, match="the rows changed while they were read"):
            predict_file(run, source, out, batch_size=3)
    source.write_text(before)
    predict_file(run, source, out, batch_size=3)
    assert [json.loads(line)["note"] for line in out.read_text().splitlines()] == [each["note"] for each in ROWS]
    assert "wet 99" not in out.read_text()


def test_a_wrong_row_is_named_before_any_work(run, source, tmp_path, answers):
    with open(source, "a") as file:
        file.write(json.dumps({"task": "rte", "sentence1": "one alone"}) + "\n")
    with pytest.raises(ValueError, match=r"in\.jsonl:21: .*sentence2"):
        predict_file(run, source, tmp_path / "out.jsonl")
    assert not answers.asked


def test_lines_are_printed_as_they_come(run, source, answers, capsys):
    answers.stop = 1
    with pytest.raises(KeyboardInterrupt):
        predict_file(run, source, batch_size=3)
    assert [json.loads(line)["note"] for line in capsys.readouterr().out.splitlines()] == [
        each["note"] for each in ROWS[:SIZE]
    ]
