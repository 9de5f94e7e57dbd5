"""Findings: what is wrong with something, as sentences for the person who can put it right.

Adapters have thousands of tensors, and one mistake touches most of them. So equal sentences
become one, which names a few of the tensors and counts the others.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence

MAX_EXAMPLES = 3
"""Subjects that a finding names; it counts the others."""
MAX_QUOTED_CHARACTERS = 120
"""Of any text that is not ours, within a finding."""

_REPR = reprlib.Repr()  # bounded in depth too: repr of a deep list ends in RecursionError
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MAX_QUOTED_CHARACTERS


class Findings:
    """Sentences in the order they were found, each with what it is about."""

    def __init__(self) -> None:
        self._subjects: dict[str, list[str]] = {}

    def add(self, sentence: str, subjects: Iterable[str] = ()) -> None:
        """Add a sentence, without a full stop; `subjects` join those it has already."""
        self._subjects.setdefault(sentence, []).extend(subjects)

    def sentences(self) -> list[str]:
        """All that was found; empty if nothing is wrong."""
        return [_with_examples(sentence, subjects) for sentence, subjects in self._subjects.items()]


def quote(value: object) -> str:
    """A value that is not ours, as a short line of printable text."""
    text = _REPR.repr(value)
    if len(text) > MAX_QUOTED_CHARACTERS:
        return text[:MAX_QUOTED_CHARACTERS] + "..."
    return text


def _with_examples(sentence: str, subjects: Sequence[str]) -> str:
    if not subjects:
        return sentence
    more = len(subjects) - MAX_EXAMPLES
    examples = ", ".join(subjects[:MAX_EXAMPLES])
    return f"{sentence}: {examples}" + (f" and {more} more" if more > 0 else "")
