"""Unlabelled prose about the world of the built-in tasks, in which the sense of words shows by their company.

The tasks' own sentences do not tell good words from bad ones, nor a singular verb from a plural one in a wrong place:
each occurs wherever the other does. In a passage of this prose people stay to the end of what is lovely and leave what
is dull, verbs agree with their subjects, and a second sentence speaks of the same things as the first. That is what a
T5 can find by reading. No sentence of a passage is one of a validation or test row, though a longer one may have such
a sentence in it ("Max said the book was wonderful").
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .builtin import event_passive, held_out_sentences
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
    THINGS,
    TIMES,
    TOPICS,
    VERBS,
    WHERE,
    third_person,
)

#: The sentences of a passage, in their order.
Passage = list[str]

_REVIEWS = (
    "the {r} was {s}",
    "this {r} is {s}",
    "{p} said the {r} was {s}",
    "{p} found that the {r} was {s}",
    "a {r} that was {s}",
    "{p} thought the {r} was {s}",
    "we heard that the {r} was {s}",
)
#: What follows from a good review, and from a bad one.
_GOOD_ENDS = (
    "we stayed to the end",
    "everybody smiled",
    "{p} was happy",
    "we will come again",
    "{p} told all friends to go",
    "people clapped",
)
_BAD_ENDS = (
    "we left early",
    "nobody smiled",
    "{p} was angry",
    "we will never come again",
    "{p} told all friends to stay away",
    "people complained",
)
_BECAUSE = ("{e} because {c}", "{c} so {e}", "{c} and {e}")


def _adjectives(draw: random.Random, positive: bool) -> str:
    """Say something that is good, or bad, perhaps by a negation."""
    words, others = (GOOD, BAD) if positive else (BAD, GOOD)
    one, two = draw.sample(words, 2)
    other, another = draw.sample(others, 2)
    degree = draw.choice(DEGREES)
    plain = (f"{degree}{one}",) * 8
    several = (f"{one} and {two}",) * 4 + (f"{one} , {two} and {draw.choice(words)}",) * 2
    negated = (f"not {degree}{other}",) * 2 + (f"not {other} but {one}", f"neither {other} nor {another}")
    return draw.choice(plain + several + negated)


def _end(draw: random.Random, positive: bool) -> str:
    """Say what followed, or two things that did: the more words depend on the sense, the sooner it is found."""
    ends = draw.sample(_GOOD_ENDS if positive else _BAD_ENDS, 1 + (draw.random() < 0.6))
    return " and ".join(end.replace("{p}", draw.choice(PEOPLE)) for end in ends)


def _review(draw: random.Random) -> Passage:
    positive = draw.random() < 0.5
    start = draw.choice(_REVIEWS).replace("{r}", draw.choice(REVIEWED)).replace("{p}", draw.choice(PEOPLE))
    claim = start.replace("{s}", _adjectives(draw, positive))
    end, way = _end(draw, positive), draw.random()
    if way < 0.6:
        return [claim, end]
    if way < 0.75:
        return [draw.choice(_BECAUSE).format(e=end, c=claim)]
    more = draw.choice(("it was {s}", "{p} thought it was {s}", "all of it was {s}")).replace(
        "{p}", draw.choice(PEOPLE)
    )
    return [claim, more.replace("{s}", _adjectives(draw, positive))]


def _agreement(draw: random.Random) -> Passage:
    """People and animals in the present tense, and a second sentence that says "they" or "it"."""
    plural = draw.random() < 0.5
    age, noun, verb = draw.choice(AGES), draw.choice(SINGULAR), draw.choice(VERBS)
    determiner = draw.choice(
        ("the", "the", "the", "these", "many", "two") if plural else ("the", "the", "the", "this", "every", "one")
    )
    place = draw.choice(WHERE)
    another = draw.choice(VERBS)
    if plural:
        first = f"{determiner} {age}{noun}s {verb} {place}"
        second = draw.choice(
            (
                f"they {another} too",
                f"they are {draw.choice(('tired', 'young', 'small'))}",
                f"they often {another} {draw.choice(WHERE)}",
            )
        )
    else:
        first = f"{determiner} {age}{noun} {third_person(verb)} {place}"
        second = draw.choice(
            (
                f"it {third_person(another)} too",
                f"it is {draw.choice(('tired', 'young', 'small'))}",
                f"it often {third_person(another)} {draw.choice(WHERE)}",
            )
        )
    return [first, second]


def _event(draw: random.Random) -> Passage:
    """Somebody did something, and a part of it, or two, told again, or asked for and answered."""
    who, did, colour, thing, place = event = [
        draw.choice(pool) for pool in (PEOPLE, sorted(DEALS), COLOURS, THINGS, PLACES)
    ]
    do, other = INFINITIVES[did], draw.choice(("somebody", draw.choice(PEOPLE)))
    plain = f"{who} {did} a {colour} {thing} in {place}"
    turned = f"in {place} {who} {did} a {colour} {thing}"
    facts = (
        f"the {thing} was {colour}",
        f"the colour of the {thing} was {colour}",
        f"{who} was in {place}",
        f"the town was {place}",
        f"it was {who} who {did} the {thing}",
        f"the person who {did} the {thing} was {who}",
        f"what {who} {did} was a {colour} {thing}",
        f"the {thing} was {did} by {who}",
    )
    again = (
        *facts,
        f"{who} did {do} the {thing} in {place}",
        f"{other} asked who {did} the {thing} , and it was {who}",
        f"{other} asked what colour the {thing} was , and it was {colour}",
        f"{other} asked {who} where the {thing} was , and it was in {place}",
        f"{other} asked what {who} {did} , and it was a {colour} {thing}",
        event_passive(event),
        turned,
    )
    told = draw.choice(again) if draw.random() < 0.5 else " and ".join(draw.sample(facts, 2))
    return [draw.choice((plain, plain, turned)), told]


def _scene(draw: random.Random) -> Passage:
    """Two sentences on one topic."""
    who, did, what = draw.choice(list(TOPICS.values()))
    when = draw.choice(("", f" {draw.choice(TIMES)}", f" in {draw.choice(PLACES)}"))
    second = draw.choice(
        ("then the {a} {b} the {c}", "a {a} {b} the {c} too", "the {a} and the {c}", "soon the {a} {b} a {c}")
    )
    return [
        f"the {draw.choice(who)} {draw.choice(did)} the {draw.choice(what)}{when}",
        second.format(a=draw.choice(who), b=draw.choice(did), c=draw.choice(what)),
    ]


_KINDS: dict[str, tuple[Callable[[random.Random], Passage], int]] = {
    "review": (_review, 6),
    "agreement": (_agreement, 2),
    "event": (_event, 3),
    "scene": (_scene, 1),
}


class Prose:
    """Draws passages without end.

    Args:
        seed: of the tasks whose held-out sentences it avoids.
    """

    def __init__(self, seed: int = 0):
        self.held = held_out_sentences(seed)

    def passage(self, draw: random.Random) -> Passage:
        """Return a passage of one or two sentences."""
        return self.passage_of(draw, draw.choices(list(_KINDS), [weight for _, weight in _KINDS.values()])[0])

    def passage_of(self, draw: random.Random, kind: str) -> Passage:
        """Return a passage about one kind of thing; see :data:`PROSE_KINDS`."""
        while True:
            passage = _KINDS[kind][0](draw)
            if not any(sentence in self.held for sentence in passage):
                return passage


PROSE_KINDS = tuple(_KINDS)
