"""The built-in tasks: a synthetic multi-task corpus that needs no download and covers every output format.

Small grammars over the lexicons below produce the sentences. A row depends only on (task, split, seed). The three
splits of a task are disjoint, and no first sentence of a row occurs in two splits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

#: A row by column: the texts, and the label under "label".
Row = dict[str, Any]

PEOPLE = "Anna Tom Maria Peter Lucy Omar Nina Carl Ivy Hugo".split()
PEOPLE += "Lena Boris Clara Felix Rosa Simon Vera Max Edith Paul".split()
COLOURS = "red blue green black white yellow brown grey".split()
PLACES = "Paris Rome Oslo Cairo Lima Delhi Tokyo Dublin Boston Madrid Vienna Prague".split()
THINGS = "car coat lamp chair table piano bike boat clock phone camera guitar hat bag ring sofa".split()
DEALS = {"bought": "sold", "found": "lost", "painted": "cleaned"}
DEALS |= {opposite: deed for deed, opposite in DEALS.items()}
TIMES = ("on Monday", "last week", "in May", "yesterday", "at noon", "on Friday", "in July", "last year")

GOOD = "great lovely superb delightful brilliant charming excellent wonderful pleasant splendid".split()
BAD = "awful dull terrible boring dreadful poor horrible tedious weak nasty".split()
REVIEWED = "film play book song meal hotel show story concert speech dinner garden".split()
DEGREES = ("", "really ", "quite ", "very ", "truly ", "rather ")
STARTS = ("the {r} was", "a {r} that was", "{p} said the {r} was", "this {r} is", "{p} found that the {r} was")

TOPICS = {
    "sport": (
        "team player coach runner goalkeeper champion striker referee".split(),
        "won lost missed watched celebrated filmed".split(),
        "match goal race medal final season league penalty".split(),
    ),
    "food": (
        "cook baker chef waiter farmer butcher guest grocer".split(),
        "boiled served roasted tasted ordered peeled".split(),
        "soup bread rice cheese pasta salad onion stew".split(),
    ),
    "music": (
        "singer drummer pianist band choir violinist composer conductor".split(),
        "played sang rehearsed recorded performed composed".split(),
        "song opera waltz concerto melody symphony ballad tune".split(),
    ),
    "weather": (
        "storm wind rain frost cloud snow fog thunder".split(),
        "covered reached hit crossed darkened flooded".split(),
        "valley coast hills river shore mountains island bay".split(),
    ),
}

SINGULAR = "dog cat boy girl teacher nurse farmer sailor bird horse".split()
VERBS = "sleep walk sing swim jump work wait dance read shout".split()
WHERE: tuple[str, ...] = ("near the lake", "in the park", "at home", "by the river", "in the yard", "at school")
WHERE += ("on the hill", "near the gate")

SIZES = {"train": 2000, "validation": 250, "test": 250}

_PAIR = ("sentence1", "sentence2")
#: The entry of each task; see :class:`~hyperformer_fast.data.tasks.TaskSpec` for the fields.
BUILTIN_SPECS: dict[str, dict[str, Any]] = {
    "sentiment": {"columns": ("sentence",), "labels": ("0", "1")},
    "topic": {"columns": ("sentence",), "labels": ("0", "1", "2", "3")},
    "grammar": {"columns": ("sentence",), "labels": ("0", "1"), "metrics": ("matthews",)},
    "entailment": {"columns": _PAIR, "labels": ("0", "1")},
    "similarity": {"columns": _PAIR, "target": "number"},
}
BUILTIN_TASKS = tuple(BUILTIN_SPECS)


def _sentiment(draw: random.Random) -> Row:
    """A review of one clause, in which ``not`` reverses the sentiment. Three in five are positive."""
    positive = draw.random() < 0.6
    negated = draw.random() < 0.35
    word = draw.choice(GOOD if positive != negated else BAD)
    degree = draw.choice(DEGREES)
    start = draw.choice(STARTS).format(r=draw.choice(REVIEWED), p=draw.choice(PEOPLE))
    return {"sentence": f"{start} {'not ' if negated else ''}{degree}{word}", "label": int(positive)}


def _topic(draw: random.Random) -> Row:
    label = draw.choices(range(len(TOPICS)), weights=(4, 3, 2, 1))[0]
    who, did, what = list(TOPICS.values())[label]
    time = draw.choice(("", f" {draw.choice(TIMES)}", f" in {draw.choice(PLACES)}"))
    return {"sentence": f"the {draw.choice(who)} {draw.choice(did)} the {draw.choice(what)}{time}", "label": label}


def _grammar(draw: random.Random) -> Row:
    """Whether the verb agrees with its subject. About two in three do."""
    plural, right = draw.random() < 0.5, draw.random() < 0.65
    subject = draw.choice(SINGULAR) + ("s" if plural else "")
    verb = draw.choice(VERBS)
    third = verb + ("es" if verb.endswith("ch") else "s")
    colour = draw.choice(("", "", "old ", "young ", "small ", "tired "))
    sentence = f"the {colour}{subject} {verb if plural == right else third} {draw.choice(WHERE)}"
    return {"sentence": sentence, "label": int(right)}


def _event(draw: random.Random) -> list[str]:
    """Draw an event: [who, did, colour, thing, where]."""
    return [draw.choice(part) for part in (PEOPLE, sorted(DEALS), COLOURS, THINGS, PLACES)]


def _other(draw: random.Random, slot: int, value: str) -> str:
    pool = (PEOPLE, sorted(DEALS), COLOURS, THINGS, PLACES)[slot]
    return draw.choice([word for word in pool if word != value])


def _entailment(draw: random.Random) -> Row:
    """The second sentence omits parts of the first. Label 1 ("no"): it also changes one. Two in five are entailed."""
    event = _event(draw)
    kept = [True, True, draw.random() < 0.5, True, draw.random() < 0.5]
    claimed = list(event)
    label = int(draw.random() < 0.6)
    if label:
        slot = draw.choice([i for i, keep in enumerate(kept) if keep])
        claimed[slot] = DEALS[event[1]] if slot == 1 else _other(draw, slot, event[slot])
    return {"sentence1": _say(event, [True] * 5), "sentence2": _say(claimed, kept), "label": label}


def _say(event: list[str], kept: list[bool]) -> str:
    who, did, colour, thing, place = event
    return f"{who} {did} a {colour + ' ' if kept[2] else ''}{thing}{' in ' + place if kept[4] else ''}"


def _similarity(draw: random.Random) -> Row:
    """5 for the same event, less 1 for each of its five parts that differs, and less 0.2 for another word order."""
    first = _event(draw)
    second, different = list(first), draw.choices(range(6), weights=(2, 3, 3, 2, 2, 2))[0]
    for slot in draw.sample(range(5), different):
        second[slot] = _other(draw, slot, first[slot])
    turned = draw.random() < 0.3
    sentences = [_say(first, [True] * 5), _say(second, [True] * 5)]
    if turned:
        who, did, colour, thing, place = second
        sentences[1] = f"in {place} {who} {did} a {colour} {thing}"
    label = round(max(0.0, 5 - different - 0.2 * turned), 1)
    return {"sentence1": sentences[0], "sentence2": sentences[1], "label": label}


_MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "grammar": _grammar,
    "entailment": _entailment,
    "similarity": _similarity,
}


def load_builtin(task: str, split: str, seed: int = 0) -> list[Row]:
    """Generate the rows of one split, in the form in which a JSON-lines file would hold them.

    Args:
        task: one of ``BUILTIN_TASKS``.
        split: ``train`` (2,000 rows), ``validation`` or ``test`` (250 each).
        seed: a different seed gives a different corpus.

    Raises:
        ValueError: the task or the split is unknown.
    """
    if task not in _MAKERS:
        raise ValueError(f"unknown built-in task {task!r}; there are {', '.join(BUILTIN_TASKS)}")
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


def unlabelled_text(seed: int = 0) -> Iterator[str]:
    """Yield the sentences of the train splits, except those that also occur in another split."""

    def sentences(split: str) -> Iterator[str]:
        for task in BUILTIN_TASKS:
            for row in load_builtin(task, split, seed):
                yield from (value for name, value in row.items() if name != "label")

    held = {*sentences("validation"), *sentences("test")}
    yield from (sentence for sentence in sentences("train") if sentence not in held)
