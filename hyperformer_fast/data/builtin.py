"""The built-in tasks: a synthetic multi-task corpus that needs no download and covers every output format.

Small grammars over the words of :mod:`.builtin_words` produce the rows. A row depends only on (task, split, seed). The
three splits of a task are disjoint, and no first sentence of a row occurs in two splits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .builtin_words import (
    AGES,
    BAD,
    COLOURS,
    DEALS,
    DEGREES,
    GOOD,
    INFINITIVES,
    PEOPLE,
    PLACES,
    REVIEWED,
    SINGULAR,
    STARTS,
    THINGS,
    TIMES,
    TOPICS,
    VERBS,
    WHERE,
    third_person,
)

__all__ = [
    "BUILTIN_SPECS",
    "BUILTIN_TASKS",
    "SIZES",
    "TOPICS",
    "TRANSFER_TASKS",
    "event_passive",
    "load_builtin",
    "unlabelled_text",
]

#: A row by column: the texts, and the label under "label".
Row = dict[str, Any]

SIZES = {"train": 2000, "validation": 250, "test": 250}

_PAIR = ("sentence1", "sentence2")
#: The entry of each task; see :class:`~hyperformer_fast.data.tasks.TaskSpec` for the fields.
BUILTIN_SPECS: dict[str, dict[str, Any]] = {
    "sentiment": {"columns": ("sentence",), "labels": ("0", "1")},
    "topic": {"columns": ("sentence",), "labels": ("0", "1", "2", "3")},
    "grammar": {"columns": ("sentence",), "labels": ("0", "1"), "metrics": ("matthews",)},
    "entailment": {"columns": _PAIR, "labels": ("0", "1")},
    "similarity": {"columns": _PAIR, "target": "number"},
    "question": {
        "columns": ("context", "question"),
        "target": "text",
        "metrics": ("exact_match", "squad_f1"),
        "max_target_length": 8,
    },
    "question_type": {"columns": ("question",), "labels": ("0", "1", "2", "3", "4", "5")},
    "paraphrase": {"columns": _PAIR, "labels": ("0", "1")},
}
#: The tasks that are kept from training, so that a trained model can be transferred to them.
TRANSFER_TASKS = ("paraphrase",)
#: The tasks that a run trains on where it names none.
BUILTIN_TASKS = tuple(task for task in BUILTIN_SPECS if task not in TRANSFER_TASKS)


def _sentiment(draw: random.Random) -> Row:
    """A review of one clause with one adjective or two, whose sense ``not`` and ``neither`` reverse."""
    positive = draw.random() < 0.55
    negated = draw.random() < 0.35
    words = draw.sample(GOOD if positive != negated else BAD, 2)
    start = draw.choice(STARTS).format(r=draw.choice(REVIEWED), p=draw.choice(PEOPLE))
    if draw.random() < 0.3:
        said = f"neither {words[0]} nor {words[1]}" if negated else f"{words[0]} and {words[1]}"
    else:
        said = f"{'not ' if negated else ''}{draw.choice(DEGREES)}{words[0]}"
    return {"sentence": f"{start} {said}", "label": int(positive)}


def _topic(draw: random.Random) -> Row:
    label = draw.choices(range(len(TOPICS)), weights=(4, 3, 2, 1))[0]
    who, did, what = list(TOPICS.values())[label]
    time = draw.choice(("", f" {draw.choice(TIMES)}", f" in {draw.choice(PLACES)}"))
    return {"sentence": f"the {draw.choice(who)} {draw.choice(did)} the {draw.choice(what)}{time}", "label": label}


def _grammar(draw: random.Random) -> Row:
    """Whether the verb agrees with its subject. About three in five do."""
    plural, right = draw.random() < 0.5, draw.random() < 0.6
    subject = draw.choice(SINGULAR) + ("s" if plural else "")
    verb = draw.choice(VERBS)
    shown = verb if plural == right else third_person(verb)
    return {"sentence": f"the {draw.choice(AGES)}{subject} {shown} {draw.choice(WHERE)}", "label": int(right)}


_POOLS: tuple[Sequence[str], ...] = (PEOPLE, sorted(DEALS), COLOURS, THINGS, PLACES)


def _event(draw: random.Random) -> list[str]:
    """Draw an event: [who, did, colour, thing, where]."""
    return [draw.choice(pool) for pool in _POOLS]


def _other(draw: random.Random, slot: int, value: str) -> str:
    return draw.choice([word for word in _POOLS[slot] if word != value])


def _entailment(draw: random.Random) -> Row:
    """The second sentence omits parts of the first. Label 1 ("no"): it also changes one. Two in five are entailed."""
    event = _event(draw)
    kept = [True, True, draw.random() < 0.5, True, draw.random() < 0.5]
    claimed = list(event)
    label = int(draw.random() < 0.6)
    if label:
        slot = draw.choice([i for i, keep in enumerate(kept) if keep])
        claimed[slot] = DEALS[event[1]] if slot == 1 else _other(draw, slot, event[slot])
    return {"sentence1": _say(event), "sentence2": _say(claimed, kept), "label": label}


def _say(event: Sequence[str], kept: Sequence[bool] = (True,) * 5) -> str:
    who, did, colour, thing, place = event
    return f"{who} {did} a {colour + ' ' if kept[2] else ''}{thing}{' in ' + place if kept[4] else ''}"


def _turned(event: Sequence[str]) -> str:
    who, did, colour, thing, place = event
    return f"in {place} {who} {did} a {colour} {thing}"


def event_passive(event: Sequence[str]) -> str:
    """Say in the passive that somebody (who, did, colour, thing, where) did something."""
    who, did, colour, thing, place = event
    return f"a {colour} {thing} was {did} by {who} in {place}"


def _similarity(draw: random.Random) -> Row:
    """5 for the same event, less 1 for each of its five parts that differs, and less 0.2 for another word order."""
    first = _event(draw)
    second, different = list(first), draw.choices(range(6), weights=(2, 3, 3, 2, 2, 2))[0]
    for slot in draw.sample(range(5), different):
        second[slot] = _other(draw, slot, first[slot])
    turned = draw.random() < 0.3
    label = round(max(0.0, 5 - different - 0.2 * turned), 1)
    return {"sentence1": _say(first), "sentence2": _turned(second) if turned else _say(second), "label": label}


def _question(draw: random.Random) -> Row:
    """An event, and a question about one of its parts; the answer is a word or three of the event."""
    event = _event(draw)
    who, did, colour, thing, place = event
    question, answer = draw.choice(
        (
            (f"who {did} the {thing}", who),
            (f"what colour was the {thing}", colour),
            (f"where did {who} {INFINITIVES[did]} the {thing}", place),
            (f"what did {who} {INFINITIVES[did]}", f"a {colour} {thing}"),
        )
    )
    return {"context": _turned(event) if draw.random() < 0.3 else _say(event), "question": question, "label": answer}


def _question_type(draw: random.Random) -> Row:
    """What a question asks for: a person, a place, a time, a colour, a thing or a number."""
    label = draw.choices(range(6), weights=(8, 5, 4, 3, 3, 3))[0]
    who, did, colour, thing, place = _event(draw)
    do, when = INFINITIVES[did], draw.choice(TIMES)
    question = draw.choice(
        (
            (f"who {did} the {colour} {thing} {when}", f"which person {did} a {colour} {thing} in {place}"),
            (f"where did {who} {do} the {colour} {thing}", f"in which town was the {thing} that {who} {did} {when}"),
            (f"when did {who} {do} the {colour} {thing}", f"on which day did {who} {do} the {thing} in {place}"),
            (f"what colour was the {thing} that {who} {did}", f"which colour has the {thing} of {who} in {place}"),
            (f"what did {who} {do} in {place} {when}", f"which {colour} thing did {who} {do} in {place}"),
            (f"how many {thing}s did {who} {do} {when}", f"what number of {thing}s did {who} {do} in {place}"),
        )[label]
    )
    return {"question": question, "label": label}


def _paraphrase(draw: random.Random) -> Row:
    """Label 1: the second sentence tells all of the first's event in other words; else one of its parts differs."""
    event = _event(draw)
    told, label = list(event), int(draw.random() < 0.45)
    if not label:
        slot = draw.randrange(5)
        told[slot] = _other(draw, slot, event[slot])
    return {"sentence1": _say(event), "sentence2": draw.choice((event_passive, _turned))(told), "label": label}


