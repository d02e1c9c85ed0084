"""The authors' 31 tasks: their texts and targets written out by hand, their metrics and their splits."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest
from datasets import Dataset

from hyperformer_fast.data import TaskData
from hyperformer_fast.data.official_tasks import OFFICIAL_TASKS
from hyperformer_fast.data.registry import KNOWN, find_task, with_prefix
from hyperformer_fast.data.splits import HALVED, HELD_OUT
from hyperformer_fast.training.arguments import RunArguments
from hyperformer_fast.training.evaluate import load_data


class Fact(NamedTuple):
    row: dict
    source: str
    target: str
    #: All targets of a task with classes; None for numbers and texts.
    targets: list[str] | None
    metrics: tuple[str, ...]
    splits: str = "train validation validation"
    #: The source in our own wording where it is another one.
    ours: str | None = None
    prefixed: str | None = None


TWO, THREE, FOUR, FIVE = (list("01234"[:n]) for n in (2, 3, 4, 5))
ACC, F1 = ("accuracy",), ("f1", "accuracy")
PAIR = {"sentence1": "A b.", "sentence2": "C"}
NLI = {"premise": "A b.", "hypothesis": "C"}
ALL, NO_VALIDATION = "train validation test", "train test test"
ROMANIAN = {"translation": {"en": "Hello.", "ro": "Salut."}}

FACTS = {
    "cola": Fact({"sentence": "S t.", "label": 0, "idx": 3}, "sentence: S t.", "0", TWO, ("matthews",)),
    "sst2": Fact({"sentence": "S t ", "label": 1, "idx": 3}, "sentence: S t ", "1", TWO, ACC),
    "mrpc": Fact(PAIR | {"label": 1}, "sentence1: A b. sentence2: C", "1", TWO, F1),
    "qqp": Fact({"question1": "A?", "question2": "B?", "label": 0}, "question1: A? question2: B?", "0", TWO, F1),
    "stsb": Fact(PAIR | {"label": 3.8}, "sentence1: A b. sentence2: C", "3.8", None, ("pearson", "spearman")),
    "mnli": Fact(
        NLI | {"label": 2},
        "premise: A b. hypothesis C",
        "2",
        THREE,
        ACC,
        "train validation_mismatched validation_matched",
        ours="premise: A b. hypothesis: C",
    ),
    "qnli": Fact({"question": "Q?", "sentence": "S", "label": 1}, "question: Q? sentence: S", "1", TWO, ACC),
    "rte": Fact(PAIR | {"label": 0}, "sentence1: A b. sentence2: C", "0", TWO, ACC),
    "wnli": Fact(PAIR | {"label": 1}, "sentence1: A b. sentence2: C", "1", TWO, ACC),
    "superglue-boolq": Fact({"question": "Q", "passage": "P", "label": 1}, "question: Q passage: P", "1", TWO, ACC),
    "superglue-rte": Fact(NLI | {"label": 1}, "premise: A b. hypothesis: C", "1", TWO, ACC),
    "superglue-cb": Fact(NLI | {"label": 2}, "premise: A b. hypothesis: C", "2", THREE, ACC),
    "snli": Fact(NLI | {"label": 2}, "premise: A b. hypothesis: C", "2", THREE, ACC, ALL),
    "scitail": Fact(PAIR | {"gold_label": "neutral"}, "sentence1: A b. sentence2: C", "1", TWO, ACC, ALL),
    "sick": Fact(NLI | {"label": "CONTRADICTION"}, "premise: A b. hypothesis: C", "2", THREE, ACC, ALL),
    "paws": Fact(PAIR | {"label": 0, "id": 7}, "sentence1: A b. sentence2: C", "0", TWO, ACC, ALL),
    "imdb": Fact({"text": "T<br />", "label": 0}, "T<br />", "0", TWO, ACC, NO_VALIDATION, ours="sentence: T<br />"),
    "yelp_polarity": Fact({"text": "T", "label": 1}, "sentence: T", "1", TWO, ACC, NO_VALIDATION),
    "trec": Fact(
        {"text": "T ?", "label-coarse": 5, "label-fine": 40}, "sentence: T ?", "5", list("012345"), ACC, NO_VALIDATION
    ),
    "social_i_qa": Fact(
        {"context": "C", "question": "Q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "question: Q context: C answerA: a answerB: b answerC: c",
        "2",
        THREE,
        ACC,
    ),
    "cosmos_qa": Fact(
        {"id": "x", "context": "C", "question": "Q"} | {f"answer{i}": f"a{i}" for i in range(4)} | {"label": 3},
        "question: Q context: C answer0: a0 answer1: a1 answer2: a2 answer3: a3",
        "3",
        FOUR,
        ACC,
    ),
    "winogrande": Fact(
        {"sentence": "S _ t", "option1": "a", "option2": "b", "answer": "2"},
        "sentence: S _ t option1: a option2: b",
        "2",
        ["1", "2"],
        ACC,
    ),
    "hellaswag": Fact(
        {"ind": 4, "ctx": "C", "ctx_a": "x", "endings": ["a", "b", "c", "d"], "label": "3"},
        "ctx: C ending0: a ending1: b ending2: c ending3: d",
        "3",
        FOUR,
        ACC,
    ),
    "commonsense_qa": Fact(
        {"question": "Q", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "E"},
        "question: Q A: v B: w C: x D: y E: z",
        "4",
        FIVE,
        ACC,
    ),
    "wmt16-ro-en": Fact(
        ROMANIAN, "Salut.", "Hello.", None, ("bleu",), ALL, prefixed="Translate Romanian to English Salut."
    ),
    "wmt16-en-ro": Fact(
        ROMANIAN, "Hello.", "Salut.", None, ("bleu",), ALL, prefixed="Translate English to Romanian Hello."
    ),
    "wmt16-en-cs": Fact(
        {"translation": {"cs": "Ahoj.", "en": "Hello."}},
        "Hello.",
        "Ahoj.",
        None,
        ("bleu",),
        ALL,
        prefixed="Translate English to Czech Hello.",
    ),
    "wmt16-en-fi": Fact(
        {"translation": {"fi": "Hei.", "en": "Hello."}},
        "Hello.",
        "Hei.",
        None,
        ("bleu",),
        ALL,
        prefixed="Translate English to Finnish Hello.",
    ),
    "wmt14-hi-en": Fact(
        {"translation": {"hi": "नमस्ते", "en": "Hello."}},
        "Hello.",
        "नमस्ते",
        None,
        ("bleu",),
        ALL,
        prefixed="Translate English to Hindi Hello.",
    ),
    "iwslt2017-ro-nl": Fact(
        {"translation": {"ro": "Salut.", "nl": "Hallo."}},
        "Salut.",
        "Hallo.",
        None,
        ("bleu",),
        ALL,
        prefixed="Translate Romanian to Dutch Salut.",
    ),
    "iwslt2017-en-nl": Fact(
        {"translation": {"en": "Hello.", "nl": "Hallo."}},
        "Hello.",
        "Hallo.",
        None,
        ("bleu",),
        ALL,
        prefixed="Translate English to Dutch Hello.",
    ),
}


def test_there_are_31_tasks_in_both_styles():
    assert len(FACTS) == 31 and list(OFFICIAL_TASKS) == list(KNOWN) == list(FACTS)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("style", ["official", "default"])
def test_texts_and_targets_equal_the_authors(name, style):
    fact, spec = FACTS[name], find_task(name, style)
    source = fact.ours or fact.source if style == "default" else fact.source
    label = spec.label(fact.row, "")
    assert (spec.source_text(fact.row, ""), spec.target_text(label)) == (source, fact.target)
    assert with_prefix(spec).source_text(fact.row, "") == (fact.prefixed or f"{name} {source}")
    assert spec.is_labelled(fact.row) and spec.metrics == fact.metrics
    assert " ".join(spec.splits[split] for split in ("train", "validation", "test")) == fact.splits
    if name != "stsb":
        assert spec.targets() == fact.targets
        assert spec.parse(f" {fact.target} ") == label


@pytest.mark.parametrize("name", FACTS)
def test_rows_of_a_dataset_become_the_same_texts(name):
    """Through Arrow, where a translation is a struct and the answers of a row are a list."""
    fact, spec = FACTS[name], find_task(name, "official")
    rows = Dataset.from_list([fact.row, fact.row])
    data = TaskData.from_dataset(spec, train=rows, validation=rows)
    for example in (*data.splits["train"], *data.splits["validation"]):
        assert (example["source"], example["target"]) == (fact.source, fact.target)
        assert spec.target_text(example["label"]) == fact.target


def test_only_three_tasks_have_a_wording_of_their_own_by_default():
    differing = [name for name, spec in OFFICIAL_TASKS.items() if spec != KNOWN[name]]
    assert differing == ["stsb", "mnli", "imdb"]
    with pytest.raises(ValueError, match="text_style must be one of default, official, got 'authors'"):
        find_task("cola", "authors")


#: Labels of STS-B as its files hold them, with the authors' target and that of the paper and of T5.
SIMILARITIES = {
    0.0: ("0.0", "0.0"),
    0.85: ("0.9", "0.8"),  # the authors read it as float32, in which it is above 0.85
    2.25: ("2.2", "2.2"),
    2.5: ("2.5", "2.4"),
    2.75: ("2.8", "2.8"),
    3.1: ("3.1", "3.2"),
    3.857: ("3.9", "3.8"),
    4.75: ("4.8", "4.8"),
    5.0: ("5.0", "5.0"),
}


@pytest.mark.parametrize("label", SIMILARITIES)
def test_similarity_is_rounded_to_a_tenth_by_the_authors_and_to_a_fifth_by_us(label):
    for style, expected in zip(("official", "default"), SIMILARITIES[label], strict=True):
        spec = find_task("stsb", style)
        as_on_the_hub = struct.unpack("f", struct.pack("f", label))[0]
        assert spec.target_text(spec.label(PAIR | {"label": as_on_the_hub}, "")) == expected
        assert spec.target_text(label) == expected and expected in spec.targets()
        assert spec.parse(expected) == float(expected)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("scitail", {"entailment": "0", "neutral": "1"}),
        ("sick", {"ENTAILMENT": "0", "NEUTRAL": "1", "CONTRADICTION": "2"}),
        ("social_i_qa", {"1": "0", "2": "1", "3": "2"}),
        ("commonsense_qa", {"A": "0", "B": "1", "C": "2", "D": "3", "E": "4"}),
        ("winogrande", {"1": "1", "2": "2"}),
        ("hellaswag", {"0": "0", "1": "1", "2": "2", "3": "3"}),
    ],
)
def test_label_maps(name, labels):
    for spec in (OFFICIAL_TASKS[name], KNOWN[name]):
        column = spec.label_columns[-1]
        assert {label: spec.target_text(spec.label({column: label}, "")) for label in labels} == labels


def test_rows_without_a_gold_label_are_told():
    snli = find_task("snli")
    assert not snli.is_labelled(NLI | {"label": -1}) and snli.is_labelled(NLI | {"label": 0})


def test_names_on_the_hub():
    places = {name: (spec.dataset, spec.dataset_config) for name, spec in OFFICIAL_TASKS.items()}
    assert [name for name, (dataset, _) in places.items() if dataset is None] == ["sick"]
    configs = {
        **{name: name for name in "cola sst2 mrpc qqp stsb mnli qnli rte wnli".split()},
        **{"superglue-boolq": "boolq", "superglue-rte": "rte", "superglue-cb": "cb"},
        **{"scitail": "snli_format", "paws": "labeled_final", "winogrande": "winogrande_l"},
        **{"wmt16-ro-en": "ro-en", "wmt16-en-ro": "ro-en", "wmt16-en-cs": "cs-en", "wmt16-en-fi": "fi-en"},
        **{"wmt14-hi-en": "hi-en", "iwslt2017-ro-nl": "iwslt2017-ro-nl", "iwslt2017-en-nl": "iwslt2017-en-nl"},
    }
    assert {name: config for name, (_, config) in places.items() if config} == configs


def test_splits_that_must_be_cut_are_listed():
    """A task's test split is its validation split exactly where the authors cut one, which MNLI's two sets replace."""
    same = {name for name, spec in OFFICIAL_TASKS.items() if spec.splits["validation"] == spec.splits["test"]}
    own = {"superglue-rte"}  # listed in neither of the authors' two lists: validation and test are the same rows
    assert same == (HALVED | HELD_OUT | own) - {"sick"}
    assert not HALVED & HELD_OUT
    assert len(HALVED) == 11 and len(HELD_OUT) == 8


def test_translations_are_decoded_with_four_beams():
    for name, spec in OFFICIAL_TASKS.items():
        assert spec.generation == ({"max_length": 300, "num_beams": 4} if spec.target == "text" else {}), name


@pytest.mark.parametrize(
    ("given", "prefixed"),
    [
        ({"variant": "finetuning"}, True),
        ({"variant": "finetuning", "add_prefix": False}, False),
        ({"variant": "adapters"}, False),
        ({}, False),
        ({"add_prefix": True}, True),
    ],
)
def test_only_full_fine_tuning_has_prefixes_unless_a_run_says_otherwise(tmp_path, given, prefixed):
    run = RunArguments.from_dict({"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), **given})
    task = load_data(run, ["topic"], None)["topic"]
    start = "topic sentence: the " if prefixed else "sentence: the "
    assert all(task.splits[split][0]["source"].startswith(start) for split in ("train", "test"))
    assert task.spec.prefix == ("topic" if prefixed else None)
