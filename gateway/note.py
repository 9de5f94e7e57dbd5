"""What happened to a part of the gateway, in words for people."""

from __future__ import annotations

from typing import NamedTuple

NOTES_KEPT = 8
"""Of each part: the status page shows a dozen in all."""


class Note(NamedTuple):
    """Something that happened."""

    time_s: float
    """In seconds since the epoch."""
    text: str
    is_trouble: bool
