"""Which attempt of a job counts: an older one that lives on, against all odds, ends by itself.

    <jobs>/<uid>/attempt.json     the newest; written by the host before that is started
    <jobs>/<uid>/attempts/<n>/    one attempt; see `trainer/run_folder.py`

The number comes from the transaction in which the job was given its attempt, so it only grows. The
host ends what is left of an attempt before it begins the next, and reads nothing of an older one
after that. This is for a process that the kernel would not let go of, and that wakes up later.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from trainer.run_folder import Message, RunFolder, write_whole

FENCE_FILE = "attempt.json"


class NewestAttempt(Message):
    """The attempt of a job that counts."""

    attempt: int


class Fenced(Exception):
    """A newer attempt of the job was begun."""


class Fence:
    """Of one attempt's process. Methods block on the disk."""

    def __init__(self, run: RunFolder, attempt: int) -> None:
        self._path = fence_of(run)
        self._attempt = attempt

    @property
    def holds(self) -> bool:
        """Whether no newer attempt was begun. What cannot be read fences nobody."""
        try:
            newest = NewestAttempt.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            return True
        return newest.attempt <= self._attempt

    def check(self) -> None:
        """Raise Fenced unless it holds. Called before anything is written that is believed."""
        if not self.holds:
            raise Fenced(f"attempt {self._attempt} is followed by another")


def fence_of(run: RunFolder) -> Path:
    """The file of a run's job."""
    return run.path.parents[1] / FENCE_FILE


def raise_fence(run: RunFolder, attempt: int) -> None:
    """Say that this attempt is the newest. Raises OSError."""
    write_whole(fence_of(run), NewestAttempt(attempt=attempt))
