"""What the T5 is pretrained to do with unlabelled text: examples that are drawn at random and say what is true."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hyperformer_fast.data.builtin_prose import PROSE_KINDS, Prose

from .tokenizer import WordIds

IGNORED = -100


class Batch(NamedTuple):
    """How often each objective is drawn for the examples of a batch, and the kind of prose if there is but one."""

    makers: Mapping[str, int]
    kind: str | None = None


class Lesson(NamedTuple):
    """What is taught up to a step, at a share of the learning rate: in one step single texts, in the next pairs."""

    until: float
    rate: float
    single: Batch
    pairs: Batch


#: Copying from another sentence and the sense of words are each found in some hundred steps where little else is
#: taught, and were not found in 6,000 where they were a sixth of a mixture. What was found stays in the mixture at its
#: lower rate, and is lost at 3e-3.
LESSONS = (
    Lesson(
        750,
        1.0,
        Batch({"proceed": 2, "pair_spans": 1, "foretell": 1}, "event"),
        Batch({"proceed": 2, "pair_spans": 1}, "event"),
    ),
    Lesson(
        1750,
        0.75,
        Batch({"foretell": 2, "spans": 1}, "review"),
        Batch({"proceed": 2, "pair_spans": 1}, "event"),
    ),
    Lesson(
        math.inf,
        0.6,
        Batch({"spans": 4, "intact": 7, "foretell": 5, "recall": 1}),
        Batch({"pair_spans": 2, "proceed": 4, "count": 5, "follows": 1}),
    ),
)


def lesson_at(step: int) -> Lesson:
    return next(lesson for lesson in LESSONS if step < lesson.until)


#: What some objectives answer, always behind a prefix of their own and never in the words of a task's label: what they
#: ask is near to what some tasks ask, and a T5 that answers a task before it is adapted shows nothing.
KEPT, CHANGED = "kept", "changed"
YES, NO = "yes", "no"
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: The columns' names before two sentences: mostly those of the tasks on pairs.
PAIRS = (("sentence1", "sentence2"),) * 3 + (("context", "question"),)


class Example:
    """One source and target, and what is known of each word of the source.

    ``ends`` are the positions of the words' last pieces; ``shared`` says whether the other sentence of a pair has the
    word, ``altered`` whether it is not as it stood in the text. IGNORED where there is nothing to know. ``following``
    are the pieces of the sentence that comes next, if it has to be foretold. ``new`` is how many of the words that are
    shown of a pair's second sentence the first does not have.
    """

    def __init__(self, ids: WordIds):
        self.ids = ids
        self.source: list[int] = []
        self.target: list[int] = []
        self.ends: list[int] = []
        self.shared: list[int] = []
        self.altered: list[int] = []
        self.following: list[int] = []
        self.new = IGNORED

    @property
    def changed(self) -> int:
        """Whether any word is not as it stood in the text."""
        return max(self.altered, default=IGNORED)

    def say(self, text: str) -> None:
        self.source += self.ids.text(text)

    def lay(
        self,
        words: Sequence[str],
        other: Sequence[str] | None = None,
        hidden: dict[int, int] | None = None,
        altered: set[int] | None = None,
    ) -> None:
        """Append a sentence; ``hidden`` gives the sentinels of words that are not shown, one for a run of words."""
        last = None
        for i, word in enumerate(words):
            sentinel = hidden.get(i) if hidden else None
            if sentinel is None or sentinel != last:
                self.source += self.ids.word(word) if sentinel is None else [sentinel]
                self.ends.append(len(self.source) - 1)
                self.shared.append(IGNORED if other is None or sentinel is not None else int(word in other))
                self.altered.append(IGNORED if altered is None else int(i in altered))
            last = sentinel


class Objectives:
    """Draws batches of single texts or of pairs; mixing them would pad, since a pair is about twice as long.

    Args:
        general: sentences of free text.
        builtin: sentences of the built-in tasks.
        prose: the source of well-formed passages.
        ids: the tokenizer.
        seed: of all that is drawn, together with the step.
    """

    def __init__(self, general: list[str], builtin: list[str], prose: Prose, ids: WordIds, seed: int):
        self.general, self.builtin, self.prose, self.ids, self.seed = general, builtin, prose, ids, seed
        self.draw = random.Random(seed)
        self.kind: str | None = None
        self.by_length: dict[int, list[list[str]]] = {}
        for sentence in builtin:
            words = sentence.split()
            self.by_length.setdefault(len(words), []).append(words)
        self.words = {word for sentence in builtin for word in sentence.split()}
        self.all_words = sorted(self.words)
        draw = random.Random(f"frequencies {seed}")
        passages = [sentence for _ in range(5000) for sentence in prose.passage(draw)]
        self.counts = collections.Counter(word for sentence in builtin + passages for word in sentence.split())

    def batch(self, size: int, step: int) -> list[Example]:
        """Return the examples of a step; they depend on the step and the seed alone."""
        self.draw.seed(f"{self.seed} {step}")
        lesson = lesson_at(step)
        makers, self.kind = lesson.single if step % 2 else lesson.pairs
        examples = [getattr(self, maker)() for maker in self.draw.choices(list(makers), list(makers.values()), k=size)]
        self.kind = None
        return examples

    def spans(self) -> Example:
        """T5's span corruption of whole words."""
        example, words = Example(self.ids), self._text()
        hidden = self._hide(example, words)
        example.say("sentence:")
        example.lay(words, hidden=hidden)
        return example

    def pair_spans(self) -> Example:
        """Span corruption of the second of two sentences, of one passage or with words in common."""
        first, second = self._passage() if self.kind or self.draw.random() < 0.7 else self._relatives()
        if not self.kind and self.draw.random() < 0.3:
            first, second = second, first
        example = Example(self.ids)
        hidden = self._hide(example, second)
        self._pair(example, first, second, hidden)
        return example

    def proceed(self) -> Example:
        """Write the last words of the second of two sentences of a passage: T5's language model with a prefix."""
        first, second = self._passage((2, 1, 9, 1))
        cut = len(second) - self.draw.randint(1, min(3, len(second) - 1))
        example = Example(self.ids)
        self._pair(example, first, second[:cut])
        example.target = self.ids.text(" ".join(second[cut:]))
        return example

    def count(self) -> Example:
        """How many words of the second sentence does the first not have?"""
        example, (first, second) = Example(self.ids), self._relatives()
        self._pair(example, first, second, prefix="count:")
        example.target = self.ids.text(NUMBERS[example.new])
        return example

    def follows(self) -> Example:
        """Does the second sentence follow the first, or is it of another passage? (BERT's next sentence prediction.)"""
        kind = self.draw.choices(PROSE_KINDS, (4, 1, 4, 1))[0]
        first, second = self._two_of(kind)
        follows = self.draw.random() < 0.5
        if not follows:
            second = self._two_of(kind)[1]
        example = Example(self.ids)
        self._pair(example, first, second, prefix="follows:")
        example.target = self.ids.text(YES if follows else NO)
        return example

    def intact(self) -> Example:
        """Did a word of well-formed prose gain or lose an s, did two change places, or did one come from elsewhere?"""
        kind = self.draw.choices(PROSE_KINDS, (1, 12, 1, 1))[0]
        words = self.draw.choice(self.prose.passage_of(self.draw, kind)).split()
        words, altered = self._alter(words) if self.draw.random() < 0.5 else (words, set())
        example = Example(self.ids)
        example.say("intact: sentence:")
        example.lay(words, altered=altered)
        example.target = self.ids.text(CHANGED if altered else KEPT)
        return example

    def foretell(self) -> Example:
        """Write the sentence that follows in the passage, as skip-thought vectors do."""
        first, second = self._passage((6, 6, 3, 1))
        # words are altered here, too, so that the encoder finds them without being asked
        first, altered = self._alter(first) if not self.kind and self.draw.random() < 0.5 else (first, set())
        example = Example(self.ids)
        example.say("next:" if self.draw.random() < 0.5 else "")
        example.say("sentence:")
        example.lay(first, altered=altered)
        example.target = example.following = self.ids.text(" ".join(second))
        return example

    def recall(self) -> Example:
        """Write the word that stands before or after a given one."""
        words = self._text()
        after = self.draw.random() < 0.5
        known = [i for i in range(len(words) - 1) if words.count(words[i + (not after)]) == 1]
        example = Example(self.ids)
        if known:
            i = self.draw.choice(known)
            given, asked = (i, i + 1) if after else (i + 1, i)
            example.say(f"{'after' if after else 'before'} {words[given]}")
            example.target = list(self.ids.word(words[asked]))
        else:
            example.say("last")
            example.target = list(self.ids.word(words[-1]))
        example.say("sentence:")
        example.lay(words)
        return example

    def _text(self) -> list[str]:
        if self.kind:
            return " . ".join(self.prose.passage_of(self.draw, self.kind)).split()
        way = self.draw.random()
        if way < 0.15 and self.general:
            return self.draw.choice(self.general).split()
        if way < 0.35:
            return self.draw.choice(self.builtin).split()
        return self.draw.choice(self.prose.passage(self.draw)).split()

    def _passage(self, weights: Sequence[int] | None = None) -> tuple[list[str], list[str]]:
        """Two sentences of a passage, of the lesson's kind or of one that is drawn with these weights."""
        drawn = None if weights is None else self.draw.choices(PROSE_KINDS, weights)[0]
        return self._two_of(self.kind or drawn)

    def _two_of(self, kind: str | None) -> tuple[list[str], list[str]]:
        while True:
            passage = self.prose.passage(self.draw) if kind is None else self.prose.passage_of(self.draw, kind)
            if len(passage) == 2:
                return passage[0].split(), passage[1].split()

    def _relatives(self) -> tuple[list[str], list[str]]:
        """A sentence, and a copy of it with up to five words replaced, some left out, its halves perhaps swapped.

        A word is mostly replaced by what stands in its place in another sentence of as many words, and thus often by
        one of its kind.
        """
        if self.general and self.draw.random() < 0.15:
            first = self.draw.choice(self.general).split()[:9]
        else:
            first = list(self.draw.choice(self.builtin).split())
        second, alike = list(first), self.by_length.get(len(first))
        for i in self.draw.sample(range(len(second)), self.draw.randint(0, min(5, len(second)))):
            way = self.draw.random()
            second[i] = self.draw.choice(alike)[i] if alike and way < 0.8 else self.draw.choice(self.all_words)
        if self.draw.random() < 0.4:
            second = [word for word in second if self.draw.random() < 0.8] or second
        if self.draw.random() < 0.3:
            turn = self.draw.randrange(len(second))
            second = second[turn:] + second[:turn]
        return first, second

    def _alter(self, words: Sequence[str]) -> tuple[list[str], set[int]]:
        """Return a sentence in which a word has gained or lost an s, two changed places, or one came from elsewhere,
        and the places of these words. Never a sentence of a task's validation or test row: those of `grammar` are made
        in this way."""
        while True:
            changed, places = self._altered_somehow(list(words))
            if changed != words and " ".join(changed) not in self.prose.held:
                return changed, places

    def _altered_somehow(self, words: list[str]) -> tuple[list[str], set[int]]:
        way = self.draw.random()
        inflected = [i for i, word in enumerate(words) if _inflected(word) in self.words]
        if way < 0.85 and inflected:
            i = self.draw.choice(inflected)
            words[i] = _inflected(words[i])
            return words, {i}
        if way < 0.93:
            i = self.draw.randrange(len(words) - 1)
            words[i], words[i + 1] = words[i + 1], words[i]
            return words, {i, i + 1}
        i = self.draw.randrange(len(words))
        words[i] = self.draw.choice(self.all_words)
        return words, {i}

    def _hide(self, example: Example, words: Sequence[str]) -> dict[int, int]:
        """Hide a fifth of the words behind sentinels, one for each run of them, and write them as the target.

        A word is hidden with a weight of one over the root of its frequency: a "the" tells little.
        """
        hidden: dict[int, int] = {}
        sentinel = self.ids.sentinel - 1
        keys = [self.draw.random() ** math.sqrt(self.counts.get(word, 1)) for word in words]
        for i in sorted(sorted(range(len(words)), key=keys.__getitem__)[-max(1, round(0.2 * len(words))) :]):
            if i - 1 not in hidden:
                sentinel += 1
                example.target.append(sentinel)
            hidden[i] = sentinel
            example.target += self.ids.word(words[i])
        return hidden

    def _pair(self, example: Example, first, second, hidden=None, prefix: str = "") -> None:
        one, two = self.draw.choice(PAIRS)
        example.say(f"{prefix} {one}:")
        example.lay(first, other=second)
        example.say(f"{two}:")
        example.lay(second, other=first, hidden=hidden)
        shown = [word for i, word in enumerate(second) if not hidden or i not in hidden]
        example.new = min(len(NUMBERS) - 1, sum(word not in first for word in shown))


def _inflected(word: str) -> str:
    """Return the word with an s more or less, as "dogs" of "dog" and "teach" of "teaches"."""
    if word.endswith("ches"):
        return word[:-2]
    if word.endswith("ch"):
        return word + "es"
    return word[:-1] if word.endswith("s") else word + "s"
