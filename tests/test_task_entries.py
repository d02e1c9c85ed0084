"""Tasks described by entries: in a YAML or JSON file with several, or registered by a program."""

from __future__ import annotations

import json
import re

import pytest
from transformers import ByT5Tokenizer

import hyperformer_fast
from hyperformer_fast.cli import main
from hyperformer_fast.data import DataError, TaskSpec, load_tasks, registry
from hyperformer_fast.data.registry import find_task, read_task_entries, register_task

MANY = """
headline:                       # summarisation
  source: "summarize: {article}"
  target: text
  label_columns: highlights
  metrics: [rouge1, rouge2, rougeL]
  max_target_length: 64
  generation: {num_beams: 4, length_penalty: 0.6}
  train_file: rows/train.csv
  validation_file: rows/validation.csv
translate:
  source: "translate English to German: {translation.en}"
  target: text
  label_columns: translation.de
  metrics: bleu
  dataset: wmt/wmt16
  dataset_config: de-en
squad:
  source: "question: {question} context: {context}"
  target: text
  label_columns: [answers.text]
  metrics: [exact_match, squad_f1]
  dataset: rajpurkar/squad
  splits: {train: train, validation: validation}
verdict:
  columns: {claim: [claim, statement], evidence: evidence}
  labels: {supported: "yes", refuted: "no"}
  metrics: [accuracy, f1]
stars:
  source: "review: {title}, {body}"
  target: number
  label_columns: rating
  low: 1
  high: 5
  step: 0.5
"""


@pytest.fixture
def task_file(tmp_path):
    def write(content, name="tasks.yaml"):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "rows" / f"{split}.csv").write_text("article,highlights\na,b\n")
    return write


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})


def test_one_file_holds_several_tasks(task_file, tmp_path):
    headline, translate, squad, verdict, stars = read_task_entries(task_file(MANY))
    assert headline.source_text({"article": "A b.", "highlights": "c"}, "") == "summarize: A b."
    assert headline.label({"article": "A b.", "highlights": "c d"}, "") == "c d"
    assert headline.train_file == str(tmp_path / "rows" / "train.csv") and headline.test_file is None
    assert headline.generation == {"num_beams": 4, "length_penalty": 0.6} and headline.max_target_length == 64
    row = {"translation": {"en": "Hello.", "de": "Hallo."}}
    assert translate.source_text(row, "") == "translate English to German: Hello."
    assert translate.label(row, "") == "Hallo." and translate.metrics == ("bleu",)
    answers = {"question": "Q?", "context": "C.", "answers": {"text": ["a b", "b"], "answer_start": [0, 2]}}
    assert squad.source_text(answers, "") == "question: Q? context: C." and squad.label(answers, "") == ["a b", "b"]
    assert squad.target_text(["a b", "b"]) == "a b" and squad.parse(" b ") == "b" and squad.targets() is None
    claim = {"statement": "A", "evidence": "B", "label": "refuted"}
    assert verdict.source_text(claim, "") == "claim: A evidence: B"
    assert verdict.target_text(verdict.label(claim, "")) == "no" and verdict.parse("yes") == 0
    assert verdict.label_names == ("supported", "refuted") and verdict.answer(0, True) == "supported"
    review = {"title": "T", "body": "B", "rating": 3}
    assert stars.source_text(review, "") == "review: T, B" and stars.metrics == ("pearson", "spearman")
    assert [stars.target_text(value) for value in (1, 3.2, 3.3, 5.0)] == ["1.0", "3.0", "3.5", "5.0"]


