"""Sentences of free text, from files that anybody can have again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

FEWEST_WORDS, MOST_WORDS, MOST_BYTES = 4, 10, 60


def read_sentences(folders: Sequence[Path]) -> list[str]:
    """Return all distinct sentences of four to ten words and at most 60 bytes in the files below some folders, sorted.

    Read are paragraphs of .txt files, every string of the rows of .jsonl files, and the definitions and examples in
    WordNet's data.noun, data.verb, data.adj and data.adv.
    """
    found: set[str] = set()
    for path in sorted({path for folder in folders for path in folder.rglob("*") if path.is_file()}):
        for text in _texts(path):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
                if FEWEST_WORDS <= sentence.count(" ") + 1 <= MOST_WORDS and len(sentence.encode()) <= MOST_BYTES:
                    found.add(sentence)
    return sorted(found)


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore"))
    elif path.suffix == ".jsonl":
        rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        yield from (value for row in rows for value in row.values() if isinstance(value, str))
    elif path.name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            if not line.startswith("  "):  # the licence
                yield from _gloss(line.partition(" | ")[2])


def _gloss(gloss: str) -> Iterator[str]:
    """Yield the definition and the quoted examples of a line such as ``marked by truth; "a true copy"``."""
    yield from re.findall(r'"([^"]+)"', gloss)
    yield from (part.strip() for part in re.sub(r'"[^"]*"[^;]*', "", gloss).split(";"))
