"""The 31 tasks of the authors' code (``hyperformer/data/tasks.py``), and the wording of their sources in two styles.

:data:`OFFICIAL_TASKS` has texts and targets that equal the authors' character by character. Three of them are slips
rather than choices, so the style "default" of :func:`~hyperformer_fast.data.registry.find_task` changes them
(:data:`DEFAULT_WORDING`): MNLI's ``hypothesis`` has no colon, STS-B is rounded to 0.1 where the paper and T5 round to
0.2, and IMDB's text stands alone where every other single text follows ``sentence:``. Read the authors' checkpoints
with the style "official"; they were trained on those very texts.

Metrics compare with a row's own label. The authors' code compares STS-B with the label rounded to 0.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .tasks import TaskSpec

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")
_PAIR = "sentence1 sentence2"
_PREMISE = "premise hypothesis"
#: How the splits are named where only train and validation have labels, where only train and test exist, and where all
#: three do.
_NO_TEST = {"train": "train", "validation": "validation", "test": "validation"}
_NO_VALIDATION = {"train": "train", "validation": "test", "test": "test"}
_ALL = {"train": "train", "validation": "validation", "test": "test"}


def _task(
    name: str, dataset: str | None, columns: str, classes: int | None, metrics: str = "accuracy", **fields: Any
) -> TaskSpec:
    """Build the entry of a task whose targets are numbers, or the indices of its classes.

    Args:
        name: name of the task.
        dataset: name on the Hub and, behind a space, configuration; None for files of one's own.
        columns: the columns in order, separated by spaces: ``shown=alias|alias``, or just the name.
        classes: number of classes; None if the label is a number.
        metrics: names of the metrics, separated by spaces.
        fields: further fields of the TaskSpec.
    """
    repository, _, config = (dataset or "").partition(" ")
    shown = {column: found or column for column, _, found in (each.partition("=") for each in columns.split())}
    return TaskSpec(
        **{
            "name": name,
            "columns": {column: tuple(found.split("|")) for column, found in shown.items()},
            "labels": None if classes is None else tuple(map(str, range(classes))),
            "metrics": metrics.split(),
            "dataset": repository or None,
            "dataset_config": config or None,
            "splits": _NO_TEST,
            **fields,
        }
    )


def _translation(name: str, dataset: str, source: str, target: str, prefix: str) -> TaskSpec:
    """Build the entry of a translation. ``prefix`` is not part of it; see :data:`PREFIXES`."""
    repository, _, config = dataset.partition(" ")
    PREFIXES[name] = prefix
    return TaskSpec(
        name=name,
        source=f"{{translation.{source}}}",
        target="text",
        label_columns=(f"translation.{target}",),
        metrics=("bleu",),
        generation={"max_length": 300, "num_beams": 4},
        dataset=repository,
        dataset_config=config,
        splits=_ALL,
    )


#: The prefix of the tasks that have another one than their name. The authors add prefixes for full fine-tuning only.
PREFIXES: dict[str, str] = {}

_SPECS = (
    _task("cola", "nyu-mll/glue cola", "sentence", 2, "matthews", label_names=("unacceptable", "acceptable")),
    _task("sst2", "nyu-mll/glue sst2", "sentence", 2, label_names=("negative", "positive")),
    _task("mrpc", "nyu-mll/glue mrpc", _PAIR, 2, "f1 accuracy", label_names=("not_equivalent", "equivalent")),
    _task(
        "qqp",
        "nyu-mll/glue qqp",
        "question1 question2",
        2,
        "f1 accuracy",
        label_names=("not_duplicate", "duplicate"),
    ),
    _task("stsb", "nyu-mll/glue stsb", _PAIR, None, "pearson spearman", step=0.1),
    _task(
        "mnli",
        "nyu-mll/glue mnli",
        _PREMISE,
        3,
        source="premise: {premise} hypothesis {hypothesis}",
        label_names=_NLI,
        splits={"train": "train", "validation": "validation_mismatched", "test": "validation_matched"},
    ),
    _task("qnli", "nyu-mll/glue qnli", "question sentence", 2, label_names=_RTE),
    _task("rte", "nyu-mll/glue rte", _PAIR, 2, label_names=_RTE),
    _task("wnli", "nyu-mll/glue wnli", _PAIR, 2, label_names=("not_entailment", "entailment")),
    _task(
        "superglue-boolq",
        "aps/super_glue boolq",
        "question passage",
        2,
        label_names=("False", "True"),
    ),
    _task("superglue-rte", "aps/super_glue rte", _PREMISE, 2, label_names=_RTE),
    _task("superglue-cb", "aps/super_glue cb", _PREMISE, 3, label_names=("entailment", "contradiction", "neutral")),
    _task("snli", "stanfordnlp/snli", _PREMISE, 3, label_names=_NLI, unlabelled=(-1,), splits=_ALL),
    _task(
        "scitail",
        "allenai/scitail snli_format",
        "sentence1=sentence1|premise sentence2=sentence2|hypothesis",
        2,
        label_columns=("label", "gold_label"),
        label_names=("entailment", "neutral"),
        splits=_ALL,
    ),
    _task("sick", None, _PREMISE, 3, label_names=("ENTAILMENT", "NEUTRAL", "CONTRADICTION"), splits=_ALL),
    _task("paws", "google-research-datasets/paws labeled_final", _PAIR, 2, splits=_ALL),
    _task(
        "imdb",
        "stanfordnlp/imdb",
        "text",
        2,
        source="{text}",
        label_names=("neg", "pos"),
        splits=_NO_VALIDATION,
    ),
    _task("yelp_polarity", "fancyzhx/yelp_polarity", "sentence=text", 2, splits=_NO_VALIDATION),
    _task(
        "trec",
        "CogComp/trec",
        "sentence=text|sentence",
        6,
        label_columns=("label-coarse", "coarse_label", "label"),
        splits=_NO_VALIDATION,
    ),
    _task(
        "social_i_qa",
        "allenai/social_i_qa",
        "question context answerA answerB answerC",
        3,
        label_names=("1", "2", "3"),
    ),
    _task(
        "cosmos_qa",
        "allenai/cosmos_qa",
        "question context answer0 answer1 answer2 answer3",
        4,
    ),
    _task(
        "winogrande",
        "allenai/winogrande winogrande_l",
        "sentence option1 option2",
        2,
        labels=("1", "2"),
        label_columns=("answer",),
        label_names=("1", "2"),
    ),
    _task(
        "hellaswag",
        "Rowan/hellaswag",
        "ctx ending0=endings.0 ending1=endings.1 ending2=endings.2 ending3=endings.3",
        4,
        label_names=("0", "1", "2", "3"),
    ),
    _task(
        "commonsense_qa",
        "tau/commonsense_qa",
        "question A=choices.text.0 B=choices.text.1 C=choices.text.2 D=choices.text.3 E=choices.text.4",
        5,
        label_columns=("answerKey",),
        label_names=("A", "B", "C", "D", "E"),
    ),
    _translation("wmt16-ro-en", "wmt/wmt16 ro-en", "ro", "en", "Translate Romanian to English"),
    _translation("wmt16-en-ro", "wmt/wmt16 ro-en", "en", "ro", "Translate English to Romanian"),
    _translation("wmt16-en-cs", "wmt/wmt16 cs-en", "en", "cs", "Translate English to Czech"),
    _translation("wmt16-en-fi", "wmt/wmt16 fi-en", "en", "fi", "Translate English to Finnish"),
    _translation("wmt14-hi-en", "wmt/wmt14 hi-en", "en", "hi", "Translate English to Hindi"),
    _translation("iwslt2017-ro-nl", "IWSLT/iwslt2017 iwslt2017-ro-nl", "ro", "nl", "Translate Romanian to Dutch"),
    _translation("iwslt2017-en-nl", "IWSLT/iwslt2017 iwslt2017-en-nl", "en", "nl", "Translate English to Dutch"),
)

#: Every official task by name, in the authors' wording.
OFFICIAL_TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _SPECS}

#: What the style "default" says otherwise.
DEFAULT_WORDING: dict[str, dict[str, Any]] = {
    "mnli": {"source": None},
    "stsb": {"step": 0.2},
    "imdb": {"source": None, "columns": {"sentence": ("text",)}},
}

#: The same tasks in the style "default".
DEFAULT_TASKS: dict[str, TaskSpec] = {
    name: dataclasses.replace(spec, **DEFAULT_WORDING.get(name, {})) for name, spec in OFFICIAL_TASKS.items()
}