def test_json_and_lists_say_the_same(task_file):
    import yaml

    found = yaml.safe_load(MANY)
    expected = read_task_entries(task_file(MANY))
    assert read_task_entries(task_file(found, "tasks.json")) == expected
    listed = [{"name": name, **fields} for name, fields in found.items()]
    assert read_task_entries(task_file(listed, "list.json")) == expected
    assert read_task_entries(task_file(listed[2], "one.json")) == expected[2:3]
    for spec in expected:
        assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_an_entry_of_a_known_name_starts_from_that_task(task_file):
    content = {
        "mnli": {"metrics": ["accuracy"], "train_file": "rows/train.csv"},
        "imdb": {"columns": {"review": "text"}},
        "cola": {"source": "Is this English? {sentence}"},
        "topic": {"source": "{headline}: {body}"},
    }
    mnli, imdb, cola, topic = read_task_entries(task_file(content))
    assert mnli.label_names == ("entailment", "neutral", "contradiction")
    assert mnli.dataset is None and mnli.splits == {} and mnli.train_file
    assert imdb.source_text({"text": "T"}, "") == "review: T" and imdb.dataset == "stanfordnlp/imdb"
    assert cola.source_text({"sentence": "S"}, "") == "Is this English? S" and cola.metrics == ("matthews",)
    assert topic.columns == {"headline": ("headline",), "body": ("body",)} and topic.labels == ("0", "1", "2", "3")
    with pytest.raises(DataError, match=r"task imdb: columns has 'review', which source='\{text\}' does not name"):
        read_task_entries(task_file(content), "official")


SOURCE = {"source": "{text}"}
CLASS = SOURCE | {"labels": ["a", "b"]}
TEXT = SOURCE | {"target": "text", "metrics": ["bleu"]}