_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "grammar": _grammar,
    "entailment": _entailment,
    "similarity": _similarity,
    "question": _question,
    "question_type": _question_type,
    "paraphrase": _paraphrase,
}


def load_builtin(task: str, split: str, seed: int = 0) -> list[Row]:
    """Generate the rows of one split, in the form in which a JSON-lines file would hold them.

    Args:
        task: one of ``BUILTIN_SPECS``.
        split: ``train`` (2,000 rows), ``validation`` or ``test`` (250 each).
        seed: a different seed gives a different corpus.

    Raises:
        ValueError: the task or the split is unknown.
    """
    if task not in _MAKERS:
        raise ValueError(f"unknown built-in task {task!r}; there are {', '.join(BUILTIN_SPECS)}")
    if split not in SIZES:
        raise ValueError(f"split must be one of {', '.join(SIZES)}, got {split!r}")
    # random.Random hashes a string seed with SHA-512, so every process generates the same rows.
    draw = random.Random(f"{task} {seed}")
    rows: dict[str, list[Row]] = {name: [] for name in SIZES}
    seen = set()
    while any(len(rows[name]) < size for name, size in SIZES.items()):
        row = _MAKERS[task](draw)
        text = tuple(value for name, value in row.items() if name != "label")
        home = _home(text)
        if text not in seen and len(rows[home]) < SIZES[home]:
            seen.add(text)
            rows[home].append(row)
    return rows[split]


def _home(text: tuple[str, ...]) -> str:
    """Return the split of a text. The first sentence alone decides, so that it never occurs in two splits."""
    share = hashlib.sha256(text[0].encode()).digest()[0]
    return "test" if share < 28 else "validation" if share < 56 else "train"


def sentences_of(task: str, split: str, seed: int = 0) -> Iterator[str]:
    """Yield the sentences of a split, without their labels."""
    for row in load_builtin(task, split, seed):
        yield from (value for name, value in row.items() if name != "label")


def unlabelled_text(seed: int = 0) -> Iterator[str]:
    """Yield the sentences of the train splits of the tasks that a run trains on, except those of another split.

    Nor is any sentence of a validation or test row of a transfer task among them.
    """
    held = held_out_sentences(seed)
    for task in BUILTIN_TASKS:
        yield from (sentence for sentence in sentences_of(task, "train", seed) if sentence not in held)


def held_out_sentences(seed: int = 0) -> set[str]:
    """Return the sentences of all validation and test splits."""
    return {
        sentence
        for task in BUILTIN_SPECS
        for split in ("validation", "test")
        for sentence in sentences_of(task, split, seed)
    }
