"""Texts of others, made fit for a page that more people see than the log."""

from __future__ import annotations

import re

MOST_CHARACTERS = 300

_FOLDERS = re.compile(r"(?<![\w.:/])(?:/[^\s/'\":,;()]+)+/(?=[^\s/])")
"""Of an absolute path; not of a URL, nor of a fraction."""


def for_people(text: str) -> str:
    """One line, not too long, with the names of files and not where they are."""
    line = _FOLDERS.sub("", " ".join(text.split()))
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
