"""The error of unusable data, and how its messages show values."""

from __future__ import annotations

from typing import Any


class DataError(ValueError):
    """A data file, a row or a task's entry cannot be used; the message says where it is."""


def shown_value(value: Any) -> str:
    """Return the repr of a value for an error message, shortened to at most a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def check_text(text: str, what: str) -> None:
    """Raise DataError if ``text`` contains half of a surrogate pair.

    JSON and a command line can contain one, but UTF-8 cannot encode it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not text: {text[error.start]!r} at position {error.start} is half of a surrogate pair, which "
            "a wrong conversion to UTF-8 leaves behind"
        ) from None