#: An entry of the task "mine", and the error that must name the file, the task, the field, its value and a cure.
BAD_ENTRIES = {
    "no target": (SOURCE, r"task 'mine' has no target: say \"target\": \"class\" with labels"),
    "no source": ({"target": "number"}, r"task 'mine' has no source: give a template such as"),
    "no labels": (SOURCE | {"target": "class"}, r"task 'mine': target 'class' needs labels .* or label_names"),
    "unknown target": (
        SOURCE | {"target": "txt"},
        r"task mine: target must be class, number or text, got 'txt'; did you mean 'text'",
    ),
    "a template as target": (SOURCE | {"target": "{x}"}, r"target must be class, number or text, got '\{x\}'"),
    "unknown metric": (
        TEXT | {"metrics": ["rouge3"]},
        r"task mine: metrics must be among accuracy, .*got 'rouge3'; did you mean 'rouge",
    ),
    "misspelt metric": (CLASS | {"metrics": ["acuracy"]}, r"got 'acuracy'; did you mean 'accuracy'"),
    "metric of texts": (
        CLASS | {"metrics": ["bleu"]},
        r"metric 'bleu' does not fit target 'class': metrics must be among accuracy, f1, matthews",
    ),
    "metric of classes": (TEXT | {"metrics": ["f1"]}, r"metric 'f1' does not fit target 'text': .*bleu, rouge1"),
    "metric of numbers": (
        SOURCE | {"target": "number", "metrics": "accuracy"},
        r"'accuracy' does not fit target 'number'",
    ),
    "no metric of a text": (
        SOURCE | {"target": "text"},
        r"task mine: metrics must be given for a text target: some of accuracy, bleu",
    ),
    "a metric twice": (
        CLASS | {"metrics": ["accuracy", "accuracy"]},
        r"metrics must be different, got \('accuracy', 'accuracy'\)",
    ),
    "f1 of three": (SOURCE | {"labels": ["a", "b", "c"], "metrics": ["f1"]}, r"f1 needs two classes, got labels="),
    "open brace": (
        CLASS | {"source": "q: {text"},
        r"task mine: source has a malformed placeholder in 'q: \{text': .*; expected \{column\}",
    ),
    "closing brace": (CLASS | {"source": "q: text}"}, r"source has a malformed placeholder in 'q: text\}'"),
    "empty braces": (
        CLASS | {"source": "q: {}"},
        r"source has a malformed placeholder in 'q: \{\}': \{\} is not the name of a column",
    ),
    "format of a number": (CLASS | {"source": "{x:.2f}"}, r"\{x:\.2f\} is not the name of a column"),
    "no placeholder": (CLASS | {"source": "text"}, r"source must name a column in braces, got 'text'"),
    "bad target template": (TEXT | {"target_template": "{a"}, r"target_template has a malformed placeholder in '\{a'"),
    "template of a class": (
        CLASS | {"target": "class", "target_template": "{a}"},
        r"target_template needs target 'text', got target 'class'",
    ),
    "unused column": (
        CLASS | {"columns": ["text", "other"]},
        r"columns has 'other', which source='\{text\}' does not name",
    ),
    "unknown field": (CLASS | {"metrcs": ["accuracy"]}, r"task 'mine': unknown field 'metrcs'; did you mean 'metrics'"),
    "one label": (SOURCE | {"labels": ["a"]}, r"labels must be at least two different texts, got \('a',\)"),
    "equal labels": (
        SOURCE | {"labels": {"x": "a", "y": "a"}},
        r"labels must be at least two different texts, got \('a', 'a'\)",
    ),
    "equal names": (CLASS | {"label_names": ["x", "x"]}, r"label_names must be unique, got \('x', 'x'\)"),
    "too few names": (
        CLASS | {"label_names": ["x"]},
        r"label_names must have one name per label, got \('x',\) for 2 labels",
    ),
    "names twice": (
        SOURCE | {"labels": {"x": "a", "y": "b"}, "label_names": ["y", "x"]},
        r"labels maps the names of the rows already, so label_names must be left out, got \['y', 'x'\]",
    ),
    "labels of a text": (
        TEXT | {"labels": ["a", "b"]},
        r"labels and label_names need target 'class', got \('a', 'b'\) for 'text'",
    ),
    "labels that are numbers": (
        SOURCE | {"labels": [0, 1]},
        r"labels must be a list of texts.*got \[0, 1\]; put quotes",
    ),
    "unknown split": (CLASS | {"splits": {"dev": "x"}}, r"splits must be of train, validation, test, got 'dev'"),
    "absent file": (
        CLASS | {"train_file": "none.csv"},
        r"task 'mine': train_file 'none.csv' is absent; it is looked for at /",
    ),
    "no train file": (CLASS | {"test_file": "rows/train.csv"}, r"test_file needs a train_file beside it"),
    "two places": (CLASS | {"dataset": "x", "train_file": "rows/train.csv"}, r"got both dataset='x' and train_file"),
    "configuration alone": (CLASS | {"dataset_config": "x"}, r"dataset_config='x' needs a dataset"),
    "length": (TEXT | {"max_target_length": 0}, r"max_target_length must be a whole number from 1, got 0"),
    "length as text": (
        TEXT | {"max_target_length": "9"},
        r"max_target_length must be a whole number of tokens, got '9'",
    ),
    "generation": (
        TEXT | {"generation": {"num_beam": 4}},
        r"generation has no argument 'num_beam' of generate\(\); did you mean 'num_beams'",
    ),
    "too many numbers": (
        SOURCE | {"target": "number", "low": 0.5, "high": 5.5, "step": 1},
        r"low and high must be multiples of step, .*got low=0.5, high=5.5, step=1",
    ),
    "numbers that are too many": (
        SOURCE | {"target": "number", "high": 1e6, "step": 0.1},
        r"step must leave at most 100,000 .*got step=0.1",
    ),
    "not fields": ("text", r"task 'mine' must be an object of fields, got 'text'"),
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_a_bad_entry_is_one_error_that_names_its_place(task_file, what):
    fields, message = BAD_ENTRIES[what]
    path = task_file({"good": CLASS, "mine": fields}, "tasks.json")
    with pytest.raises(DataError, match=f"{path}: .*{message}") as error:
        read_task_entries(path)
    assert "mine" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["no target", "unknown metric", "open brace", "unknown field", "equal names"])
