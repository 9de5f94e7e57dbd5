"""What a child is told to run, and where to die."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Order:
    """One run. Plain values, because they travel as JSON."""

    script: str
    """A `Script`."""
    watched: str
    """Folder whose changes are counted; absolute, and no link on its way."""
    sources: str
    """Folder of the adapters to take in."""
    journal: str
    """File that is written anew."""
    kill_at: int
    """Number of the call to die at, from 1 up; 0: none."""
    within: bool
    """Die with half of a write done, instead of before the call."""