def test_the_command_refuses_a_bad_entry_before_it_starts(task_file, tmp_path, capsys, what):
    fields, message = BAD_ENTRIES[what]
    path, output = task_file({"mine": fields}, "tasks.json"), tmp_path / "run"
    assert main(["train", "--task_file", str(path), "--output_dir", str(output), "--max_steps", "2"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"hyperformer-fast: error: {path}: .*{message}.*\n", said) and not output.exists()


BAD_FILES = {
    "nothing": ("", "tasks.yaml: must hold tasks as {name: {field: value}}, got None"),
    "no tasks": ("{}", "tasks.yaml holds no tasks"),
    "text": ("just words", "got 'just words'"),
    "bad yaml": ("a: [1\nb: 2", "tasks.yaml: not YAML: .*line 2"),
    "a name twice": ("a: {source: x}\nb: {}\na: {}", "the name 'a' stands twice in the object that starts in line 1"),
    "a field twice": ("a:\n  source: x\n  source: y\n", "the name 'source' stands twice .* starts in line 2"),
    "a task twice": (
        '[{"name": "a", "source": "{x}", "target": "number"}, {"name": "a"}]',
        "task 'a' stands there twice",
    ),
    "no name": ('[{"source": "{x}"}]', "entry 1 must be an object with a name"),
    "a number as name": ("3: {source: x}", "the name of a task must be a text, got 3; put quotes around it"),
    "truth values": ('a: {source: "{x}", labels: [yes, no]}', r"got \[True, False\]; put quotes around .*yes, no"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_named(task_file, what):
    content, message = BAD_FILES[what]
    with pytest.raises(DataError, match=message):
        read_task_entries(task_file(content))


def test_files_that_cannot_be_read(task_file, tmp_path):
    with pytest.raises(DataError, match=r"task file .*none.yaml is absent"):
        read_task_entries(tmp_path / "none.yaml")
    with pytest.raises(DataError, match=r"task file .* cannot be read"):
        read_task_entries(tmp_path)
    with pytest.raises(DataError, match=r"tasks.json: not JSON: the name 'a' stands twice"):
        read_task_entries(task_file('{"a": {}, "a": {}}', "tasks.json"))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(DataError, match=r"latin.yaml cannot be read"):
        read_task_entries(tmp_path / "latin.yaml")


def test_a_program_registers_a_task(registered):
    spec = hyperformer_fast.register_task(name="headline", source="{article}", target="text", metrics=["rougeL"])
    assert find_task("headline") is find_task("headline", "official") is spec
    again = register_task({"name": "headline", **TEXT})  # a cell of a notebook that is run again
    assert find_task("headline") is again and register_task(again) is not None
    with pytest.raises(DataError, match=r"register_task: task 'x': unknown field 'metric'; did you mean 'metrics'"):
        register_task(name="x", source="{a}", metric="bleu")
    with pytest.raises(ValueError, match=r"needs the task's name, a text, got name=None"):
        register_task(source="{a}", target="number")
    for taken in ("cola", "sentiment"):
        with pytest.raises(ValueError, match=rf"'{taken}' is known already; .*replace=True"):
            register_task(name=taken, source="{a}", target="number")
    assert register_task(name="cola", source="{a}", target="number", replace=True) is find_task("cola")
    assert find_task("nowhere") is None


def test_a_registered_task_is_loaded_by_its_name(registered, task_file, tmp_path):
    fields = {"train_file": str(tmp_path / "rows/train.csv"), "validation_file": str(tmp_path / "rows/validation.csv")}
    register_task(
        name="headline", source="{article}", target="text", label_columns="highlights", metrics="rougeL", **fields
    )
    data = load_tasks(None, ["headline", "topic"], cache_dir=str(tmp_path / "cache"))
    assert data["headline"].splits["train"][0]["source"] == "a" and len(data["topic"].splits["train"]) == 2000


ROWS = {
    "no column": ({"b": "x"}, r"here: no column 'a'; there are 'b'"),
    "no inner column": ({"a": "x", "t": {"de": "y"}}, r"here: no column 't.en'; there are 'a', 't'"),
    "no text": ({"a": None, "t": {"en": "x"}}, r"here: column 'a' must be text, got None"),
    "not a number": ({"a": float("nan"), "t": {"en": "x"}}, r"here: column 'a' must be text, got nan"),
    "a list": ({"a": "x", "t": {"en": ["x"]}}, r"here: column 't.en' must be text, got \['x'\]"),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_row_without_its_columns_is_named(what):
    spec = TaskSpec(name="mine", source="{a} and {t.en}", columns={"a": ("a",)}, target="number")
    assert spec.columns == {"a": ("a",), "t.en": ("t.en",)}
    with pytest.raises(DataError, match=ROWS[what][1]):
        spec.source_text(ROWS[what][0], "here")


def test_templates():
    spec = TaskSpec(
        name="mine", source="{{{a}}} {b.0} {c.d}", target="text", target_template="{a}: {n}", metrics=("bleu",)
    )
    row = {"a": "x{y}", "b": ["p", "q"], "c.d": "dotted", "n": 3}
    assert spec.source_text(row, "") == "{x{y}} p dotted" and spec.label(row, "") == "x{y}: 3"
    prefixed = TaskSpec(name="mine", source="{a}", target="number", prefix="mine:")
    assert prefixed.source_text({"a": "x"}, "") == "mine: x"
    assert TaskSpec(name="m", source="{a}", target="number", prefix="m: ").source_text({"a": "x"}, "") == "m: x"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "'label' must hold an acceptable answer, got an empty list"),
        (None, "'label' must be a text or a list of texts, got None"),
        (["a", 3], r"'label' must be a text or a list of texts, got \['a', 3\]"),
        ("a\ud800", "is half of a surrogate pair"),
    ],
)
def test_a_text_target_must_be_text(value, message):
    spec = TaskSpec(name="mine", source="{a}", target="text", metrics=("bleu",))
    with pytest.raises(DataError, match=f"here: .*{message}"):
        spec.label({"label": value}, "here")


def test_arguments_of_generate():
    tokenizer = ByT5Tokenizer()
    assert find_task("cola").generation_kwargs(tokenizer) == {"max_new_tokens": 2}
    assert find_task("stsb").generation_kwargs(tokenizer, 99) == {"max_new_tokens": 4}
    text = TaskSpec(name="mine", source="{a}", target="text", metrics=("bleu",))
    assert text.generation_kwargs(tokenizer) == {"max_new_tokens": 128}
    assert text.generation_kwargs(tokenizer, 30) == {"max_new_tokens": 30}
    fields = {"max_target_length": 20, "generation": {"num_beams": 4}}
    own = TaskSpec.from_dict({**text.to_dict(), **fields})
    assert own.generation_kwargs(tokenizer, 30) == {"max_new_tokens": 20, "num_beams": 4}
    assert find_task("wmt16-en-ro").generation_kwargs(tokenizer, 30) == {"max_new_tokens": 299, "num_beams": 4}


def test_labels_are_texts():
    for labels in ("ab", (0, 1)):
        with pytest.raises(ValueError, match="task m: labels must be a list of texts, got"):
            TaskSpec(name="m", source="{a}", labels=labels)


def test_specifications_of_earlier_runs_still_load():
    """As run.json held them before a task's target was a field."""
    old = {
        "name": "stsb",
        "columns": {"sentence1": ["sentence1"], "sentence2": ["sentence2"]},
        "labels": None,
        "label_columns": ["label"],
        "label_names": [],
        "metrics": ["pearson", "spearman"],
        "low": 0.0,
        "high": 5.0,
        "step": 0.2,
    }
    spec = TaskSpec.from_dict(old)
    assert spec.target == "number" and spec.target_text(2.5) == "2.4" and not spec.rows_have_names
    assert spec.source_text({"sentence1": "a", "sentence2": "b"}, "") == "sentence1: a sentence2: b"
    named = {**old, "name": "mine", "labels": ["0", "1"], "label_names": ["x", "y"], "metrics": ["accuracy"]}
    assert TaskSpec.from_dict(named).target == "class" and TaskSpec.from_dict(named).rows_have_names
